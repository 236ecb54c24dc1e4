"""Ranks of a job that has no model: sums and gathers of numpy arrays between processes.

Data stages under torchrun only need these; gloo carries them, with GPUs or without. torch is
imported when there is more than one process, for a single one starts seconds faster without.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among `size`; of one process, every method is the identity."""

    rank: int = 0
    size: int = 1

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum over ranks of an int64 array of equal shape (a collective)."""
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        total = torch.from_numpy(np.array(values, np.int64))
        dist.all_reduce(total)
        return total.numpy()

    def gather(self, values: np.ndarray) -> list[np.ndarray]:
        """Everybody's one-dimensional array, in rank order; lengths may differ (a collective)."""
        if self.size == 1:
            return [values]
        import torch.distributed as dist

        parts: list[np.ndarray] = [values] * self.size
        dist.all_gather_object(parts, np.ascontiguousarray(values))
        return parts

    def barrier(self) -> None:
        """Wait for everybody (a collective)."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def share(self, count: int) -> range:
        """The numbers below `count` that fall to this rank: a run, in rank order."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)


ONE_RANK = Ranks()


@contextmanager
def join_ranks(*, timeout_minutes: int = 60) -> Iterator[Ranks]:
    """The job that torchrun started, or a job of one; left at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ONE_RANK
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(minutes=timeout_minutes))
    try:
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size())
    finally:
        dist.destroy_process_group()
