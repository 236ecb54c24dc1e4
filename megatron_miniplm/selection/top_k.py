"""The exact K highest keys: one rule for every selector.

K is the exact floor of ratio times N (0.57 of 100 is 57; binary floating point says 56), but at
least 1. Ties go to the lower row. NaN is refused: sorting would put it first and so select it.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from megatron_miniplm.core.errors import ConfigError, DataError


def count_kept(ratio: float, count: int, *, what: str = "--selection-ratio") -> int:
    """How many of `count` instances a ratio in (0, 1] keeps, in exact arithmetic."""
    if not 0 < ratio <= 1:
        raise ConfigError(f"{what} is {ratio}, but must be above 0 and at most 1")
    return max(1, int(Fraction(str(ratio)) * count))


def top_k(keys: np.ndarray, k: int, *, candidates: np.ndarray | None = None) -> np.ndarray:
    """int64[k] rows of the highest `keys` (float64[N]), ascending; O(N).

    `candidates` (bool[N]) limits the choice. Refuses non-finite keys and fewer than k candidates.
    """
    bad = np.flatnonzero(~np.isfinite(keys))
    if len(bad):
        raise DataError(
            f"the key of row {bad[0]} is {keys[bad[0]]}, and {len(bad) - 1} more are not finite: "
            f"nothing can be selected by them; look for broken scores"
        )
    rows = np.arange(len(keys)) if candidates is None else np.flatnonzero(candidates)
    if not 0 < k <= len(rows):
        raise ConfigError(f"{k} instances are to be kept, but {len(rows)} can be chosen")
    chosen = keys[rows]
    threshold = np.partition(chosen, len(chosen) - k)[len(chosen) - k]
    above = chosen > threshold
    tied = np.flatnonzero(chosen == threshold)[: k - int(above.sum())]
    above[tied] = True
    return rows[above]
