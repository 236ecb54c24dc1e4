"""Stored hidden states and the teacher's output matrix: all of its logits, without its layers.

A rank reads its rows of the output matrix alone. What was stored of a batch takes the place of the
hidden states that the teacher would compute, so whatever an online teacher allows goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_miniplm.core.errors import DataError, LineageError
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.models.build import vocab_shard
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.weights import Weights, open_weights
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import Layout, Topology


@dataclass(frozen=True)
class HiddenStates:
    """Of a batch, [b, s, h]; zeros where nothing is trained."""

    states_bsh: torch.Tensor

    def to(self, device: torch.device) -> HiddenStates:
        """The same on another device; from pinned memory, without waiting for it."""
        return HiddenStates(self.states_bsh.to(device, non_blocking=True))

    def pinned(self) -> HiddenStates:
        """The same in pinned memory."""
        return HiddenStates(self.states_bsh.pin_memory())


def spread(batch: Batch, rows: Sequence[torch.Tensor | None]) -> HiddenStates:
    """Put the states of each instance [n, h] at its trained positions.

    DataError: a row has another number of positions than its mask.
    """
    known = [row for row in rows if row is not None]
    joined = torch.cat(known)
    if [len(row) for row in known] != [n for n in batch.mask_bs.sum(1).tolist() if n]:
        raise DataError(
            "the batch trains other positions than its hidden states are of: they are of another "
            "corpus or separator; cache them again"
        )
    states_bsh = joined.new_zeros((*batch.mask_bs.shape, joined.shape[1]))
    states_bsh[batch.mask_bs] = joined
    return HiddenStates(states_bsh)


def teacher_of(store: RecordStore, said: str, layout: Layout) -> Weights:
    """The model that a store's states are of: where the store says that it lies, or at `said`."""
    parent = store.manifest.parents["teacher"]
    path = Path(said) if said else store.path / parent.path
    if not path.exists():
        raise LineageError(
            f"{store.path} holds hidden states of {path}, which is not there: say where the "
            "teacher lies with --logits-teacher"
        )
    weights = open_weights(path)
    found = weights.shared_fingerprint(layout)
    if found != parent.fingerprint:
        raise LineageError(
            f"{path} has fingerprint {found}, but the hidden states of {store.path} are of "
            f"{parent.fingerprint}: pass that teacher as --logits-teacher"
        )
    return weights


class OutputMatrix:
    """This rank's rows of a teacher's output matrix, as wide as the student's."""

    def __init__(
        self, weights: Weights, topology: Topology, *, width: int, valid: int, dtype: torch.dtype
    ) -> None:
        self.shard = vocab_shard(topology, width=width, valid=valid)
        self.weight_vh = weights.output_rows(self.shard.first, self.shard.size, dtype).to(
            platform.device()
        )

    def head(self, hidden: HiddenStates) -> Head:
        """As the teacher's own."""
        states_sbh = hidden.states_bsh.transpose(0, 1).to(self.weight_vh.dtype)
        return Head(hidden_sbh=states_sbh.contiguous(), weight_vh=self.weight_vh, shard=self.shard)
