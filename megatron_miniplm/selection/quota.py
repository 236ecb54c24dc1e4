"""How much a selection keeps: a share or a number of tokens, of everything or of each domain."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.selection.top_k import count_kept


def ratio_quota(ratio: float, instances: np.ndarray) -> np.ndarray:
    """int64[S] instances to keep of `instances` (int64[S]) in each stratum.

    Together they are exactly ``count_kept(ratio, sum)``; each is its own exact share, rounded down
    or up: the largest remainders are rounded up, ties to the first.
    """
    return _share_out(count_kept(ratio, int(instances.sum())), instances)


def token_quota(wanted: int, tokens: np.ndarray) -> np.ndarray:
    """int64[S] tokens to keep, `wanted` together, in proportion to `tokens` (int64[S]) there are.

    Refuses less than one token and more than there are.
    """
    if not 0 < wanted <= tokens.sum():
        raise ConfigError(
            f"--selection-tokens is {wanted}, but must be from 1 to {tokens.sum()}, the tokens of "
            f"all instances"
        )
    return _share_out(wanted, tokens)


def _share_out(total: int, sizes: np.ndarray) -> np.ndarray:
    """int64[S]: `total` in proportion to `sizes`, exactly, by largest remainders."""
    shares = [Fraction(total * int(size), int(sizes.sum())) for size in sizes]
    floors = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda at: (floors[at] - shares[at], at))
    for at in by_remainder[: total - sum(floors)]:
        floors[at] += 1
    return np.array(floors, np.int64)
