"""A run that learns from a store: one curve in every layout, and that of an online teacher."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_miniplm.core.errors import LineageError
from megatron_miniplm.core.manifest import read_json
from tests.parallel.test_distillation import assert_same_curve
from tests.pool import RankFailedError, RankPool
from tests.runs import PP2, TINY, TP2, curve, learned, pretrain_flags, some_slow

EVERYTHING = ("--truncate", "none", "--value-bits", "32")
LAYOUTS = {
    "TP2 x PP2": (4, f"{TP2} {PP2}"),
    "DP2, micro-batches of one": (2, "--micro-batch-size 1"),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "micro-batches of eight": (1, "--micro-batch-size 8"),
}
SLOW = ("TP2", "PP2", "micro-batches of eight")
PD = (
    "--kd-alpha", "0.9", "--kd-alpha-schedule", "wsd", "--lr-decay-style", "WSD",
    "--kd-temperature", "2", "--kd-student-temperature", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher(pool: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, trained a little, whose distributions are no longer flat."""
    save = tmp_path_factory.mktemp("teacher") / "run"
    wild = ("--init-method-std", "0.1")
    pool.run(pretrain_flags(corpus, save, *TINY, *wild, iterations=5), 1)
    return save


@pytest.fixture(scope="module")
def stores(
    pool: RankPool, corpus: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What the teacher says: its likeliest tokens, and all of them."""
    root = tmp_path_factory.mktemp("stores")
    for name, more in {
        "likeliest": ("--top-k", "40", "--kd-temperatures", "2"),
        "all": EVERYTHING,
    }.items():
        words = ["cache-logits", "--data-path", str(corpus), "--load", str(teacher)]
        pool.run([*words, "--output", str(root / name), "--micro-batch-size", "32", *more], 1)
    return {name: root / name for name in ("likeliest", "all")}


def flags(corpus: Path, save: Path, store: Path, *more: str, **kwargs) -> list[str]:
    return pretrain_flags(
        corpus, save, "--objective", "kd", "--teacher", "stored", "--logits-path", str(store),
        *more, **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(pool: RankPool, corpus: Path, stores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process."""
    save = tmp_path_factory.mktemp("alone") / "run"
    pool.run(flags(corpus, save, stores["likeliest"], *PD), 1)
    return save


@pytest.mark.parametrize("layout", some_slow(LAYOUTS, SLOW))
def test_layout_gives_the_curve_of_one_process(
    layout: str, alone: Path, stores, corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    world, more = LAYOUTS[layout]
    pool.run(flags(corpus, tmp_path / "run", stores["likeliest"], *PD, *more.split()), world)
    assert_same_curve(curve(tmp_path / "run"), curve(alone))


def test_alpha_follows_its_schedule_and_the_student_the_teacher(alone: Path) -> None:
    rows = curve(alone)
    # The learning rate's warm-up is 4 of 20 updates, its decay 2; an update's alpha is that before.
    expected = [0, 0.225, 0.45, 0.675, *[0.9] * 15, 0.45]
    assert [row["kd alpha"] for row in rows] == pytest.approx(expected)
    assert learned([row["kd loss"] for row in rows]) > 0.02
    assert all(0 < row["kept mass"] < 1 for row in rows)


def test_a_run_that_stopped_goes_on_bit_for_bit(
    alone: Path, stores, corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    words = flags(corpus, tmp_path / "run", stores["likeliest"], *PD)
    pool.run([*words, "--exit-interval", "7"], 1)
    assert len(curve(tmp_path / "run")) == 7
    moved = tmp_path / "elsewhere"
    shutil.copytree(stores["likeliest"], moved)
    pool.run(flags(corpus, tmp_path / "run", moved, *PD), 1)
    for name in ("lm loss", "kd loss", "kd alpha", "teacher loss", "grad norm"):
        found, expected = ([row[name] for row in curve(run)] for run in (tmp_path / "run", alone))
        assert found == expected, name
    parents = read_json(tmp_path / "run" / "iter_0000020" / "manifest.json")["parents"]
    assert set(parents) == {"corpus", "logits"}
    other = flags(corpus, tmp_path / "run", stores["all"], *PD)
    with pytest.raises(RankFailedError, match="was trained with logits") as caught:
        pool.run(other, 1)
    assert LineageError.__name__ in str(caught.value)


@pytest.mark.parametrize("method", ["fixed", "adakd-h"])
def test_all_logits_stored_teach_as_the_teacher_itself(
    method: str, teacher: Path, stores, corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    adaptive = ["--kd-temperature-method", method]
    tail = ["--kd-tail", "renormalize"] * (method != "fixed")
    pool.run(flags(corpus, tmp_path / "stored", stores["all"], *adaptive, *tail, iterations=8), 1)
    online = ["--objective", "kd", "--teacher", "online", "--teacher-load", str(teacher)]
    words = pretrain_flags(corpus, tmp_path / "online", *online, *adaptive, iterations=8)
    pool.run([*words, *TP2.split()], 2)
    rows = zip(curve(tmp_path / "stored"), curve(tmp_path / "online"), strict=True)
    for found, expected in rows:
        for name in ("lm loss", "kd loss", "teacher loss", "top-1 agreement"):
            assert found[name] == pytest.approx(expected[name], abs=2e-5), name


def test_a_rehearsal_reads_the_store_and_counts_no_teacher(
    stores, corpus: Path, pool: RankPool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pool.run([*flags(corpus, tmp_path / "run", stores["likeliest"], *PD), "--dry-run"], 1)
    said = capfd.readouterr().out
    assert "teacher" not in said
    assert not (tmp_path / "run").exists()
