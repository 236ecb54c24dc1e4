"""What a teacher says of some positions: its likeliest next tokens, and a few numbers of the rest.

Positions are those that are trained (`data.instances.training_mask`) of one instance, in order;
nothing is kept of others. Shapes: n positions, nnz kept entries over all of them; b instances of s
positions in a batch, K the most entries that one of its positions has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType

import numpy as np
import torch

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.data.movable import Movable

NO_ENTRY = -1
"""Id where a position has fewer than K entries; its log-prob is -inf."""
COLUMNS = ("gold_log_prob", "entropy", "logit_std", "tail_mass")
"""The numbers of each position beside its entries."""
_UNTRAINED = {"logit_std": 1.0}  # a temperature may divide by it
_NO_PARTITIONS: Mapping[float, np.ndarray] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class SparseLogits:
    """The trained positions of one instance, row by row (CSR); all numbers in nats."""

    counts: np.ndarray
    """uint32[n]: entries of each position, 0 to V."""
    ids: np.ndarray
    """int32[nnz]: token ids, ascending within a position."""
    log_probs: np.ndarray
    """float32[nnz]: log-probs under the full softmax at temperature 1; of a sampled store, logs of
    the unbiased weights."""
    gold_log_prob: np.ndarray
    """float32[n]: of the label, kept or not."""
    entropy: np.ndarray
    """float32[n]: of the full distribution."""
    logit_std: np.ndarray
    """float32[n]: of the logits over the real vocabulary."""
    tail_mass: np.ndarray
    """float32[n]: probability of all tokens that are not kept."""
    log_partitions: Mapping[float, np.ndarray] = field(default_factory=lambda: _NO_PARTITIONS)
    """Temperature tau -> float32[n], log sum_v q_v^(1/tau): what a kept q^(1/tau) is divided by."""

    def __post_init__(self) -> None:
        nnz = int(self.counts.sum(dtype=np.int64))
        wrong = [
            f"{name} is {array.dtype}{list(array.shape)}, not {np.dtype(dtype)}[{size}]"
            for name, array, dtype, size in [
                ("counts", self.counts, np.uint32, len(self.counts)),
                ("ids", self.ids, np.int32, nnz),
                ("log_probs", self.log_probs, np.float32, nnz),
                *((name, column, np.float32, len(self)) for name, column in self.columns()),
            ]
            if array.dtype != dtype or array.shape != (size,)
        ]
        if wrong:
            raise ValueError(f"sparse logits of {len(self)} positions: {'; '.join(wrong)}")

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.counts)

    @property
    def nnz(self) -> int:
        """Number of entries over all positions."""
        return len(self.ids)

    def at(self, positions: np.ndarray) -> SparseLogits:
        """The same of some positions (int64), in their order."""
        counts = self.counts[positions]
        starts = np.cumsum(self.counts, dtype=np.int64)[positions] - counts
        moved = starts - (np.cumsum(counts, dtype=np.int64) - counts)
        entries = np.arange(counts.sum(dtype=np.int64)) + np.repeat(moved, counts)
        return SparseLogits(
            counts=counts,
            ids=self.ids[entries],
            log_probs=self.log_probs[entries],
            log_partitions={tau: z[positions] for tau, z in self.log_partitions.items()},
            **{name: getattr(self, name)[positions] for name in COLUMNS},
        )

    def columns(self) -> list[tuple[str, np.ndarray]]:
        """Name and float32[n] of every number of a position; log-partitions last, by tau."""
        named = [(name, getattr(self, name)) for name in COLUMNS]
        return named + [(f"log_partition {tau:g}", z) for tau, z in self.log_partitions.items()]


@dataclass(frozen=True, kw_only=True)
class PaddedLogits(Movable):
    """The same of a batch, for the device that computes the loss; made by `pad`."""

    ids: torch.Tensor
    """int32[b, s, K], ascending, then `NO_ENTRY`."""
    log_probs: torch.Tensor
    """float32[b, s, K], -inf where there is no entry."""
    gold_log_prob: torch.Tensor
    """float32[b, s], as are the next three; 0 (``logit_std``: 1) where nothing is trained."""
    entropy: torch.Tensor
    logit_std: torch.Tensor
    tail_mass: torch.Tensor
    log_partitions: Mapping[float, torch.Tensor] = field(default_factory=dict)
    """Temperature tau -> float32[b, s]; of those that every store has."""

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PaddedLogits:
        changed = {
            each.name: change(getattr(self, each.name))
            for each in fields(self)
            if each.name != "log_partitions"
        }
        partitions = {tau: change(tensor) for tau, tensor in self.log_partitions.items()}
        return PaddedLogits(**changed, log_partitions=partitions)


def pad(mask_bs: torch.Tensor, rows: Sequence[SparseLogits | None]) -> PaddedLogits:
    """Put what is known of each instance at its trained positions (``mask_bs``, bool).

    None is for a row without an instance. DataError: a row has another number of positions than
    its mask, so it is of other tokens than the batch.
    """
    mask = mask_bs.cpu().numpy()
    known = [row for row in rows if row is not None]
    for at, (here, row) in enumerate(zip(mask, rows, strict=True)):
        trained, found = int(here.sum()), 0 if row is None else len(row)
        if trained != found:
            raise DataError(
                f"row {at} of the batch trains {trained} positions, but its logits are of {found}: "
                "they are of another corpus or separator; cache them again"
            )
    width = max((int(row.counts.max(initial=0)) for row in known), default=0)
    present = np.zeros((*mask.shape, width), dtype=bool)
    ids = np.full(present.shape, NO_ENTRY, dtype=np.int32)
    log_probs = np.full(present.shape, -np.inf, dtype=np.float32)
    # One mask takes the entries of all rows: both are in the order of rows and positions.
    present[mask] = np.arange(width) < _joined([row.counts for row in known], np.uint32)[:, None]
    ids[present] = _joined([row.ids for row in known], np.int32)
    log_probs[present] = _joined([row.log_probs for row in known], np.float32)
    taus = set.intersection(*(set(row.log_partitions) for row in known)) if known else set()

    def spread(columns: Sequence[np.ndarray], untrained: float) -> torch.Tensor:
        spread = np.full(mask.shape, untrained, dtype=np.float32)
        spread[mask] = _joined(columns, np.float32)
        return torch.from_numpy(spread)

    return PaddedLogits(
        ids=torch.from_numpy(ids),
        log_probs=torch.from_numpy(log_probs),
        log_partitions={
            tau: spread([row.log_partitions[tau] for row in known], 0.0) for tau in sorted(taus)
        },
        **{
            name: spread([getattr(row, name) for row in known], _UNTRAINED.get(name, 0.0))
            for name in COLUMNS
        },
    )


def _joined(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def concatenated(parts: Sequence[SparseLogits], *, taus: Sequence[float]) -> SparseLogits:
    """The positions of several, one after another; each has the log-partitions of `taus`."""
    names: dict[str, type[np.generic]] = {"counts": np.uint32, "ids": np.int32}
    names |= dict.fromkeys(("log_probs", *COLUMNS), np.float32)
    return SparseLogits(
        **{name: _joined([getattr(part, name) for part in parts], t) for name, t in names.items()},
        log_partitions={
            tau: _joined([part.log_partitions[tau] for part in parts], np.float32) for tau in taus
        },
    )
