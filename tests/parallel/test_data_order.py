"""Which instances go into which update: the same for any number of ranks, and after any stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.evaluation.run_curves import read_history
from tests.pool import RankFailedError, RankPool
from tests.runs import TINY, curve, losses, pretrain_flags

RECORDED = "tests.parallel.jobs:recorded_run"
SIZES = [8, 8, 8, 16, 16, 24, 24, 24, 24, 24]
"""Of the updates: from 8 to 24 by 8 over 48 instances, so 16 from 24 on, and 24 beyond 48."""


@pytest.fixture(scope="module")
def blend(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three parts of one corpus, the last one so small that the run has several epochs of it."""
    whole, folder = Corpus.open(corpus), tmp_path_factory.mktemp("blend")
    words = []
    for weight, name, rows in (
        ("0.5", "first", range(1000)),
        ("0.3", "rest", range(1000, len(whole))),
        ("0.2", "few", range(500, 508)),
    ):
        write_subset(whole, np.array(rows), folder / name, config={}, selection={})
        words += [weight, str(folder / name)]
    return words


def flags(blend: Iterable[str], save: Path, *more: str) -> list[str]:
    return pretrain_flags(
        Path("unused"), save, *TINY, "--train-data-path", *blend, "--objective", "recording",
        "--global-batch-size", "24", "--rampup-batch-size", "8", "8", "48", *more,
        iterations=len(SIZES),
    )  # fmt: skip


def in_order(by_rank: list[list[list[int]]]) -> list[int]:
    """Rows in the order of the stream: micro-batch after micro-batch, rank after rank."""
    return [row for batches in zip(*by_rank, strict=True) for rows in batches for row in rows]


@pytest.fixture(scope="module")
def whole(
    pool: RankPool, blend: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int]]:
    """A run of four ranks that nothing interrupts, and the rows that it trained on."""
    save = tmp_path_factory.mktemp("whole") / "run"
    held_out = ["--valid-data-path", f"seen={blend[1]}", blend[5], "--eval-iters", "1"]
    events = ["--tensorboard-dir", str(save / "events")]
    words = flags(blend, save, *held_out, "--eval-interval", "5", *events)
    return save, in_order(pool.run(RECORDED, 4, words=words))


def test_four_ranks_then_two_consume_the_instances_of_an_uninterrupted_run(
    whole, pool: RankPool, blend: list[str], tmp_path: Path
) -> None:
    save, expected = whole
    run = flags(blend, tmp_path / "run")
    before = pool.run(RECORDED, 4, words=[*run, "--exit-interval", "4"])
    # The ramp-up is under way, and so is a block of the blend; micro-batches change as well.
    after = pool.run(RECORDED, 2, words=[*run, "--micro-batch-size", "4"])
    found = in_order(before) + in_order(after)
    data = Blend.open(blend, seed=10)
    assert instance_ids(data, found) == instance_ids(data, expected)
    assert found == data.order.rows(0, sum(SIZES)).tolist()
    assert len(in_order(before)) == sum(SIZES[:4])
    worst = np.abs(np.subtract(losses(tmp_path / "run"), losses(save))).max()
    assert worst <= 1e-5, "fp32 sums in another order"


def instance_ids(data: Blend, rows: list[int]) -> list[tuple[str, int]]:
    sources, own = data.locate(np.array(rows))
    return [
        (data.sources[source].corpus.root_fingerprint, int(data.sources[source].corpus.ids[row]))
        for source, row in zip(sources.tolist(), own.tolist(), strict=True)
    ]


def test_counters_rates_and_metrics_follow_the_samples(whole, blend: list[str]) -> None:
    save, rows = whole
    table = curve(save)
    assert [row["global batch size"] for row in table] == SIZES
    assert [row["consumed_samples"] for row in table] == np.cumsum(SIZES).tolist()
    # Linear warm-up over the samples of the first four updates.
    rates = [row["learning rate"] for row in table[:5]]
    assert rates == pytest.approx([6e-4 * n / 40 for n in (0, 8, 16, 24, 40)])
    data = Blend.open(blend, seed=10)
    counts = np.bincount(data.locate(np.array(rows))[0])
    for source, count in zip(data.sources, counts.tolist(), strict=True):
        assert table[-1][f"consumed samples ({source.name})"] == count
        assert table[-1][f"epochs ({source.name})"] == count / len(source.corpus)
    assert table[-1]["epochs (few)"] > 2
    assert all(0 <= row["data wait"] < 1 for row in table)


def test_validation_sets_are_told_apart_by_name(whole) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    save, _ = whole
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    found = [row["validation"] for row in lines if "validation" in row]
    names = {"lm loss", "lm loss (token mean)"}
    assert [row.keys() for row in found] == [names | {f"seen {name}" for name in names}] * 2
    assert found[-1]["lm loss"] != found[-1]["seen lm loss"]
    assert [row["consumed_samples"] for row in lines if "validation" in row] == [56, 176]
    _, held_out = read_history(save, "run").validations["lm loss"]
    assert held_out.tolist() == [row["lm loss"] for row in found]
    events = EventAccumulator(str(save / "events")).Reload()
    tags = {"lm-loss-validation", "seen-lm-loss-validation", "epochs-(few)", "data-wait"}
    assert tags <= set(events.Tags()["scalars"])


def test_a_file_that_is_truncated_under_a_run_ends_it_with_its_name(
    pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(corpus.parent, tmp_path / "data")
    (victim,) = data.glob("*.bin")
    words = pretrain_flags(data / corpus.name, tmp_path / "run", *TINY, "--objective", "recording")
    with pytest.raises(RankFailedError, match="DataError") as caught:
        pool.run(RECORDED, 2, words=words, truncated=str(victim))
    assert f"{victim} changed while it was read" in str(caught.value)


def test_resume_in_the_middle_of_ramp_up_is_bitwise(
    pool: RankPool, blend: list[str], tmp_path: Path
) -> None:
    for name, stops in (("whole", ([],)), ("parts", (["--exit-interval", "5"], []))):
        for stop in stops:
            pool.run(RECORDED, 1, words=flags(blend, tmp_path / name, *stop))
    found, expected = curve(tmp_path / "parts"), curve(tmp_path / "whole")
    for name in ("lm loss", "grad norm", "learning rate", "consumed_samples", "consumed_tokens"):
        assert [row[name] for row in found] == [row[name] for row in expected], name


def test_another_blend_is_refused_by_name_and_a_moved_one_goes_on(
    whole, pool: RankPool, blend: list[str], tmp_path: Path
) -> None:
    save, _ = whole
    shutil.copytree(save, tmp_path / "run")
    heavier = ["0.6", *blend[1:]]
    for other, role in (
        (heavier, "corpus 1 of 3, weight 5/10"),
        (blend[:4], "corpus 1 of 3, weight 1/2"),
        ([blend[0], blend[3], blend[2], blend[1], *blend[4:]], "corpus 1 of 3, weight 1/2"),
        ([blend[1]], "corpus 1 of 3"),
    ):
        with pytest.raises(RankFailedError, match="LineageError") as caught:
            pool.run(RECORDED, 1, words=flags(other, tmp_path / "run"))
        assert role.replace("5/10", "1/2") in str(caught.value), other
    moved = tmp_path / "moved"
    moved.mkdir()
    here = Path(blend[5])
    for path in here.parent.glob(f"{here.name}*"):
        if path.suffix != ".json":
            (moved / path.name).symlink_to(path)
    shutil.copy(here.with_suffix(".json"), moved)
    pool.run(RECORDED, 1, words=flags([*blend[:5], str(moved / here.name)], tmp_path / "run"))


def test_where_samples_are_counted_updates_may_get_another_size_midway(
    pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    def words(name: str, *more: str) -> list[str]:
        flags = pretrain_flags(corpus, tmp_path / name, *TINY, "--objective", "recording", *more)
        at = flags.index("--train-iters")
        return [*flags[:at], "--train-samples", "160", *flags[at + 2 :]]

    whole = pool.run(RECORDED, 1, words=words("whole"))
    first = pool.run(RECORDED, 1, words=words("run", "--exit-interval", "6"))
    wider = words("run", "--global-batch-size", "16", "--micro-batch-size", "4")
    second = pool.run(RECORDED, 2, words=wider)
    assert in_order(first) + in_order(second) == in_order(whole)
    rows, same = curve(tmp_path / "run"), curve(tmp_path / "whole")
    assert [row["consumed_samples"] for row in rows] == [*range(8, 49, 8), *range(64, 161, 16)]
    # The schedule is that of the samples: an update has the rate of its first one.
    rates = {row["consumed_samples"] - 8: row["learning rate"] for row in same}
    for row in rows[6:]:
        assert row["learning rate"] == rates[row["consumed_samples"] - 16]
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    pool.run(RECORDED, 2, words=wider)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before, "it was complete"
