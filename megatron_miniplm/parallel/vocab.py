"""The vocabulary over TP ranks: which columns are mine, and the one collective of a loss.

Every rank reduces its own columns to a few floats a token (`kernels.record`); seeing everybody's
is all the communication that a loss over the vocabulary needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """Columns ``first .. first + size`` of the logits; those at `valid` and beyond do not exist."""

    first: int
    size: int
    valid: int
    """Real vocabulary: columns from here on have probability 0 (padding of any origin)."""
    group: dist.ProcessGroup | None
    """Tensor-parallel group; None when there is one rank."""

    @property
    def local_valid(self) -> int:
        """How many of this rank's columns are real."""
        return max(0, min(self.size, self.valid - self.first))


def take_from_first(mine: torch.Tensor, shard: VocabShard) -> None:
    """Put the first rank's tensor in the place of everybody's; a broadcast."""
    if shard.group is not None:
        dist.broadcast(mine, dist.get_global_rank(shard.group, 0), group=shard.group)


def gather_shards(mine: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Every rank's tensor of this shape, [W, ...] in rank order; one all-gather.

    All ranks get the same bits in the same order, so what they compute of them is the same, too.
    """
    if shard.group is None:
        return mine[None]
    world = dist.get_world_size(shard.group)
    gathered = mine.new_empty((world * mine.shape[0], *mine.shape[1:]))
    dist.all_gather_into_tensor(gathered, mine.contiguous(), group=shard.group)
    return gathered.view(world, *mine.shape)
