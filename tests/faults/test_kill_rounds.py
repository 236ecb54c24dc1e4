"""Killed by SIGKILL at random moments, a run ends as one that was left alone, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.kill_rounds import survive


@pytest.mark.parametrize(
    ("ranks", "rounds"),
    [
        (1, 3),
        pytest.param(1, 25, marks=pytest.mark.slow),
        pytest.param(2, 25, marks=pytest.mark.slow),
    ],
)
def test_rounds_of_kills_change_nothing(
    ranks: int, rounds: int, corpus: Path, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"\nseed {seed}")
    hits = survive(
        corpus, tmp_path, rounds=rounds, ranks=ranks, iterations=20 + 6 * rounds, seed=seed
    )
    print(f"{rounds} kills of {ranks} ranks: {hits}")
