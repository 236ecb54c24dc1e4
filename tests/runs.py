"""Command lines of small runs, and what to read from them: shared by the suites."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron_miniplm.data.scores import Scores

TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
INTERLEAVED = f"{PP2} --num-virtual-stages-per-pipeline-rank 2"

SHAPE = [
    "--num-layers", "4", "--hidden-size", "64", "--ffn-hidden-size", "176",
    "--num-attention-heads", "4", "--num-query-groups", "2",
]  # fmt: skip


def pretrain_flags(corpus: Path, save: Path, *more: str, iterations: int = 20) -> list[str]:
    """A small run: 20 updates of 8 instances, learning rate 6e-4 with warm-up, fp32."""
    return [
        "pretrain", "--train-data-path", str(corpus), "--save", str(save), *SHAPE,
        "--micro-batch-size", "2", "--global-batch-size", "8", "--train-iters", str(iterations),
        "--lr", "6e-4", "--lr-warmup-iters", "4", "--log-interval", "1", *more,
    ]  # fmt: skip


def some_slow(names: Iterable[str], slow: Collection[str]) -> list[Any]:
    """Values of a parametrised test, of which those in `slow` only run with all tests."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in names]


def curve(save: Path) -> list[dict]:
    """Rows of metrics.jsonl that belong to updates."""
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "validation" not in row]


def losses(save: Path) -> list[float]:
    """The loss of every update."""
    return [row["lm loss"] for row in curve(save)]


def learned(losses: list[float]) -> float:
    """By how much the last losses are below the first ones: single batches are too noisy."""
    quarter = len(losses) // 4
    return (sum(losses[:quarter]) - sum(losses[-quarter:])) / quarter


TINY = [
    "--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "64",
    "--num-attention-heads", "2",
]  # fmt: skip


def score_flags(corpus: Path, model: Path, output: Path, *more: str) -> list[str]:
    """Score every instance of `corpus` in micro-batches of 128."""
    return [
        "score", "--data-path", str(corpus), "--load", str(model), "--output", str(output),
        "--micro-batch-size", "128", *more,
    ]  # fmt: skip


def assert_same_files(found: Path, expected: Path) -> None:
    """Two finished scores folders hold the same bytes."""
    for name in ("sum_nll.npy", "num_tokens.npy"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    assert Scores.open(found).fingerprint == Scores.open(expected).fingerprint
