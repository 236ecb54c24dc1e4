"""Any layout trains the same model: same data, same seed, same losses.

The matrix is every combination of the levels below, heads taking turns. A plain run covers every
pair of levels with a few cases of at most four ranks (found greedily, always the same); `make
test-full` runs them all.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pool import RankPool
from tests.runs import INTERLEAVED, PP2, TP2, learned, losses, pretrain_flags

TOLERANCE = 1e-5  # fp32 sums in another order, 20 updates at lr 6e-4 (spec: 4.3e-6 at 1e-2)

ZERO = "--use-distributed-optimizer"
OVERLAP = "--overlap-grad-reduce"
LEVELS = {
    "head": {"tied": "", "untied": "--untie-embeddings-and-output-weights"},
    "tp": {"TP1": "", "TP2": TP2, "TP2 SP": f"{TP2} --sequence-parallel"},
    "pp": {"PP1": "", "PP2": PP2, "PP2 VPP2": INTERLEAVED},
    "dp": {"DP1": "", "DP2": ""},
    "optimizer": {
        "whole": "",
        "whole, overlapped": OVERLAP,
        "ZeRO": ZERO,
        "ZeRO, overlapped": f"{ZERO} {OVERLAP} --overlap-param-gather",
    },
    "recompute": {
        "kept": "",
        "recomputed": "--recompute-granularity full --recompute-method uniform",
    },
    "accumulation": {"x1": "", "x4": ""},
}
Case = tuple[str, ...]


def world(case: Case) -> int:
    """Ranks of a case: two for every dimension that is divided."""
    return 2 ** sum(any(part in name for part in ("TP2", "PP2", "DP2")) for name in case)


def exists(case: Case) -> bool:
    """Overlap needs replicas; interleaved stages need at least a micro-batch a stage."""
    _, _, pp, dp, optimizer, _, accumulation = case
    return (dp == "DP2" or "overlapped" not in optimizer) and (
        pp != "PP2 VPP2" or accumulation == "x4"
    )


def head_alternates(case: Case) -> bool:
    """Half of the cases with each kind of head, so that all pairs with it are there."""
    levels = [list(names).index(name) for names, name in zip(LEVELS.values(), case, strict=True)]
    return sum(levels) % 2 == 0


EXISTING = [case for case in itertools.product(*LEVELS.values()) if exists(case)]


def pairwise(cases: list[Case]) -> list[Case]:
    """A few of the cases that together have every pair of levels that any case has."""

    def pairs(case: Case) -> set[tuple[tuple[int, str], ...]]:
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        # The cheapest of those that bring the most.
        chosen.append(max(cases, key=lambda case: (len(pairs(case) & missing), -world(case))))
        missing -= pairs(chosen[-1])
    return chosen


PLAIN = pairwise([case for case in EXISTING if world(case) <= 4])
MATRIX = [case for case in EXISTING if head_alternates(case) or case in PLAIN]
CASES = [
    pytest.param(case, id=", ".join(case), marks=[pytest.mark.slow] * (case not in PLAIN))
    for case in sorted(MATRIX, key=lambda case: (world(case), case))
]


@pytest.fixture(scope="module")
def wide_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Eight ranks, started when first needed."""
    ranks = RankPool(8, tmp_path_factory.mktemp("wide"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def one_process(
    wide_pool: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[float]]:
    """Losses of one process, by kind of head."""

    @functools.cache
    def of(head: str) -> list[float]:
        save = tmp_path_factory.mktemp("reference") / "run"
        wide_pool.run(pretrain_flags(corpus, save, *LEVELS["head"][head].split()), 1)
        return losses(save)

    return of


@pytest.fixture(scope="module")
def table() -> Iterator[dict[Case, float]]:
    """Case -> largest difference of a loss; written to PARITY_TABLE where that names a file."""
    rows: dict[Case, float] = {}
    yield rows
    if path := os.environ.get("PARITY_TABLE"):
        head = "| " + " | ".join([*LEVELS, "ranks", "max difference of a loss"]) + " |"
        lines = [
            f"| {' | '.join(case)} | {world(case)} | {worst:.1e} |" for case, worst in rows.items()
        ]
        Path(path).write_text("\n".join([head, "|---" * (len(LEVELS) + 2) + "|", *lines]) + "\n")


def test_plain_cases_are_few_and_have_every_pair() -> None:
    assert len(PLAIN) <= 16
    assert max(world(case) for case in PLAIN) == 4
    pairs = {pair for case in EXISTING for pair in itertools.combinations(case, 2)}
    assert pairs == {pair for case in PLAIN for pair in itertools.combinations(case, 2)}


@pytest.mark.parametrize("case", CASES)
def test_layout_gives_the_losses_of_one_process(
    case: Case,
    one_process: Callable[[str], list[float]],
    wide_pool: RankPool,
    corpus: Path,
    tmp_path: Path,
    table: dict[Case, float],
) -> None:
    expected = one_process(case[0])
    replicas = 2 if "DP2" in case else 1
    micro_batch = 8 // replicas // (4 if "x4" in case else 1)
    flags = " ".join(levels[name] for levels, name in zip(LEVELS.values(), case, strict=True))
    wide_pool.run(
        pretrain_flags(
            corpus, tmp_path / "run", *flags.split(), "--micro-batch-size", str(micro_batch)
        ),
        world(case),
    )
    found = losses(tmp_path / "run")
    table[case] = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    print(f"\nmax |loss - loss of one process| over 20 updates = {table[case]:.2e}")
    assert len(found) == 20
    assert learned(expected) > 0.05, "the run must learn, or parity shows nothing"
    assert table[case] <= TOLERANCE
