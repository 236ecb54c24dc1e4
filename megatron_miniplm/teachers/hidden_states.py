"""Stored hidden states and the teacher's output matrix: all of its logits, without its layers.

A rank reads its rows of the output matrix alone. What was stored of a batch takes the place of the
hidden states that the teacher would compute, so whatever an online teacher allows goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_miniplm.core.errors import CheckpointError, DataError, LineageError
from megatron_miniplm.data.hidden_codec import HiddenStates
from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.models.build import vocab_shard
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.weights import Weights, open_weights
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import Layout, Topology


def spread(
    mask_bs: torch.Tensor, rows: Sequence[HiddenStates | None], *, like: HiddenStates
) -> HiddenStates:
    """Put the states of each instance at its trained positions (``mask_bs``, bool).

    Others have zeros. `like`: states of the same type and width, of any number of positions.
    DataError: a row has another number of positions than its mask.
    """
    for at, (trained, row) in enumerate(zip(mask_bs.sum(1).tolist(), rows, strict=True)):
        found = 0 if row is None else len(row)
        if trained != found:
            raise DataError(
                f"row {at} of the batch trains {trained} positions, but its hidden states are of "
                f"{found}: they are of another corpus or separator; cache them again"
            )
    known = [row for row in rows if row is not None]

    def joined(parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        spread = like.new_zeros((*mask_bs.shape, *like.shape[1:]))
        if parts:
            spread[mask_bs] = torch.cat([*parts])
        return spread

    numbers = joined([row.numbers for row in known], like.numbers)
    if like.scale is None:
        return HiddenStates(numbers)
    scales = [row.scale for row in known if row.scale is not None]
    return HiddenStates(numbers, joined(scales, like.scale))


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
        rows_vh = weights.output_rows(self.shard.first, self.shard.size, dtype)
        if not rows_vh.isfinite().all():
            raise CheckpointError(
                f"the output matrix of {weights.path} is not finite: it is damaged, or the model "
                "diverged when it was trained"
            )
        self.weight_vh = rows_vh.to(platform.device())

    def head(self, hidden: HiddenStates) -> Head:
        """As the teacher's own."""
        states_sbh = hidden.wide(self.weight_vh.dtype).transpose(0, 1).contiguous()
        return Head(hidden_sbh=states_sbh, weight_vh=self.weight_vh, shard=self.shard)
