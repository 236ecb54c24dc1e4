"""Killed by SIGKILL at random moments, a run ends as one that was left alone, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.kill_rounds import left_alone, survive
from tests.pool import RankPool


@pytest.mark.parametrize(
    ("ranks", "rounds"),
    [
        (1, 1),
        pytest.param(1, 25, marks=pytest.mark.slow),
        pytest.param(2, 25, marks=pytest.mark.slow),
    ],
)
def test_rounds_of_kills_change_nothing(
    ranks: int, rounds: int, pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"\nseed {seed}")
    size = {"ranks": ranks, "iterations": 20 + 6 * rounds}
    pool.run(left_alone(corpus, tmp_path, **size).flags(), ranks)
    hits = survive(corpus, tmp_path, rounds=rounds, seed=seed, **size)
    print(f"{rounds} kills of {ranks} ranks: {hits}")
