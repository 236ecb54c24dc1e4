"""Fixtures of the parallel suite: the pool of ranks, a small corpus, and runs on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_miniplm.__main__ import main
from tests.pool import PROJECT, RankPool

SEQ_LENGTH = 64


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four ranks, started when first needed."""
    ranks = RankPool(4, tmp_path_factory.mktemp("pool"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Prefix of a corpus of this project's own sources: some 2,000 instances of 65 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "text.jsonl").open("w") as file:
        for path in sorted((PROJECT / "megatron_miniplm").rglob("*.py")):
            record = {"text": path.read_text(), "domain": path.parent.name}
            file.write(json.dumps(record) + "\n")
    code = main([
        "preprocess", "--input", str(folder / "text.jsonl"), "--json-keys", "text",
        "--domain-key", "domain", "--tokenizer-model", str(tiny_tokenizer),
        "--seq-length", str(SEQ_LENGTH), "--output-prefix", str(folder / "code"),
    ])  # fmt: skip
    assert code == 0
    return folder / "code"


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


def curve(save: Path) -> list[dict]:
    """Rows of metrics.jsonl that belong to updates."""
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "validation" not in row]


def losses(save: Path) -> list[float]:
    """The loss of every update."""
    return [row["lm loss"] for row in curve(save)]
