"""Seeded, disjoint parts of a corpus: what the reference trains on, what is held out, the rest.

The draw of an instance depends on the seed and its root id alone, so it is the same however the
corpus is sharded, and adding a held-out part does not change the reference's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.splitmix import mix
from megatron_miniplm.selection.top_k import count_kept, top_k


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows of each part (int64, ascending); together they are every row, once."""

    reference: np.ndarray
    heldout: np.ndarray
    pool: np.ndarray


def uniform_keys(ids: np.ndarray, seed: int, *, purpose: str) -> np.ndarray:
    """float64[N] in [0, 1), a hash of (seed, purpose, id): independent draws without a state.

    `purpose` keeps two uses of one seed from drawing alike. The mixer is splitmix64's.
    """
    start = mixer_start(seed, purpose=purpose)
    with np.errstate(over="ignore"):
        state = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        state = mix(state)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mixer_start(seed: int, *, purpose: str) -> int:
    """Where the mixer of `uniform_keys` starts, in [0, 2**64)."""
    return xxhash.xxh3_64_intdigest(f"{purpose} {seed}".encode())


def split_rows(
    ids: np.ndarray, *, reference_fraction: float, heldout_fraction: float = 0.0, seed: int
) -> Split:
    """Deal the instances with root ids `ids` (int64[N]) to the three parts.

    Fractions are of the number of instances; refuses fractions that leave nothing for the pool.
    """
    wanted = count_kept(reference_fraction, len(ids), what="--reference-fraction")
    held = (
        count_kept(heldout_fraction, len(ids), what="--heldout-fraction") if heldout_fraction else 0
    )
    if wanted + held >= len(ids):
        raise ConfigError(
            f"{wanted} reference and {held} held-out instances leave nothing of {len(ids)} for "
            f"the pool: take smaller fractions"
        )
    keys = uniform_keys(ids, seed, purpose="split")
    reference = top_k(keys, wanted)
    drawn = top_k(keys, wanted + held)
    rest = np.ones(len(ids), bool)
    rest[drawn] = False
    return Split(
        reference=reference,
        heldout=np.setdiff1d(drawn, reference, assume_unique=True),
        pool=np.flatnonzero(rest),
    )
