"""What is not a number stops before the update, or is left out, and says where it came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import SampleOrder
from megatron_miniplm.models.checkpoint import latest_checkpoint
from tests.pool import RankFailedError, RankPool
from tests.runs import TINY, curve, pretrain_flags

JOB = "tests.parallel.jobs:poisoned_run"
AT = 3  # the update that fails, counted from 1


@pytest.fixture(scope="module")
def batch(corpus: Path) -> np.ndarray:
    """Rows of the global batch of update `AT`."""
    return SampleOrder(len(Corpus.open(corpus)), seed=10).rows(8 * (AT - 1), 8)


def flags(corpus: Path, save: Path, *more: str) -> list[str]:
    return pretrain_flags(corpus, save, "--objective", "poisoned", *more, iterations=6)


@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
def test_run_stops_before_the_update_and_names_rank_rows_and_parameter(
    what: str, batch: np.ndarray, corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    row = int(batch[2])  # the first micro-batch of rank 1
    # The last save is under way when the error comes.
    words = flags(corpus, tmp_path / "run", "--save-interval", "1", "--async-save")
    with pytest.raises(RankFailedError) as caught:
        pool.run(JOB, 2, words=words, row=row, what=what)
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / f"iter_{AT - 1:07d}"
    text = str(caught.value)
    assert "NotFiniteError" in text
    assert "stopped before the update" in text
    if what == "loss":
        said = text.partition("rank 1: lm loss is nan on rows ")[2].partition(":")[0]
        assert str(row) in said.split(", ")
        assert "rank 0:" not in text.partition("NotFiniteError: ")[2]
    elif what == "weight":
        assert "rank 1: lm loss is nan" in text
        assert "the weight embedding.word_embeddings.weight (of 1 parameters) is not finite" in text
        return  # skipping does not heal it
    else:  # they are summed over ranks by now, so both have it
        assert "rank 0: the gradient of embedding.word_embeddings.weight (of" in text
        assert "rank 1: the gradient of embedding.word_embeddings.weight (of" in text
    # What the message advises is accepted.
    pool.run(JOB, 2, words=[*words, "--on-nan-skip", "1"], row=row, what=what)
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "iter_0000006"


ONE_STAGE, TWO_STAGES = (1, ""), (2, "--pipeline-model-parallel-size 2 --bf16")


@pytest.mark.parametrize(("what", "layout"), [("loss", TWO_STAGES), ("gradient", ONE_STAGE)])
def test_an_update_is_left_out_and_the_rest_goes_on(
    what: str,
    layout: tuple[int, str],
    batch: np.ndarray,
    corpus: Path,
    pool: RankPool,
    tmp_path: Path,
) -> None:
    world, more = layout
    words = flags(corpus, tmp_path / "run", "--on-nan-skip", "1", *more.split())
    pool.run(JOB, world, words=words, row=int(batch[0]), what=what)
    rows = curve(tmp_path / "run")
    assert [row.get("skipped iterations", 0) for row in rows] == [0, 0, 1, 0, 0, 0]
    assert ["lm loss" in row for row in rows] == [True, True, False, True, True, True]
    # The schedule waited: the next update has the rate that this one would have had.
    rates = [row["learning rate"] for row in rows]
    assert rates[AT] == rates[AT - 1] > rates[AT - 2]
    assert all(np.isfinite(row["grad norm"]) for row in rows if "grad norm" in row)


def test_what_was_learned_before_a_later_epoch_is_left_out_counts_for_the_schedule(
    batch: np.ndarray, corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    words = flags(corpus, tmp_path / "run", *TINY, "--on-nan-skip", "1")
    pool.run(JOB, 1, words=words, row=int(batch[0]), what="loss", epochs=2)
    rows = curve(tmp_path / "run")
    assert all("lm loss" in row and not row.get("skipped iterations") for row in rows)
    assert rows[AT]["learning rate"] > rows[AT - 1]["learning rate"]


def test_a_loss_spike_is_left_out(corpus: Path, pool: RankPool, tmp_path: Path) -> None:
    at = 80  # the window is half full by then
    rows = SampleOrder(len(Corpus.open(corpus)), seed=10).rows(8 * (at - 1), 8)
    words = pretrain_flags(
        corpus, tmp_path / "run", *TINY, "--objective", "poisoned", "--on-loss-spike", "skip",
        iterations=at + 5,
    )  # fmt: skip
    pool.run(JOB, 2, words=words, row=int(rows[2]), what="spike")
    found = curve(tmp_path / "run")
    assert [row["iteration"] for row in found if row.get("skipped iterations")] == [at]


def test_too_many_in_a_row_stop_the_run(corpus: Path, pool: RankPool, tmp_path: Path) -> None:
    words = flags(corpus, tmp_path / "run", "--on-nan-skip", "2")
    with pytest.raises(RankFailedError, match="after 2 updates that were left out"):
        pool.run(JOB, 1, words=words, row=None, what="loss")
    assert len(curve(tmp_path / "run")) == 2
