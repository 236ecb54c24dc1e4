"""MiniLLM runs: the same curve in every layout and after a stop, and a student that gets nearer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.manifest import read_json
from tests.parallel.test_distillation import STUDENT, TEACHER, save_model
from tests.pool import RankFailedError, RankPool
from tests.runs import PP2, TP2, curve, pretrain_flags

pytest.importorskip("transformers", reason="the [hf] extra is not installed")

TOLERANCE = 1e-5  # fp32 sums in another order; a draw that fell otherwise would show as 1e-2
UPDATES = 8


@pytest.fixture(scope="module")
def models(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    shapes = {"student": STUDENT, "teacher": TEACHER}
    return {
        name: save_model(root / name, tiny_tokenizer, seed, shape)
        for seed, (name, shape) in enumerate(shapes.items(), 1)
    }


def flags(corpus: Path, save: Path, models: dict[str, Path], *more: str) -> list[str]:
    """A student that is given 40 of 65 tokens; prompts of the corpus contain the separator."""
    _, *words = pretrain_flags(
        corpus, save, "--rotary-base", "10000", "--max-position-embeddings", "128",
        "--prompt-length", "40", "--teacher-load", str(models["teacher"]),
        "--load", str(models["student"]), "--finetune", *more, iterations=UPDATES,
    )  # fmt: skip
    return ["minillm", *words]


@pytest.fixture(scope="module")
def whole(
    models, corpus: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of one process, uninterrupted."""
    save = tmp_path_factory.mktemp("whole") / "run"
    pool.run(flags(corpus, save, models), 1)
    return save


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) == UPDATES
    for name in ("lm loss", "reverse kl", "policy loss", "reward", "importance", "importance max"):
        worst = max(abs(a[name] - b[name]) for a, b in zip(found, expected, strict=True))
        print(f"{name}: largest difference {worst:.1e}")
        assert worst <= TOLERANCE, name
    for a, b in zip(found, expected, strict=True):
        assert a["response length"] == b["response length"]
        assert a["grad norm"] == pytest.approx(b["grad norm"], rel=1e-4)


def test_a_run_says_what_was_written_and_what_it_was_worth(whole: Path) -> None:
    for row in curve(whole):
        assert 0 < row["importance"] <= row["importance max"] <= 1 / 0.8 + 1e-5
        assert 0 < row["response length"] <= 25
        assert row["reverse kl"] > 0 > row["reward"]
    manifest = read_json(whole / f"iter_{UPDATES:07d}" / "manifest.json")
    assert set(manifest["parents"]) == {"corpus", "teacher", "initial_weights"}


@pytest.mark.parametrize(
    ("world", "more"),
    [(2, TP2), (2, ""), (1, "--micro-batch-size 4 --rollout-batch-size 3")],
    ids=["TP2", "DP2", "other batches"],
)
def test_layout_and_batches_do_not_matter(
    world: int, more: str, whole: Path, models, corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    pool.run(flags(corpus, tmp_path / "run", models, *more.split()), world)
    assert_same(curve(tmp_path / "run"), curve(whole))


def test_a_stopped_run_goes_on_bit_for_bit_under_either_name(
    whole: Path, models, corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    pool.run(flags(corpus, save, models, "--exit-interval", "3"), 1)
    assert len(curve(save)) == 3
    _, *words = flags(corpus, save, models)
    pool.run(["pretrain", "--objective", "minillm", "--teacher", "online", *words], 1)
    for name in ("lm loss", "reverse kl", "policy loss", "reward", "grad norm"):
        assert [row[name] for row in curve(save)] == [row[name] for row in curve(whole)], name
