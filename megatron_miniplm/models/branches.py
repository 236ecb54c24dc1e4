"""Rows that hold several continuations of one context, and read the context once.

A row is the context's tokens, then the tokens of each continuation, one behind the other::

    tokens      c0 c1 c2 | a0 a1 | b0 b1 b2
    positions    0  1  2 |  3  4 |  3  4  5

A position of a continuation sees the context and what its own continuation has before it, at the
rotary angles that it would have in a row of its own: so its hidden state is the one of that row, up
to rounding. The positions say it all: where they step back, the next continuation begins, and the
lowest position to which they step is where the context ends.

For the time of `reading_branches`, the layers' own attention (ours, or Transformer Engine's) gives
its place to one that sees so. Any layout will do: every pipeline stage is given the positions.

Shapes: b rows, s positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from megatron_miniplm.data.instances import Batch
from megatron_miniplm.models.chunks import ModelChunks


@dataclass(frozen=True)
class BranchedBatch(Batch):
    """A micro-batch of such rows."""

    branched_positions_bs: torch.Tensor
    """int64."""

    @property
    def positions_bs(self) -> torch.Tensor:
        """See `Batch.positions_bs`."""
        return self.branched_positions_bs

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> BranchedBatch:
        return BranchedBatch(*(change(getattr(self, name)) for name in self.__dataclass_fields__))


def can_branch(model: ModelChunks) -> bool:
    """Whether all that layers know of earlier positions is attention to them."""
    return all(
        hasattr(layer, "self_attention")
        for decoder in model.decoders
        for layer in decoder.decoder.layers
    )


@contextmanager
def reading_branches(model: ModelChunks) -> Iterator[None]:
    """The model reads `BranchedBatch` as long as this is open; only where it `can_branch`."""
    undo: list[Callable[[], object]] = []
    try:
        for decoder in model.decoders:
            sight = _Sight()
            rotary = decoder.rotary_pos_emb
            undo.append(decoder.register_forward_pre_hook(sight.read).remove)
            undo.append(rotary.register_forward_hook(sight.turn).remove)
            for layer in decoder.decoder.layers:
                attention = layer.self_attention
                undo.append(partial(setattr, attention, "core_attention", attention.core_attention))
                attention.core_attention = _Attention(sight)
        yield
    finally:
        for each in undo:
            each()


def sees(positions_bs: torch.Tensor) -> torch.Tensor | None:
    """[b, 1, s, s]: which position (row) sees which (column); None where all rows are plain."""
    steps_back = positions_bs[:, 1:] <= positions_bs[:, :-1]
    if not steps_back.any():
        return None
    branch_bs = F.pad(steps_back.cumsum(1), (1, 0))
    length = positions_bs.shape[1]
    # The first continuation goes on from the context without a step.
    ends_b = torch.where(branch_bs > 0, positions_bs, length).amin(1, keepdim=True)
    place = torch.arange(length, device=positions_bs.device)
    shared_bs = place < ends_b
    same = branch_bs[:, :, None] == branch_bs[:, None, :]
    visible = (same | shared_bs[:, None, :]) & (place <= place[:, None])
    return visible[:, None]


class _Sight:
    """Positions of the micro-batch that a decoder is reading, and what they see."""

    def __init__(self) -> None:
        self.positions_bs: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None

    def read(self, _: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before the decoder's forward pass."""
        self.positions_bs = inputs[1]
        self.mask = sees(inputs[1])

    def turn(self, _: torch.nn.Module, __: Any, angles: torch.Tensor) -> torch.Tensor:
        """Rotary angles [s, 1, 1, d] of all places -> [s, b, 1, d] of the positions there."""
        if self.mask is None:
            return angles
        assert self.positions_bs is not None, "the decoder reads its inputs first"
        return angles[:, 0, 0][self.positions_bs.t()][:, :, None]


class _Attention(torch.nn.Module):
    def __init__(self, sight: _Sight) -> None:
        super().__init__()
        self._sight = sight

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **unused: Any
    ) -> torch.Tensor:
        """[s, b, heads * dim] of [s, b, heads or groups, dim]."""
        length, batch, heads, dim = query.shape
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        mask = self._sight.mask
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None,
            enable_gqa=key.shape[1] != heads,
        )  # fmt: skip
        return out.permute(2, 0, 1, 3).reshape(length, batch, heads * dim)
