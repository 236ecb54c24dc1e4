"""Logits of a model in training: what its loss saw, in any layout, and complete after any kill."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.config import flat_defaults, parse_flags, to_flat
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.logit_codec import Encoding, decode
from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.data.staging import exclusive
from megatron_miniplm.models.truncate import TruncationConfig
from megatron_miniplm.stages import pretrain
from megatron_miniplm.training import capture
from megatron_miniplm.training.capture import run_identity
from megatron_miniplm.training.resume import MAY_CHANGE
from tests.pool import PROJECT, RankFailedError, RankPool, kill_group
from tests.runs import PP2, TINY, TP2, curve, losses, pretrain_flags, some_slow
from tests.small_artifacts import random_instances, write_corpus

LAYOUTS = {"DP2": (2, ""), "TP2": (2, TP2), "TP2 x PP2": (4, f"{TP2} {PP2}")}
BATCH = 8
SEED = 10


def flags(corpus: Path, folder: Path, *more: str) -> list[str]:
    """20 updates of 8 instances, a checkpoint every 4, numbers stored as they are."""
    return [
        *pretrain_flags(corpus, folder / "run", *TINY, "--save-interval", "4"),
        "--cache-logits", str(folder / "store"), "--top-k", "20", "--value-bits", "32", *more,
    ]  # fmt: skip


def payloads(store: Path) -> dict[int, bytes]:
    opened = RecordStore.open(store)
    return {
        int(i): bytes(data) for i, data in zip(opened.ids, opened.read(opened.ids), strict=True)
    }


def assert_say_the_same(ours: Path, theirs: Path) -> None:
    """Two stores of one run, but for what layouts round differently."""
    expected, found = payloads(theirs), payloads(ours)
    assert found.keys() == expected.keys()
    moved = total = 0
    for row, data in found.items():
        one, other = decode(data), decode(expected[row])
        np.testing.assert_allclose(one.gold_log_prob, other.gold_log_prob, atol=2e-4)
        moved += np.setxor1d(one.ids, other.ids).size
        total += len(one)
    # Rounding, which 20 updates carry on, decides where two tokens are as likely.
    assert moved <= 2e-3 * total


@pytest.fixture(scope="module")
def captured(pool: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured")
    pool.run(flags(corpus, folder), 1)
    return folder


def test_what_is_stored_is_what_the_loss_of_every_update_saw(captured: Path, corpus: Path) -> None:
    data = Blend.open((str(corpus),), seed=SEED)
    stored = payloads(captured / "store")
    assert len(stored) == 20 * BATCH
    for update, loss in enumerate(losses(captured / "run")):
        rows = data.order.rows(update * BATCH, BATCH)
        nll = [-decode(stored[row]).gold_log_prob.mean(dtype=np.float64) for row in rows.tolist()]
        assert abs(np.mean(nll) - loss) < 1e-5  # fp32, and the log's digits
    content = RecordStore.open(captured / "store").manifest.content
    assert content["teacher_iteration"] == 20
    steps = sorted({name[7:20] for name in content["files"] if name.startswith("shards/")})
    assert steps == [f"step-{step:08d}" for step in (4, 8, 12, 16, 20)]


def test_looking_does_not_change_the_training(
    captured: Path, pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    pool.run(pretrain_flags(corpus, tmp_path / "run", *TINY), 1)
    assert losses(tmp_path / "run") == losses(captured / "run")


@pytest.mark.parametrize("name", some_slow(LAYOUTS, ["TP2 x PP2"]))
def test_layouts_store_the_same(
    name: str, captured: Path, pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    world, more = LAYOUTS[name]
    pool.run(flags(corpus, tmp_path, *more.split()), world)
    assert_say_the_same(tmp_path / "store", captured / "store")


def test_a_killed_and_resumed_run_has_a_complete_store(
    captured: Path, pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    words = flags(corpus, tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_miniplm", *words],
        env=environment, cwd=PROJECT, start_new_session=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 6:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline, "it did not get far enough in time"
        time.sleep(0.005)
    kill_group(process)
    assert not (tmp_path / "store/manifest.json").exists(), "it was killed too late"
    # As if it had been killed between the shards of the next checkpoint and the checkpoint.
    shard = next((tmp_path / "store/shards").glob("step-00000004-*"))
    beyond = shard.with_name(shard.name.replace("00000004", "00000019"))
    note = next((tmp_path / "store/journal").glob("step-00000004-*"))
    beyond.write_bytes(shard.read_bytes())
    note.with_name(note.name.replace("00000004", "00000019")).write_bytes(note.read_bytes())
    pool.run(words, 1)
    for name in ("index.npy", *RecordStore.open(captured / "store").manifest.content["files"]):
        found, expected = (folder / "store" / name for folder in (tmp_path, captured))
        assert found.read_bytes() == expected.read_bytes(), name


def test_a_run_whose_store_is_not_assembled_is_not_finished_for_overwrite_either(
    corpus: Path, tmp_path: Path
) -> None:
    words = flags(corpus, tmp_path, "--train-iters", "4", "--lr-warmup-iters", "1")
    in_the_way = tmp_path / "store/index.npy"
    in_the_way.mkdir(parents=True)
    assert main(words) == 2
    in_the_way.rmdir()
    checkpoint = tmp_path / "run/iter_0000004/manifest.json"
    (shard,) = (tmp_path / "store/shards").iterdir()
    made = [path.stat().st_mtime_ns for path in (checkpoint, shard)]
    assert main([*words, "--overwrite"]) == 0
    assert len(RecordStore.open(tmp_path / "store")) == 4 * BATCH
    assert [path.stat().st_mtime_ns for path in (checkpoint, shard)] == made
    assert main([*words, "--overwrite"]) == 0  # now it begins anew
    assert all(
        path.stat().st_mtime_ns > at for path, at in zip((checkpoint, shard), made, strict=True)
    )


def test_a_student_learns_from_a_part_of_its_teachers_run(
    captured: Path, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = str(captured / "store")
    student = ["--objective", "kd", "--teacher", "stored", "--logits-path", store, *TINY]
    student += ["--lr-warmup-iters", "0"]
    assert main(pretrain_flags(corpus, tmp_path / "all", *student, iterations=1)) == 2
    assert "`select --selector stored` makes it" in capfd.readouterr().err
    late = ["select", "--selector", "stored", "--data-path", str(corpus), "--logits-path", store]
    late += ["--first-update", "13", "--last-update", "16", "--output-prefix"]
    assert main([*late, str(tmp_path / "late")]) == 0
    data = Blend.open((str(corpus),), seed=SEED)
    rows = data.order.rows(12 * BATCH, 4 * BATCH)
    assert sorted(rows.tolist()) == Corpus.open(tmp_path / "late").ids.tolist()
    assert main(pretrain_flags(tmp_path / "late", tmp_path / "run", *student, iterations=1)) == 0
    # What a teacher at these updates thought of its data.
    said, first = payloads(captured / "store"), Blend.open((str(tmp_path / "late"),), seed=SEED)
    ids = Corpus.open(tmp_path / "late").ids[first.order.rows(0, BATCH)]
    nll = [-decode(said[i]).gold_log_prob.mean() for i in ids.tolist()]
    assert curve(tmp_path / "run")[0]["teacher loss"] == pytest.approx(np.mean(nll), abs=1e-5)


def test_each_source_of_a_blend_has_a_store_however_rare_it_is_and_where_the_run_goes_on(
    tiny_tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("often", "seldom")
    corpus, rare = (
        write_corpus(tmp_path / f"{name}.all", tiny_tokenizer, random_instances(count)).prefix
        for name, count in zip(names, (300, 40), strict=True)
    )
    mix = ("47", str(corpus), "1", str(rare))

    def filled(folder: Path, *more: str) -> list[str]:
        words = flags(corpus, folder, "--train-iters", "12", *more)
        words[words.index("--cache-logits") + 1 : words.index("--top-k")] = [
            str(folder / name) for name in names
        ]
        words[words.index("--train-data-path") + 1 : words.index("--save")] = mix
        return words

    data = Blend.open(mix, seed=SEED)
    rows = data.order.rows(0, 12 * BATCH)
    sources, own_rows = data.locate(rows)
    assert sources.sum() > 0 == sources[4 * BATCH : 8 * BATCH].sum()  # update 8 goes without
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(filled(one)) == 0
    assert main(filled(two, "--exit-interval", "10")) == 0
    assert main(filled(two, "--ckpt-step", "8")) == 0
    for number, name in enumerate(names):
        store = RecordStore.open(one / name)
        assert store.ids.tolist() == sorted(set(own_rows[sources == number].tolist()))
        for file in store.manifest.content["files"]:
            assert (two / name / file).read_bytes() == (one / name / file).read_bytes(), file
    # A student learns from both.
    student = pretrain_flags(corpus, tmp_path / "student", *TINY, iterations=1)
    student += ["--objective", "kd", "--teacher", "stored", "--lr-warmup-iters", "0"]
    student += ["--logits-path", *(str(one / name) for name in names)]
    for name, prefix in zip(names, (corpus, rare), strict=True):
        words = ["select", "--selector", "stored", "--data-path", str(prefix), "--logits-path"]
        assert main([*words, str(one / name), "--output-prefix", str(tmp_path / name)]) == 0
    parts = ["1", str(tmp_path / names[0]), "1", str(tmp_path / names[1])]
    student[student.index("--train-data-path") + 1 : student.index("--save")] = parts
    assert main(student) == 0
    heard, said = Blend.open(parts, seed=SEED), [payloads(one / name) for name in names]
    sources, own_rows = heard.locate(heard.order.rows(0, BATCH))
    ids = [int(heard.sources[s].corpus.ids[row]) for s, row in zip(sources, own_rows, strict=True)]
    nll = [-decode(said[s][i]).gold_log_prob.mean() for s, i in zip(sources, ids, strict=True)]
    teacher_loss = curve(tmp_path / "student")[0]["teacher loss"]
    assert teacher_loss == pytest.approx(np.mean(nll), abs=1e-5)
    # One store for two sources is not enough.
    few = filled(tmp_path / "few")
    del few[few.index("--top-k") - 1]
    assert main(few) == 2
    assert "is 1 folders, but --train-data-path has 2 corpora" in capfd.readouterr().err


def test_flags_of_a_store_are_refused_without_one(corpus: Path, tmp_path: Path, capfd) -> None:
    words = [*pretrain_flags(corpus, tmp_path / "run", *TINY), "--top-k", "20"]
    assert main(words) == 2
    assert "--top-k 20 has no effect without --cache-logits" in capfd.readouterr().err


def test_a_shard_is_cut_by_its_encoded_bytes_between_checkpoints_too(
    captured: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = max(map(len, payloads(captured / "store").values())) * BATCH
    monkeypatch.setattr(capture, "_SHARD_BYTES", 2 * update)
    assert main(flags(corpus, tmp_path, "--save-interval", "20")) == 0
    store = RecordStore.open(tmp_path / "store")
    files = store.manifest.content["files"]
    sizes = [fact["size"] for name, fact in files.items() if name.startswith("shards/")]
    assert len(sizes) > 4
    assert 2 * update < min(sizes[:-1])
    assert max(sizes) < 4 * update  # and the update that crosses it, and what was not yet counted
    assert payloads(tmp_path / "store") == payloads(captured / "store")


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_ranks_has_a_complete_store(
    captured: Path, pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    pool.run(flags(corpus, tmp_path, "--exit-interval", "8"), 2)
    pool.run(flags(corpus, tmp_path), 1)
    assert_say_the_same(tmp_path / "store", captured / "store")


@pytest.mark.slow
def test_over_several_epochs_the_last_update_counts_whoever_saw_an_instance_when_and_saved_how(
    pool: RankPool, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    write_corpus(small, tiny_tokenizer, random_instances(48))  # of 160 that are trained on
    one, two = tmp_path / "one", tmp_path / "two"
    pool.run(flags(small, one, "--async-save"), 1)
    pool.run(flags(small, two, "--save-interval", "20"), 2)  # a shard of each rank
    assert_say_the_same(two / "store", one / "store")
    stored = payloads(one / "store")
    assert len(stored) == 48
    data = Blend.open((str(small),), seed=SEED)
    for update in (18, 19):
        rows = data.order.rows(update * BATCH, BATCH).tolist()
        nll = [-decode(stored[row]).gold_log_prob.mean(dtype=np.float64) for row in rows]
        assert abs(np.mean(nll) - losses(one / "run")[update]) < 1e-5
    content = RecordStore.open(one / "store").manifest.content
    assert content["num_superseded"] == 160 - 48


def test_a_shard_that_one_rank_cannot_write_is_a_save_that_failed_and_is_made_up_for(
    captured: Path, pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "store/shards/step-00000004-00001.records"
    in_the_way.mkdir(parents=True)
    metrics = tmp_path / "run/metrics.jsonl"

    def clear() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (
            metrics.exists() and metrics.read_bytes().count(b"\n") >= 5
        ):
            time.sleep(0.002)
        in_the_way.rmdir()

    thread = threading.Thread(target=clear)
    thread.start()
    pool.run(flags(corpus, tmp_path), 2)
    thread.join()
    assert [path.name for path in sorted((tmp_path / "run").glob("iter_*"))] == [
        f"iter_{iteration:07d}" for iteration in (8, 12, 16, 20)
    ]
    assert len(curve(tmp_path / "run")) == 20
    assert_say_the_same(tmp_path / "store", captured / "store")


def test_an_instance_of_which_the_model_says_no_number_is_counted_and_no_other_is_lost(
    pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    rows = Blend.open((str(corpus),), seed=SEED).order.rows(0, 4 * BATCH)
    lost = int(rows[BATCH + 1])
    words = flags(corpus, tmp_path, "--objective", "poisoned", "--on-nan-skip", "1", *TP2.split())
    words[words.index("--train-iters") + 1] = "4"
    words += ["--lr-warmup-iters", "1"]
    pool.run("tests.parallel.jobs:poisoned_run", 2, words=words, row=lost, what="logits")
    store = RecordStore.open(tmp_path / "store")
    assert set(store.ids.tolist()) == set(rows.tolist()) - {lost}
    assert store.manifest.content["num_lost"] == 1


def test_a_store_is_of_one_run_alone(captured: Path, pool: RankPool, corpus: Path, tmp_path: Path):
    def refused(why: str, words: list[str]) -> None:
        with pytest.raises(RankFailedError, match=why):
            pool.run(words, 1)

    def elsewhere(store: Path, *more: str) -> list[str]:
        words = flags(corpus, tmp_path, "--save", str(tmp_path / "other"), *more)
        words[words.index("--cache-logits") + 1] = str(store)
        return words

    refused(r"store is of the run in .*/run, but a run begins", elsewhere(captured / "store"))
    refused(
        "finished already by another job: --seed is not said there and 3 here",
        elsewhere(captured / "store", "--seed=3"),
    )
    pool.run(flags(corpus, tmp_path, "--exit-interval", "4"), 1)
    shards = sorted((tmp_path / "store/shards").iterdir())
    refused(r"store is of the run in .*/run, but a run begins", elsewhere(tmp_path / "store"))
    refused("being filled by another job: --seed is", elsewhere(tmp_path / "store", "--seed=3"))
    with exclusive(tmp_path / "store/.lock", wait=False):
        refused(r"another process is writing .*/store", flags(corpus, tmp_path))
    assert sorted((tmp_path / "store/shards").iterdir()) == shards
    # Left out, the run goes on, but the store can no longer be completed.
    pool.run(pretrain_flags(corpus, tmp_path / "run", *TINY, "--exit-interval", "6"), 1)
    refused("has nothing of update 6", flags(corpus, tmp_path))


def test_a_teacher_in_training_is_its_sources_and_all_that_may_not_change() -> None:
    flags: dict[str, object] = {"lr": 1.0, "train_samples": None, "global_batch_size": 8}
    sources = {"corpus": ("c", Path("a"))}
    identity = partial(run_identity, defaults={"lr": None, "a_later_flag": []})
    before = identity(flags, sources)
    assert before == identity(flags | {"save": "x"}, {"corpus": ("c", Path("moved"))})
    assert before == identity(flags | {"a_later_flag": []}, sources)
    assert before != identity(flags | {"a_later_flag": [1]}, sources)
    assert before != identity(flags | {"lr": 2.0}, sources)
    assert before != identity(flags | {"global_batch_size": 16}, sources)
    for role in ("initial_weights", "teacher"):
        assert before != identity(flags, sources | {role: ("f", Path("b"))})
    words = ["--train-data-path", "c", "--save", "s", "--train-iters", "9", "--lr", "0.5"]
    words += ["--micro-batch-size", "1", "--global-batch-size", "1"]
    config = parse_flags(pretrain.Config, words, prog="pretrain")
    said = run_identity(to_flat(config), {}, defaults=flat_defaults(pretrain.Config))
    assert said == {"--train-iters": 9, "--global-batch-size": 1, "--lr": 0.5}
    kept = {item.name for part in (TruncationConfig, Encoding) for item in fields(part)}
    assert kept | {"cache_logits"} <= MAY_CHANGE, "a run goes on without its store"
