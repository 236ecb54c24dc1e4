"""The memory that a dry run tells is the memory that ranks then have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.models.checkpoint import latest_checkpoint
from tests.pool import RankPool
from tests.runs import INTERLEAVED, PP2, TP2, losses, pretrain_flags, some_slow
from tests.small_artifacts import flip_byte

ZERO, RECOMPUTE = "--use-distributed-optimizer", "--recompute-granularity full"
LAYOUTS = {
    "interleaved, ZeRO": (4, f"{INTERLEAVED} --bf16 {ZERO}"),
    "sequence parallel, ZeRO, untied": (
        4, f"{TP2} --sequence-parallel --bf16 {ZERO} --untie-embeddings-and-output-weights",
    ),
    "stages, recomputed": (2, f"{PP2} {RECOMPUTE} --recompute-method uniform"),
    "one process": (1, "--bf16"),
    "all, fp32": (4, f"{TP2} {PP2}"),
    "ZeRO, fp32": (2, f"{ZERO} --untie-embeddings-and-output-weights"),
    "some layers recomputed": (
        2, f"{PP2} --bf16 {RECOMPUTE} --recompute-method block --recompute-num-layers 1",
    ),
}  # fmt: skip
SLOW = ("one process", "all, fp32", "ZeRO, fp32", "some layers recomputed")
LARGE = ["--micro-batch-size", "8", "--global-batch-size", "32"]  # activations are most of it


def dry_run(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert main([*words, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", some_slow(LAYOUTS, SLOW))
def test_weights_gradients_and_optimizer_are_exact_and_the_peak_is_near(
    name: str,
    pool: RankPool,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, flags = LAYOUTS[name]
    words = pretrain_flags(corpus, tmp_path / "run", *LARGE, *flags.split())
    found = pool.run("tests.parallel.jobs:memory_of_a_run", world, words=words)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    said = dry_run(words, capsys)
    assert not (tmp_path / "run").exists()
    for rank in found:
        stage = said["stages"][rank["stage"]]
        for part in ("parameters", "weights", "gradients"):
            assert rank[part] == stage[part], part
        # With ZeRO-1, padding is no rank's state: the last share may be smaller.
        assert 0 <= stage["optimizer"] - rank["optimizer"] <= (12 * 2048 if ZERO in flags else 0)
        peak = stage["activations"] + max(stage["working"], stage["head"])
        assert 0.7 < peak / rank["peak"] < 1.2
    assert max(rank["optimizer"] for rank in found) == max(s["optimizer"] for s in said["stages"])


def test_a_run_that_is_not_done_is_told_with_its_rest_and_its_checkpoints_have_the_size_said(
    pool: RankPool, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "run"
    words = pretrain_flags(corpus, save, "--bf16", "--use-distributed-optimizer", iterations=8)
    pool.run([*words, "--exit-interval", "2"], 1)
    assert len(losses(save)) == 2
    before = {path: path.stat().st_mtime_ns for path in save.rglob("*")}
    words += ["--peak-tflops", "1", "--dry-run-mfu", "0.5"]
    said = dry_run(words, capsys)
    assert before == {path: path.stat().st_mtime_ns for path in save.rglob("*")}
    assert (said["iterations"], said["done_iterations"]) == (8, 2)
    assert said["seconds"] == pytest.approx(said["flops"] * 6 / 8 / 0.5e12)
    folder = latest_checkpoint(save)
    assert folder is not None
    real = sum(path.stat().st_size for path in folder.iterdir())
    assert said["checkpoint"] < real < said["checkpoint"] + 400_000  # names, places, zip headers

    flip_byte(max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size), 5000)
    assert main([*words, "--dry-run"]) == 2
    assert "nothing was loaded" in capsys.readouterr().err


def test_rest_of_a_run_that_counts_samples_is_told_in_updates_of_their_new_size(
    pool: RankPool, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = pretrain_flags(corpus, tmp_path / "run")
    at = words.index("--train-iters")
    words[at : at + 2] = ["--train-samples", "160"]
    pool.run([*words, "--exit-interval", "2"], 1)
    more = ["--global-batch-size", "16", "--peak-tflops", "1", "--dry-run-mfu", "0.5"]
    said = dry_run([*words, *more], capsys)
    assert (said["iterations"], said["done_iterations"], said["samples"]) == (2 + 9, 2, 160)
    assert said["seconds"] == pytest.approx(said["flops"] * 144 / 160 / 0.5e12)


def test_teacher_adds_its_weights_and_hidden_states_and_a_damaged_one_is_refused(
    model: Path, big_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = pretrain_flags(big_corpus, tmp_path / "run", "--objective", "kd", "--teacher", "online")
    said = dry_run([*words, "--teacher-load", str(model)], capsys)
    (stage,) = said["stages"]
    width, seq_length, micro_batches = 32, 12, 4
    assert stage["teacher_hidden"] == micro_batches * 2 * seq_length * width * 4
    assert stage["teacher_weights"] == 4 * (512 * width + 2 * (
        4 * width * width + 3 * width + 3 * width * 64 + 2 * width
    ) + width)  # fmt: skip
    assert said["teacher_flops"] > 0
    folder = latest_checkpoint(model)
    assert folder is not None
    shard = next(folder.glob("*.distcp"))
    flip_byte(shard, 5000)
    try:
        assert main([*words, "--teacher-load", str(model), "--dry-run"]) == 2
        assert shard.name in capsys.readouterr().err
    finally:
        flip_byte(shard, 5000)
