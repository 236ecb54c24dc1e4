"""A run that learns from a store: one curve in every layout, and that of an online teacher."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import LineageError
from megatron_miniplm.core.manifest import read_json
from megatron_miniplm.models.checkpoint import latest_checkpoint
from tests.parallel.test_distillation import assert_same_curve
from tests.parallel.test_estimate import dry_run
from tests.pool import RankFailedError, RankPool
from tests.runs import INTERLEAVED, PP2, TINY, TP2, curve, learned, pretrain_flags, some_slow
from tests.small_artifacts import flip_byte

EVERYTHING = ("--truncate", "none", "--value-bits", "32")
LAYOUTS = {
    "TP2 x PP2": (4, f"{TP2} {PP2}"),
    "DP2, micro-batches of one": (2, "--micro-batch-size 1"),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "PP2, interleaved": (2, INTERLEAVED),
    "micro-batches of eight": (1, "--micro-batch-size 8"),
}
METHODS = ("fixed", "adakd-h")
SLOW = ("TP2", "PP2", "PP2, interleaved", "micro-batches of eight")
PD = (
    "--kd-alpha", "0.9", "--kd-alpha-schedule", "wsd", "--lr-decay-style", "WSD",
    "--kd-temperature", "2", "--kd-student-temperature", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher(pool: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, trained a little, whose distributions are no longer flat."""
    save = tmp_path_factory.mktemp("teacher") / "run"
    pool.run(pretrain_flags(corpus, save, *TINY, "--lr", "1e-2", iterations=40), 1)
    return save


@pytest.fixture(scope="module")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subset that a run of 20 updates goes through more than once."""
    folder = tmp_path_factory.mktemp("data")
    words = ["split", "--data-path", str(corpus), "--reference-fraction", "0.05", "--seed", "1"]
    words += ["--reference-prefix", str(folder / "few"), "--pool-prefix", str(folder / "pool")]
    assert main(words) == 0
    return folder / "few"


@pytest.fixture(scope="module")
def stores(
    pool: RankPool, data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What the teacher says: its likeliest tokens, and all of them."""
    root = tmp_path_factory.mktemp("stores")
    for name, more in {
        "likeliest": ("--top-k", "40", "--kd-temperatures", "2"),
        "all": EVERYTHING,
        "hidden": ("--what", "hidden"),
        "hidden of 8 bits": ("--what", "hidden", "--hidden-bits", "8"),
    }.items():
        words = ["cache-logits", "--data-path", str(data), "--load", str(teacher)]
        pool.run([*words, "--output", str(root / name), "--micro-batch-size", "32", *more], 1)
    return {path.name: path for path in root.iterdir()}


def flags(data: Path, save: Path, store: Path, *more: str, **kwargs) -> list[str]:
    return pretrain_flags(
        data, save, "--objective", "kd", "--teacher", "stored", "--logits-path", str(store),
        *more, **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(pool: RankPool, data: Path, stores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process."""
    save = tmp_path_factory.mktemp("alone") / "run"
    pool.run(flags(data, save, stores["likeliest"], *PD), 1)
    return save


@pytest.mark.parametrize("layout", some_slow(LAYOUTS, SLOW))
def test_layout_gives_the_curve_of_one_process(
    layout: str, alone: Path, stores, data: Path, pool: RankPool, tmp_path: Path
) -> None:
    world, more = LAYOUTS[layout]
    pool.run(flags(data, tmp_path / "run", stores["likeliest"], *PD, *more.split()), world)
    assert_same_curve(curve(tmp_path / "run"), curve(alone))


def test_alpha_follows_its_schedule_and_the_student_the_teacher(alone: Path) -> None:
    rows = curve(alone)
    # The learning rate's warm-up is 4 of 20 updates, its decay 2.
    expected = [0, 0.225, 0.45, 0.675, *[0.9] * 15, 0.45]
    assert [row["kd alpha"] for row in rows] == pytest.approx(expected)
    assert learned([row["kd loss"] for row in rows]) > 0.02
    assert all(0 < row["kept mass"] < 1 for row in rows)


def test_a_run_that_stopped_goes_on_bit_for_bit(
    alone: Path, stores, data: Path, pool: RankPool, tmp_path: Path
) -> None:
    words = flags(data, tmp_path / "run", stores["likeliest"], *PD)
    pool.run([*words, "--exit-interval", "7"], 1)
    assert len(curve(tmp_path / "run")) == 7
    moved = tmp_path / "elsewhere"
    shutil.copytree(stores["likeliest"], moved)
    pool.run(flags(data, tmp_path / "run", moved, *PD), 1)
    for name in ("lm loss", "kd loss", "kd alpha", "teacher loss", "grad norm"):
        found, expected = ([row[name] for row in curve(run)] for run in (tmp_path / "run", alone))
        assert found == expected, name
    parents = read_json(tmp_path / "run" / "iter_0000020" / "manifest.json")["parents"]
    assert set(parents) == {"corpus", "logits"}
    other = flags(data, tmp_path / "run", stores["all"], *PD, "--kd-temperature", "1")
    with pytest.raises(RankFailedError, match="was trained with logits") as caught:
        pool.run(other, 1)
    assert LineageError.__name__ in str(caught.value)


@pytest.fixture(scope="module")
def online(
    pool: RankPool, data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Runs beside the teacher itself, by the method of their temperature."""
    root = tmp_path_factory.mktemp("online")
    words = ("--objective", "kd", "--teacher", "online", "--teacher-load", str(teacher))
    for method in METHODS:
        more = (*words, "--kd-temperature-method", method, *TP2.split())
        pool.run(pretrain_flags(data, root / method, *more, iterations=8), 2)
    return {method: root / method for method in METHODS}


@pytest.mark.parametrize(
    ("what", "method", "layout"),
    [
        ("all", "fixed", ""),
        ("hidden", "adakd-h", TP2),
        pytest.param("all", "adakd-h", "", marks=pytest.mark.slow),
        pytest.param("hidden", "fixed", TP2, marks=pytest.mark.slow),
        pytest.param("hidden", "fixed", PP2, marks=pytest.mark.slow),
        pytest.param("hidden of 8 bits", "fixed", PP2, marks=pytest.mark.slow),
    ],
)
def test_all_logits_stored_teach_as_the_teacher_itself(
    what: str, method: str, layout: str, online, stores, data: Path, pool: RankPool, tmp_path: Path
) -> None:
    more = ["--kd-temperature-method", method, *layout.split()]
    if what == "all" and method != "fixed":
        more += ["--kd-tail", "renormalize"]
    words = flags(data, tmp_path / "run", stores[what], *more, iterations=8)
    pool.run(words, 2 if layout else 1)
    # Hidden states are stored in bf16, or with 4 significant bits.
    most = {"all": 2e-5, "hidden": 2e-3, "hidden of 8 bits": 2e-2}[what]
    for found, expected in zip(curve(tmp_path / "run"), curve(online[method]), strict=True):
        for name in ("lm loss", "kd loss", "teacher loss"):
            assert found[name] == pytest.approx(expected[name], abs=most), name


def test_a_rehearsal_reads_the_store_and_counts_no_teacher(
    stores, data: Path, pool: RankPool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pool.run([*flags(data, tmp_path / "run", stores["likeliest"], *PD), "--dry-run"], 1)
    said = capfd.readouterr().out
    assert "teacher" not in said
    assert not (tmp_path / "run").exists()


def test_memory_of_a_rehearsal_has_matrix_and_signals_and_a_damaged_matrix_is_refused(
    stores,
    teacher: Path,
    data: Path,
    pool: RankPool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seq_length, vocab, width, taus = 64, 512, 32, 1

    def said(store: str) -> tuple[int, int]:
        found = dry_run(flags(data, tmp_path / "run", stores[store], *PD), capsys)
        (stage,) = found["stages"]
        return stage["teacher_weights"], stage["teacher_hidden"]

    assert said("likeliest") == (0, 2 * seq_length * (16 * 40 + 4 * (4 + taus)))
    states = 2 * width + 2 * 4 * width
    assert said("hidden") == (4 * vocab * width, 2 * seq_length * states)
    folder = latest_checkpoint(teacher)
    assert folder is not None
    words = flags(data, tmp_path / "run", stores["hidden"], *PD)
    shard = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    flip_byte(shard, 5000)
    try:
        assert main([*words, "--dry-run"]) == 2
        assert shard.name in capsys.readouterr().err
        with pytest.raises(RankFailedError, match=re.escape(shard.name)):
            pool.run(words, 1)
    finally:
        flip_byte(shard, 5000)
