"""``evaluate --checkpoints``: what a model became over a run, and a law fitted to that."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import CheckpointError, DataError
from megatron_miniplm.evaluation.checkpoint_curves import find_checkpoints
from megatron_miniplm.evaluation.run_curves import read_history, with_evaluations
from megatron_miniplm.evaluation.scaling_report import ScalingConfig, curves_of
from tests.pool import RankPool
from tests.runs import TINY, pretrain_flags

ITERATIONS = [2, 4, 6, 8, 10, 12]


@pytest.fixture(scope="module")
def run(pool: RankPool, big_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("curves") / "run"
    flags = pretrain_flags(big_corpus, save, *TINY, "--save-interval", "2", iterations=12)
    pool.run(flags, 1)
    return save


def flags(big_corpus: Path, output: Path, *more: str) -> list[str]:
    return [
        "evaluate", "--lm-loss", f"held={big_corpus}", str(big_corpus), "--max-instances", "60",
        "--output", str(output), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(
    run: Path, big_corpus: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("evaluated")
    pool.run(flags(big_corpus, output, "--checkpoints", str(run)), 2)
    return output


def test_a_curve_has_the_losses_of_every_checkpoint_by_what_it_cost(
    run: Path, evaluated: Path, big_corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    (curve,) = json.loads((evaluated / "results.json").read_text())["curves"]
    points = curve["points"]
    assert [point["iteration"] for point in points] == ITERATIONS
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tokens = {row["iteration"]: row["consumed_tokens"] for row in rows}
    assert [point["tokens"] for point in points] == [tokens[at] for at in ITERATIONS]
    expected = [6 * curve["parameters"] * point["tokens"] for point in points]
    assert [point["flops"] for point in points] == pytest.approx(expected)
    pool.run(flags(big_corpus, tmp_path, "--load", str(run)), 1)
    alone = json.loads((tmp_path / "results.json").read_text())
    assert points[-1]["model"] == alone["model"]
    assert points[-1]["lm_loss"]["held"] == points[-1]["lm_loss"][str(big_corpus)]
    found, right = points[-1]["lm_loss"]["held"], alone["lm_loss"]["held"]
    assert found["instance_mean"] == pytest.approx(right["instance_mean"], rel=1e-6)
    with (evaluated / "curves.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row["set"] == "held"]
    assert [float(row["instance_mean"]) for row in table] == [
        point["lm_loss"]["held"]["instance_mean"] for point in points
    ]


def test_what_was_found_is_kept_until_all_is_and_misfits_are_refused_before_the_first(
    run: Path, evaluated: Path, big_corpus: Path, tmp_path: Path
) -> None:
    copy, output = tmp_path / "run", tmp_path / "results"
    shutil.copytree(run, copy)
    words = flags(big_corpus, output, "--checkpoints", f"{copy}/iter_000001*")

    def spoiled(path: Path, change: Callable[[bytes], bytes]) -> int:
        """What the command says while a file is another, which is put right after that."""
        right = path.read_bytes()
        path.write_bytes(change(right))
        try:
            return main(words)
        finally:
            path.write_bytes(right)

    first, last = (copy / f"iter_{at:07d}" for at in (10, 12))
    weights = max(last.iterdir(), key=lambda path: path.stat().st_size).name
    trained_with = json.loads((last / "manifest.json").read_text())["content"]
    print_ = trained_with["tokenizer_fingerprint"].encode()
    assert spoiled(copy / "metrics.jsonl", lambda _: b"") != 0
    assert spoiled(last / "manifest.json", lambda text: text.replace(print_, b"other")) != 0
    assert not output.exists(), "nothing was evaluated"
    assert spoiled(last / weights, lambda data: data[:-1]) != 0
    assert [path.name for path in output.iterdir()] == ["points.json"]
    assert spoiled(first / weights, lambda data: data[:-1]) == 0, "it is not read again"
    assert sorted(path.name for path in output.iterdir()) == ["curves.csv", "results.json"]
    (curve,) = json.loads((output / "results.json").read_text())["curves"]
    (whole,) = json.loads((evaluated / "results.json").read_text())["curves"]
    for point, other in zip(curve["points"], whole["points"][-2:], strict=True):
        found, right = (each["lm_loss"]["held"]["instance_mean"] for each in (point, other))
        assert found == pytest.approx(right, rel=1e-6)
        assert point["tokens"] == other["tokens"]


@pytest.mark.slow  # 200 refits
def test_a_scaling_law_is_fitted_to_the_curve_of_a_set(
    run: Path, evaluated: Path, tmp_path: Path
) -> None:
    code = main([
        "report", "--runs", str(run), "--evaluations", str(evaluated), "--scaling-law",
        "--scaling-loss", "held", "--output", str(tmp_path),
    ])  # fmt: skip
    assert code == 0
    law = json.loads((tmp_path / "scaling_law.json").read_text())
    assert law["loss"] == "held"
    assert law["curves"][0]["points"] == len(ITERATIONS)


def test_evaluations_are_those_of_the_run_and_have_names_of_their_own(
    run: Path, evaluated: Path, tmp_path: Path
) -> None:
    history = read_history(run, "run")
    assert "held" in with_evaluations(history, run, [evaluated]).validations
    assert "held" not in with_evaluations(history, tmp_path, [evaluated]).validations
    with pytest.raises(DataError, match="two validations 'held'"):
        with_evaluations(history, run, [evaluated, evaluated])
    at, losses = with_evaluations(history, run, [evaluated]).validations["held"]
    assert at.tolist() == ITERATIONS
    assert np.isfinite(losses).all()
    (curve,) = json.loads((evaluated / "results.json").read_text())["curves"]
    scaling = ScalingConfig(scaling_law=True, scaling_loss="held", scaling_skip=0)
    fitted = with_evaluations(history, run, [evaluated])
    (found,) = curves_of([fitted], [curve["parameters"]], scaling)
    assert found.flops.tolist() == [point["flops"] for point in curve["points"]]


def test_checkpoints_are_found_by_run_by_iteration_and_by_glob(run: Path, tmp_path: Path) -> None:
    every = {run: [run / f"iter_{at:07d}" for at in ITERATIONS]}
    assert find_checkpoints([str(run)]) == every
    assert find_checkpoints([f"{run}/iter_*", str(run.parent / "*")]) == every
    assert find_checkpoints([f"{run}/iter_000001*"]) == {run: every[run][-2:]}
    with pytest.raises(CheckpointError, match="matches no complete checkpoint"):
        find_checkpoints([str(tmp_path)])
