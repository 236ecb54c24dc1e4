"""A proxy is trained to one curve in every layout, goes on bit for bit, and predicts alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.manifest import read_json
from megatron_miniplm.data.corpus import Corpus
from tests.pool import RankFailedError, RankPool
from tests.runs import INTERLEAVED, PP2, TP2, curve, pretrain_flags, some_slow
from tests.small_artifacts import write_scores

TOLERANCE = 1e-5  # fp32 sums in another order, 20 updates
LAYOUTS = {
    "TP2 x PP2, sequence parallel": (4, f"{TP2} {PP2} --sequence-parallel"),
    "DP2, micro-batches of one, ZeRO-1": (
        2, "--micro-batch-size 1 --use-distributed-optimizer --overlap-grad-reduce"
    ),
    "TP2": (2, TP2),
    "PP2, interleaved": (2, INTERLEAVED),
    "PP2, overlapped": (2, f"{PP2} --overlap-grad-reduce"),
}  # fmt: skip
SLOW = ("TP2", "PP2, interleaved", "PP2, overlapped")


@pytest.fixture(scope="module")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sample of the corpus, most of it to train on, and scores of the sample.

    Their difference grows with the share of instances' first 64 tokens that are frequent ones, so a
    linear head on mean hidden states can tell it.
    """
    folder = tmp_path_factory.mktemp("proxy")
    sample, train, rest = folder / "sample", folder / "train", folder / "rest"
    draw = ["select", "--data-path", str(corpus), "--selector", "random"]
    assert main([*draw, "--selection-ratio", "0.4", "--output-prefix", str(sample)]) == 0
    hold = ["split", "--data-path", str(sample), "--reference-fraction", "0.25"]
    hold += ["--reference-prefix", str(rest), "--pool-prefix", str(train)]
    assert main(hold) == 0
    opened = Corpus.open(sample)
    tokens = [opened.tokens(row)[:-1] for row in range(len(opened))]
    frequent = np.argsort(np.bincount(np.concatenate(tokens)))[-12:]
    share = np.array([np.isin(each, frequent).mean() for each in tokens])
    write_scores(folder / "teacher", opened, np.full(len(opened), 2.0), name="teacher")
    write_scores(folder / "reference", opened, 2.0 + share, name="reference")
    return {name: folder / name for name in ("sample", "train", "rest", "teacher", "reference")}


def flags(data: dict[str, Path], save: Path, *more: str, **kwargs) -> list[str]:
    return pretrain_flags(
        data["train"], save, "--objective", "regression", "--teacher", "scores",
        "--teacher-scores", str(data["teacher"]), "--reference-scores", str(data["reference"]),
        "--lr", "1e-3", *more, **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(pool: RankPool, data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    save = tmp_path_factory.mktemp("alone") / "run"
    pool.run(flags(data, save), 1)
    return save


@pytest.mark.parametrize("layout", some_slow(LAYOUTS, SLOW))
def test_layout_gives_the_curve_of_one_process(
    layout: str, alone: Path, data, pool: RankPool, tmp_path: Path
) -> None:
    world, more = LAYOUTS[layout]
    pool.run(flags(data, tmp_path / "run", *more.split()), world)
    found, expected = curve(tmp_path / "run"), curve(alone)
    assert len(found) == len(expected) == 20
    assert learned([row["absolute error"] for row in expected]) > 0
    for a, b in zip(found, expected, strict=True):
        for name in ("regression loss", "absolute error"):
            assert abs(a[name] - b[name]) <= TOLERANCE, name
        assert a["grad norm"] == pytest.approx(b["grad norm"], rel=1e-4)


def test_a_run_that_stopped_goes_on_bit_for_bit_in_the_checkpoint_with_its_scale(
    alone: Path, data, pool: RankPool, tmp_path: Path
) -> None:
    words = flags(data, tmp_path / "run")
    pool.run([*words, "--exit-interval", "7"], 1)
    assert len(curve(tmp_path / "run")) == 7
    pool.run(words, 1)
    for name in ("regression loss", "absolute error", "grad norm"):
        found, expected = ([row[name] for row in curve(run)] for run in (tmp_path / "run", alone))
        assert found == expected, name
    manifest = read_json(alone / "iter_0000020" / "manifest.json")
    assert set(manifest["parents"]) == {"corpus", "teacher_scores", "reference_scores"}
    assert manifest["content"]["targets"]["sd"] > 0.01
    with pytest.raises(RankFailedError, match="was trained with reference_scores"):
        pool.run([*words, "--reference-scores", str(data["teacher"]), "--teacher-scores",
                  str(data["reference"])], 1)  # fmt: skip


def test_a_checkpoint_of_another_layout_is_gone_on_from(
    alone: Path, data, pool: RankPool, tmp_path: Path
) -> None:
    pool.run(flags(data, tmp_path / "run", *PP2.split(), "--exit-interval", "10"), 2)
    pool.run(flags(data, tmp_path / "run", *TP2.split(), "--sequence-parallel"), 2)
    for a, b in zip(curve(tmp_path / "run"), curve(alone), strict=True):
        assert abs(a["regression loss"] - b["regression loss"]) <= TOLERANCE
