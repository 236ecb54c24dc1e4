"""The benchmark tool: every case runs, its rows have one format, a wrong result cannot win."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_miniplm.core.errors import ConfigError, MiniPLMError

PROJECT = Path(__file__).resolve().parents[2]
FIGURES = {
    "ours", "peer", "ratio", "limit", "fraction_of_limit", "error_ours", "error_peer",
}  # fmt: skip
NAMES = {"suite", "case", "metric", "unit", "peer_name", "limit_name"}


@pytest.fixture(scope="module")
def tools() -> SimpleNamespace:
    """The modules of tools/, as `python tools/benchmark.py` sees them."""
    sys.path.insert(0, str(PROJECT / "tools"))
    try:
        import bench_core
        import bench_evaluation
        import bench_linear
        import bench_loss_forms
        import bench_loss_peers
        import bench_loss_race
        import bench_process
        import benchmark
    finally:
        sys.path.remove(str(PROJECT / "tools"))
    return SimpleNamespace(
        core=bench_core, process=bench_process, main=benchmark, linear=bench_linear,
        race=bench_loss_race, peers=bench_loss_peers, forms=bench_loss_forms,
        evaluation=bench_evaluation,
    )  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        "data",
        "kernels",
        "logits",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("training", "scoring", "generation", "evaluation")
        ),
    ],
)
def report(
    tools: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict:
    """What a quick run of all cases of a suite writes."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "scratch").mkdir()
    words = [request.param, "--quick", "--json", str(folder / "figures.json")]
    assert tools.main.main([*words, "--scratch", str(folder / "scratch")]) == 0
    assert not list((folder / "scratch").iterdir()), "a case left its scratch folder behind"
    return json.loads((folder / "figures.json").read_text())


def test_every_case_that_this_machine_can_run_gives_a_row(tools, report):
    missing = {each.partition(":")[0] for each in report["skipped"] if "there is no GPU" in each}
    cases = set(tools.main.SUITES[report["suite"]].cases)
    assert all(case.startswith("cuda") for case in missing)
    assert {row["case"] for row in report["rows"]} == cases - missing


def test_rows_hold_the_fields_of_the_format_and_only_measured_figures(report):
    for row in report["rows"]:
        assert row.keys() <= FIGURES | NAMES
        assert row["suite"] == report["suite"]
        assert isinstance(row["metric"], str)
        assert isinstance(row["unit"], str)
        assert isinstance(row["ours"], int | float)
        assert all(isinstance(row[name], int | float) for name in FIGURES & row.keys())
        assert ("peer" in row) == ("peer_name" in row)
        assert ("limit" in row) == ("limit_name" in row)
        assert ("fraction_of_limit" in row) <= ("limit" in row)
        assert ("ratio" in row) <= ("peer" in row)


def test_every_result_in_a_row_is_right(report):
    errors = [row[name] for row in report["rows"] for name in row if name.startswith("error_")]
    assert errors
    if report["suite"] == "data":
        assert set(errors) == {0}
    # Gradients in bf16 have its rounding, of bf16 hidden states the logits', too; ours in fp32 are
    # held to the limit of tests/contracts/test_token_losses.py.
    for row in report["rows"]:
        limit = 2e-2 if "linear" in row["case"] and "bf16" in row["case"] else 5e-3
        if row["case"] == "encodings":  # an error is below a level's share of the range
            limit = 2.0 ** -int(re.search(r"(\d+) bits", row["metric"])[1]) + 1e-5
        assert max(row.get("error_ours", 0), row.get("error_peer", 0)) < limit, row
    ours = [row for row in report["rows"] if "fp32" in row["case"] and "error_ours" in row]
    assert all(row["error_ours"] <= 2e-6 for row in ours)


def test_the_gemms_of_a_linear_loss_are_no_more_than_it_takes(tools):
    """The limit does what ours does without the loss, so its gradients are those of the logits."""
    shape = tools.linear.LinearShape(
        device="cpu", rows=9, vocabulary=31, width=8, teacher_width=12, dtype=torch.float32
    )
    problem = tools.linear.LinearProblem(shape)
    problem.clear()
    found = problem.through_head(tools.linear.NoLoss(shape.loss))
    for mine, uncut in zip(found, problem.uncut(), strict=True):
        torch.testing.assert_close(mine, uncut)


def test_an_entrant_that_does_not_fit_is_left_out_and_said_and_ours_is_not(tools, tmp_path):
    def too_large():
        raise torch.OutOfMemoryError("no")

    def entrants(**runs):
        return {
            name: tools.race.Entrant(run=run, prepare=lambda: None) for name, run in runs.items()
        }

    made = bench(tools, tmp_path)
    asked = {"limit": "limit", "error": lambda _: 0.0, "work": "nothing", "memory": "memory"}
    some = entrants(ours=lambda: 1, limit=lambda: 1, small=lambda: 1, large=too_large)
    tools.race.race_losses(made, "cpu", some, **asked)
    assert {row.peer_name for row in made.rows} == {"small"}
    assert made.skipped == ["a case: large: does not fit in the memory of the GPU"]
    with pytest.raises(torch.OutOfMemoryError):
        tools.race.race_losses(made, "cpu", some | entrants(ours=too_large), **asked)


def test_a_peer_that_is_not_there_is_said_and_one_without_the_loss_is_not(tools, tmp_path):
    made = bench(tools, tmp_path)
    shape = tools.forms.Shape(device="cuda", rows=1, vocabulary=8, dtype=torch.float32)
    peers = [
        tools.peers.Peer(
            name=name, module=module, package="the-package (1.0)", losses=losses,
            make=lambda module, shape: module,
        )
        for name, module, losses in (
            ("there", "json", ("forward_kl",)),
            ("absent", "not_there.at_all", ("forward_kl",)),
            ("another version", "json.gone", ("forward_kl",)),
            ("another loss", "json", ("jsd",)),
        )
    ]  # fmt: skip
    assert tools.peers.peer_forms(peers, shape, made) == {"there": json}
    assert made.skipped == [
        "a case: absent: needs the-package (1.0)",
        "a case: another version: No module named 'json.gone'",
    ]


def test_the_report_names_machine_versions_and_commit(report):
    assert {"cpu", "cores", "memory_bytes", "file_system"} <= report["hardware"].keys()
    assert {"python", "numpy", "fastokens", "tokenizers"} <= report["versions"].keys()
    assert report["quick"] is True
    assert len(report.get("git_commit", "0" * 40).split("+")[0]) == 40


def test_timings_keep_the_spread(report):
    for timing in report["timings"]:
        assert timing["min_s"] <= timing["median_s"] <= timing["max_s"]
        assert timing["rounds"] >= 1
        assert timing["median_cpu_s"] >= 0
        assert timing["cores_busy_with_other_programs"] >= 0


def test_a_suite_that_is_not_there_is_refused_with_what_is(tools):
    with pytest.raises(ConfigError, match=r"no suite 'nonsense'; there is: data, kernels, logits"):
        tools.main.run(tools.main.Config(suite="nonsense"))


@pytest.mark.parametrize(("flag", "suites"), [("hf", "evaluation, gen"), ("task_data", "eval")])
def test_a_model_that_a_suite_would_not_read_is_refused(tools, tmp_path, flag, suites):
    with pytest.raises(ConfigError, match=suites):
        tools.main.Config(suite="data", **{flag: tmp_path})


def test_an_unknown_case_is_refused_with_the_known_ones(tools):
    with pytest.raises(ConfigError, match=r"no case sorting.*preprocess"):
        tools.main.run(tools.main.Config(suite="data", case=("sorting",)))


def test_a_folder_without_text_is_refused_by_what_it_lacks(tools, tmp_path):
    config = tools.main.Config(suite="data", case=("pack",), quick=True, text=tmp_path)
    with pytest.raises(ConfigError, match="has no corpus/train-"):
        tools.main.run(config)


def bench(tools: SimpleNamespace, folder: Path, rounds: int = 3):
    sizes = tools.core.Sizes(rounds=rounds, quick=True)
    return tools.core.Bench("data", "a case", folder, sizes)


def test_contestants_run_in_turns_back_and_forth_and_each_is_prepared(tools, tmp_path):
    order: list[str] = []
    racers = [
        tools.core.Contestant(
            name=name, run=lambda name=name: order.append(name),
            prepare=[lambda name=name: order.append(f"prepare {name}")], most_rounds=most,
        )
        for name, most in (("a", None), ("b", 2))
    ]  # fmt: skip
    timings = bench(tools, tmp_path).race(*racers, work="nothing")
    assert order[1::2] == ["a", "b", "b", "a", "a"]
    assert order[::2] == [f"prepare {name}" for name in order[1::2]]
    assert [len(timing.seconds) for timing in timings.values()] == [3, 2]


def test_preparation_is_not_timed_and_a_contestant_may_take_its_own_time(tools, tmp_path):
    racers = [
        tools.core.Contestant(name="a", run=lambda: 1, prepare=[lambda: time.sleep(0.05)]),
        tools.core.Contestant(name="b", run=lambda: tools.core.Clocked(7.0, "made")),
    ]
    timings = bench(tools, tmp_path).race(*racers, work="nothing")
    assert timings["a"].median < 0.05
    assert timings["b"].median == 7.0
    assert timings["b"].result == "made"


@pytest.mark.parametrize(("lower", "ratio"), [(False, 2.0), (True, 0.5)])
def test_a_ratio_above_one_means_that_ours_is_better(tools, tmp_path, lower, ratio):
    made = bench(tools, tmp_path)
    made.row("m", "u", ours=6, peer=("p", 3), limit=("l", 12), lower_is_better=lower)
    row = made.rows[0].as_json()
    assert row["ratio"] == ratio
    assert row["fraction_of_limit"] == (2.0 if lower else 0.5)
    assert "error_ours" not in row


def test_a_rate_is_work_over_the_median_of_the_rounds(tools, tmp_path):
    made = bench(tools, tmp_path)
    ours = tools.core.Timing("ours", [1.0, 9.0, 2.0])
    made.rate("m", "MB/s", 10.0, ours=ours, peers=[tools.core.Timing("p", [4.0])])
    assert made.rows[0].ours == 5.0
    assert made.rows[0].peer == 2.5
    assert made.rows[0].ratio == 2.0


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ([-30.0, -20.0005], [-30.0, -20.0], True),
        ([-30.0001, -30.0], [-30.0, -30.0001], True),  # a tie of sums; 1.0 and 2.0 a character
        ([-30.0, -15.0001], [-30.0, -14.9999], True),  # a tie of what a character has
        ([-30.0, -14.9], [-30.0, -15.1], False),
        ([-30.0, -29.9], [-29.9, -30.0], False),
    ],
)
def test_predictions_agree_by_sums_and_by_characters_but_for_ties(tools, ours, theirs, same):
    mine, peer = (
        [{"prompt_hash": "", "log_likelihoods": each, "characters": [30, 15]}]
        for each in (ours, theirs)
    )
    if same:
        assert tools.evaluation.compare(mine, peer) < tools.evaluation.TOLERANCE
    else:
        with pytest.raises(tools.core.WrongResultError, match="prediction"):
            tools.evaluation.compare(mine, peer)


def test_a_wrong_result_stops_the_run(tools):
    with pytest.raises(tools.core.WrongResultError, match="fast one: bytes differ"):
        tools.core.require_equal("fast one", False, "bytes differ")


def test_the_memory_of_a_command_is_its_own_peak(tools):
    hog = bytearray(600_000_000)  # of this process, which ru_maxrss of the child would count
    code = "import time; block = bytearray(200_000_000); block[::4096] = b'x' * len(block[::4096])"
    hungry = tools.process.run_measured(
        [sys.executable, "-c", f"{code}; time.sleep(0.1); del block"]
    )
    modest = tools.process.run_measured([sys.executable, "-c", "import time; time.sleep(0.1)"])
    assert len(hog) > 0
    assert 180e6 < hungry.peak_resident - modest.peak_resident < 260e6
    assert hungry.peak_anonymous > 200e6
    assert modest.peak_resident < 100e6


def test_a_command_that_fails_has_no_figures(tools):
    code = "import sys; sys.stderr.write('broken'); sys.exit(3)"
    with pytest.raises(MiniPLMError, match=r"code 3.*broken"):
        tools.process.run_measured([sys.executable, "-c", code])


def test_a_terminated_run_leaves_no_scratch_folder(tmp_path):
    tool = PROJECT / "tools" / "benchmark.py"
    words = [sys.executable, tool, "data", "--quick", "--case", "pack", "--scratch", tmp_path]
    process = subprocess.Popen([str(word) for word in words], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*/*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list(tmp_path.glob("*/*")), "the case never made its input"
        process.terminate()
        assert process.wait(30) == 143
    finally:
        process.kill()
    assert not list(tmp_path.iterdir())
