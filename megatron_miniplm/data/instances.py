"""Instances to batches: the mask, the order, and nothing that needs to be remembered.

The order of training is a function of (seed, epoch): a keyed bijection on row numbers, computed
for any position without a table. So the whole state of the data pipeline is `consumed_samples`.

Golden mask: ids ``[a b EOS c d]`` give inputs ``[a b EOS c]``, labels ``[b EOS c d]``, mask
``[1 1 0 1]``: the token after a separator is not predictable from it; the separator itself is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_miniplm.data.movable import Movable
from megatron_miniplm.data.splitmix import mix

PADDING_ROW = -1
"""Row number of a batch row that holds no instance; its mask is empty."""
_ROUNDS = 6


@dataclass(frozen=True)
class Batch(Movable):
    """One micro-batch; s positions, right-padded with the separator."""

    tokens_bs: torch.Tensor
    """Inputs, int64."""
    labels_bs: torch.Tensor
    """Next tokens, int64."""
    mask_bs: torch.Tensor
    """True where the position is trained and scored."""
    rows_b: torch.Tensor
    """Row of the corpus or blend, int64; `PADDING_ROW` where there is none."""

    @property
    def positions_bs(self) -> torch.Tensor:
        """Where in its sequence each token is, from 0, int64."""
        batch_size, length = self.tokens_bs.shape
        return torch.arange(length, device=self.tokens_bs.device).expand(batch_size, -1)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return type(self)(*(change(getattr(self, name)) for name in self.__dataclass_fields__))


class Instances(Protocol):
    """What batches are made of: a corpus, a subset, or a blend of several."""

    @property
    def eod_id(self) -> int:
        """Id of the separator."""

    def tokens(self, row: int) -> np.ndarray:
        """A copy of one instance."""

    def first_label(self, row: int) -> int:
        """Place, from 1, of the first token that counts as a label: those before are context."""


def training_mask(
    tokens_bs: torch.Tensor,
    num_inputs_b: torch.Tensor,
    *,
    eod_id: int,
    first_label_b: torch.Tensor | int = 1,
) -> torch.Tensor:
    """Which positions count, everywhere: inside the instance, and input not the separator.

    Nor do those count whose label lies before `first_label_b` (int64[b], from 1): the prompt.
    """
    labels = torch.arange(1, tokens_bs.shape[1] + 1, device=tokens_bs.device)
    first = torch.as_tensor(first_label_b, device=tokens_bs.device).reshape(-1, 1)
    return (first <= labels) & (labels <= num_inputs_b[:, None]) & (tokens_bs != eod_id)


def make_batch(data: Instances, rows: Sequence[int] | np.ndarray, *, length: int) -> Batch:
    """Batch of these rows padded to `length` inputs; `PADDING_ROW` gives an empty row."""
    ids = np.full((len(rows), length + 1), data.eod_id, dtype=np.int64)
    num_inputs = np.zeros(len(rows), dtype=np.int64)
    first_label = np.ones(len(rows), dtype=np.int64)
    for at, row in enumerate(rows):
        if row != PADDING_ROW:
            tokens = data.tokens(int(row))
            ids[at, : len(tokens)] = tokens
            num_inputs[at] = len(tokens) - 1
            first_label[at] = data.first_label(int(row))
    all_ids = torch.from_numpy(ids)
    tokens_bs = all_ids[:, :-1].contiguous()
    return Batch(
        tokens_bs=tokens_bs,
        labels_bs=all_ids[:, 1:].contiguous(),
        mask_bs=training_mask(
            tokens_bs,
            torch.from_numpy(num_inputs),
            eod_id=data.eod_id,
            first_label_b=torch.from_numpy(first_label),
        ),
        rows_b=torch.as_tensor(np.asarray(rows, dtype=np.int64)),
    )


class Permutation:
    """A bijection on ``range(size)`` keyed by (seed, epoch, stream), without a table.

    A Feistel network over the next even power of two, walking cycles until inside the range.
    """

    def __init__(self, size: int, *, seed: int, epoch: int = 0, stream: int = 0) -> None:
        self.size = size
        self.half_bits = max(1, ((max(size - 1, 1)).bit_length() + 1) // 2)
        keys = np.random.SeedSequence((seed, epoch, stream)).generate_state(_ROUNDS, np.uint64)
        self.keys = keys

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Images of `positions` (each in ``range(size)``), int64."""
        values = np.asarray(positions, dtype=np.uint64).copy()
        outside = np.ones(values.shape, dtype=bool)
        while outside.any():
            values[outside] = self._scramble(values[outside])
            outside = values >= np.uint64(self.size)
        return values.astype(np.int64)

    def _scramble(self, values: np.ndarray) -> np.ndarray:
        bits = np.uint64(self.half_bits)
        low_mask = np.uint64((1 << self.half_bits) - 1)
        left, right = values >> bits, values & low_mask
        for key in self.keys:
            left, right = right, left ^ (mix(right ^ key) & low_mask)
        return (left << bits) | right


class SampleOrder:
    """The endless, epoch-wise reshuffled stream of rows that training consumes."""

    def __init__(self, num_instances: int, *, seed: int, stream: int = 0) -> None:
        self.num_instances, self.seed, self.stream = num_instances, seed, stream

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows of samples ``first .. first + count`` of the stream; may span epochs."""
        return self.at(np.arange(first, first + count))

    def at(self, samples: np.ndarray) -> np.ndarray:
        """Rows of any samples (int64[n]) of the stream."""
        epochs, positions = np.divmod(samples, self.num_instances)
        out = np.empty(len(samples), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            permutation = Permutation(
                self.num_instances, seed=self.seed, epoch=int(epoch), stream=self.stream
            )
            out[here] = permutation(positions[here])
        return out


def rank_share(rows: np.ndarray, *, micro_batch_size: int, rank: int, size: int) -> np.ndarray:
    """Rows [num_microbatches, micro_batch_size] of one data-parallel rank of a global batch."""
    return rows.reshape(-1, size, micro_batch_size)[:, rank]
