"""The quickstart: its commands are real ones, its runner loses no work, its verdict is fair."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_miniplm.core.config import to_flat
from megatron_miniplm.core.errors import ConfigError
from tests.examples.accept import accept

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tools():
    """The modules of tools/, as `python tools/quickstart.py` sees them."""
    sys.path.insert(0, str(PROJECT / "tools"))
    try:
        import jobs
        import quickstart
        import quickstart_report
    finally:
        sys.path.remove(str(PROJECT / "tools"))
    return {"jobs": jobs, "quickstart": quickstart, "report": quickstart_report}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def make(tools, folder: Path, name: str, *, after: tuple[str, ...] = (), code: str = ""):
    """A job that notes its start and end in FOLDER/order and then leaves FOLDER/NAME."""
    write = f"import os, time, pathlib; root = pathlib.Path({str(folder)!r})\n"
    note = "with open(root / 'order', 'a') as file: file.write('{} {}\\n')\n"
    script = write + note.format("start", name) + code + "\n" + note.format("end", name)
    script += f"(root / {name!r}).touch()"
    return tools["jobs"].Job(
        name=name, stage=name[0], words=python(script), done=(folder / name).exists, after=after
    )


def run(tools, folder: Path, jobs, slots: int = 2) -> dict[str, float]:
    return tools["jobs"].run_jobs(
        jobs, slots=slots, logs=folder / "logs", environment={"OMP_NUM_THREADS": "1"}
    )


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().split("\n")[:-1]


@pytest.mark.parametrize("bf16", [False, True])
def test_every_step_is_a_command_that_the_program_accepts(tools, tmp_path, monkeypatch, bf16):
    monkeypatch.setattr(tools["quickstart"], "has_bf16", lambda: bf16)
    plan = tools["quickstart"].plan(tools["quickstart"].Config(output=tmp_path / "o"))
    verbs = [
        type(accept(list(job.words))).__module__.rpartition(".")[2]
        for job in plan if job.name != "corpus"
    ]  # fmt: skip
    assert len(plan) == 1 + len(verbs) == 34
    counts = {verb: verbs.count(verb) for verb in verbs}
    assert counts == {
        "preprocess": 2, "split": 1, "pretrain": 14, "score": 2, "select": 2, "evaluate": 12
    }  # fmt: skip
    assert all(("--bf16" in job.words) == (bf16 and job.name.split()[0] in BF16) for job in plan)
    assert not any(job.done() for job in plan)
    assert not (tmp_path / "o").exists()


BF16 = ("teacher", "reference", "score", "student", "evaluate")


def test_students_of_a_subset_and_of_the_other_differ_in_their_data_alone(tools, tmp_path):
    plan = tools["quickstart"].plan(tools["quickstart"].Config(output=tmp_path))
    students = {job.name: list(job.words) for job in plan if job.name.startswith("student")}
    assert len(students) == 12
    for seed in range(1, 4):
        for teaching in ("", "-kd"):
            miniplm = " ".join(students[f"student miniplm{teaching} {seed}"])
            random = " ".join(students[f"student {teaching[1:] or 'random'} {seed}"])
            miniplm = miniplm.replace("data/miniplm", "data/random")
            assert (
                miniplm.replace(f"-miniplm{teaching}-", f"-{teaching[1:] or 'random'}-") == random
            )


def test_students_beside_a_teacher_differ_in_it_and_in_their_number_of_updates(tools, tmp_path):
    plan = tools["quickstart"].plan(tools["quickstart"].Config(output=tmp_path))
    jobs = {job.name: job for job in plan}
    taught, alone = (accept(list(jobs[f"student {m} 1"].words)) for m in ("kd", "random"))
    differ = {
        name: value for name, value in to_flat(taught).items() if to_flat(alone)[name] != value
    }
    for cadence in ("save", "lr_warmup_iters", "log_interval", "eval_interval"):
        differ.pop(cadence, None)
    teacher = str(tmp_path / "teacher")
    iterations = differ.pop("train_iters")
    assert differ == {"objective": "kd", "teacher": "online", "teacher_load": teacher}
    assert "teacher" in jobs["student kd 1"].after
    # 6 N a token in training, and 2 of the teacher's for its forward pass.
    student, expert = 418_848, 866_304
    cost = iterations * (6 * student + 2 * expert)
    assert cost == pytest.approx(alone.training.train_iters * 6 * student, rel=2e-3)


def test_jobs_wait_for_what_they_need_and_run_side_by_side_otherwise(tools, tmp_path):
    wait = (
        "started = lambda: (root / 'order').read_text().count('start')\n"
        "deadline = time.time() + 20\n"
        "while started() < 2 and time.time() < deadline: time.sleep(0.01)\n"
        "assert started() == 2"
    )
    jobs = [
        make(tools, tmp_path, "a", code=wait),
        make(tools, tmp_path, "b", code=wait),
        make(tools, tmp_path, "c", after=("a", "b")),
    ]
    seconds = run(tools, tmp_path, jobs)
    lines = order(tmp_path)
    assert sorted(lines[:2]) == ["start a", "start b"]
    assert lines[4:] == ["start c", "end c"]
    assert seconds.keys() == {"a", "b", "c", "wall"}
    assert seconds["wall"] >= seconds["c"] > 0


def test_one_slot_runs_in_the_order_of_the_list(tools, tmp_path):
    run(tools, tmp_path, [make(tools, tmp_path, name) for name in "abc"], slots=1)
    assert order(tmp_path) == [f"{what} {name}" for name in "abc" for what in ("start", "end")]


def test_job_that_fails_after_its_artifact_is_still_an_error(tools, tmp_path):
    code = "(root / 'a').touch()\nraise SystemExit(3)"
    with pytest.raises(tools["jobs"].JobError, match="a ended with code 3"):
        run(tools, tmp_path, [make(tools, tmp_path, "a", code=code)])


def test_finished_work_is_not_run_again_and_seconds_add_up(tools, tmp_path):
    failing = make(tools, tmp_path, "b", after=("a",), code="raise SystemExit(3)")
    with pytest.raises(tools["jobs"].JobError, match="b ended with code 3"):
        run(tools, tmp_path, [make(tools, tmp_path, "a"), failing])
    first = json.loads((tmp_path / "logs/seconds.json").read_text())
    jobs = [make(tools, tmp_path, "a"), make(tools, tmp_path, "b", after=("a",))]
    second = run(tools, tmp_path, jobs)
    assert order(tmp_path) == ["start a", "end a", "start b", "start b", "end b"]
    assert second["a"] == first["a"]
    assert second["b"] > first["b"]
    assert second["wall"] > first["wall"]


def test_job_without_its_artifact_is_an_error_that_shows_its_output(tools, tmp_path):
    job = tools["jobs"].Job(
        name="a", stage="a", words=python("print('why it is so')"), done=lambda: False
    )
    with pytest.raises(tools["jobs"].JobError, match=r"without its artifact(?s:.)*why it is so"):
        run(tools, tmp_path, [job])


def test_failure_stops_the_jobs_beside_it(tools, tmp_path):
    endless = "(root / 'pid').write_text(str(os.getpid()))\ntime.sleep(600)"
    wait = "while not (root / 'pid').exists(): time.sleep(0.01)\nraise SystemExit(1)"
    jobs = [make(tools, tmp_path, "a", code=endless), make(tools, tmp_path, "b", code=wait)]
    with pytest.raises(tools["jobs"].JobError):
        run(tools, tmp_path, jobs)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("after", [("later",), ("a",)])
def test_loose_ends_of_a_plan_are_refused_before_anything_runs(tools, tmp_path, after):
    jobs = [make(tools, tmp_path, "a"), make(tools, tmp_path, "a", after=after)]
    with pytest.raises(ConfigError, match="'a'"):
        run(tools, tmp_path, jobs)
    assert not (tmp_path / "order").exists()


STEP = " iteration {:8d}/     120 | consumed samples: 1 | lm loss: 5.1E+00 | grad norm: 1 |"
COUNT = "12:00:00 score (this rank): {:,}/4,800 instances, 512 instances/s, ETA 6 s"


@pytest.mark.parametrize(
    ("log", "share"),
    [
        (f"$ command\n{STEP.format(1)}\n{STEP.format(30)}\nsaved\n", 0.25),
        (f"$ command\n{COUNT.format(1)}\n{COUNT.format(1200)}\n", 0.25),
        ("$ command\nTraceback\n", 0.0),
        ("", 0.0),
    ],
)
def test_progress_is_read_from_the_end_of_the_log(tools, tmp_path, log: str, share: float):
    path = tmp_path / "log"
    path.write_text(log)
    running = tools["jobs"]._Running(job=None, process=None, log=path)
    assert running.progress()[0] == share


@pytest.mark.parametrize(
    ("miniplm", "random", "says"),
    [
        (
            [4.0, 4.3, 4.6],
            [4.20, 4.51, 4.82],
            "95 % interval +0.1852 to +0.2348. MiniPLM is better",
        ),
        ([4.20, 4.51, 4.82], [4.0, 4.3, 4.6], "random selection is better."),
        ([4.0, 4.2, 4.4], [4.1, 4.1, 4.6], "3 seeds do not tell the two apart"),
        ([4.0], [5.0], "one seed cannot say"),
    ],
)
def test_verdict_compares_seed_by_seed_and_names_a_winner_only_beyond_the_interval(
    tools, miniplm, random, says
):
    assert says in tools["report"].verdict({"miniplm": miniplm, "random": random})


TINY = [
    "--train-mb", "0.3", "--heldout-mb", "0.05", "--seeds", "1", "--vocab-size", "300",
    "--seq-length", "64", "--teacher-iters", "4", "--reference-iters", "2",
    "--student-iters", "3",
]  # fmt: skip


def quickstart(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "tools/quickstart.py"), "--output", str(folder), *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_stopped_quickstart_goes_on_and_ends_with_its_report(tmp_path: Path):
    root = tmp_path / "run"
    first = quickstart(root, *TINY)
    deadline = time.monotonic() + 300
    while not (root / "data/pool.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 130, said
    corpus = (root / "text/corpus.json").stat().st_mtime_ns
    second = quickstart(root, *TINY)
    said, _ = second.communicate(timeout=900)
    assert second.returncode == 0, said
    assert (root / "text/corpus.json").stat().st_mtime_ns == corpus
    report = json.loads((root / "report.json").read_text())
    methods = {"miniplm", "miniplm-kd", "kd", "random"}
    assert set(report["heldout_loss"]) == set(report["train_tokens"]) == methods
    assert all(4 < report["heldout_loss"][method][0] < 7 for method in methods)
    assert 0.4 < report["kept_fraction"] <= 0.5
    assert {"corpus", "preprocess", "score", "select", "evaluate"} < set(report["seconds"])
    page = (root / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7
    assert page.count('class="dropped"') >= 4 <= page.count('class="kept"')
    other = quickstart(root, *TINY[:-1], "5")
    said, _ = other.communicate(timeout=120)
    assert other.returncode == 2
    assert "choose another --output" in said
