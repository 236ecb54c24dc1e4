"""The vocabulary over TP ranks: which columns are mine, and the one collective of a loss.

Every rank reduces its own columns to a few floats a token (`kernels.reference`); merging those
records is all the communication that a log-sum-exp needs.
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


def merge_softmax(record_N3: torch.Tensor, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge per-shard (max, sum exp(x - max), gold logit) into (log-sum-exp_N, gold logit_N).

    One all-gather of three floats a token; every rank computes the same result in the same order.
    """
    if shard.group is None:
        maximum, total, gold = record_N3.unbind(-1)
        return maximum + total.log(), gold
    world = dist.get_world_size(shard.group)
    count = record_N3.shape[0]
    gathered = record_N3.new_empty((world * count, 3))
    dist.all_gather_into_tensor(gathered, record_N3.contiguous(), group=shard.group)
    maximum, total, gold = gathered.view(world, count, 3).unbind(-1)
    top = maximum.amax(0)
    merged = (total * (maximum - top).exp()).sum(0)
    return top + merged.log(), gold.sum(0)
