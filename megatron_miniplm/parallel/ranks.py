"""Ranks of a job that has no model: sums and gathers of numpy arrays between processes.

Data stages under torchrun only need these; gloo carries them, with GPUs or without. torch is
imported when there is more than one process, for a single one starts seconds faster without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import numpy as np

T = TypeVar("T")


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

    def gather(self, value: T) -> list[T]:
        """Everybody's value (anything that can be pickled), in rank order (a collective)."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def lead(self, act: Callable[[], T]) -> T:
        """What `act` gives rank 0, on every rank; so is the error that it raises (a collective)."""
        value, error = _attempt(act) if self.rank == 0 else (None, None)
        value, error = self.gather((value, error))[0]
        _raise(error)
        return cast(T, value)

    def own(self, act: Callable[[], T]) -> T:
        """What `act` gives this rank; an error of any rank is raised on all (a collective).

        Whatever may fail on one rank alone runs in here: the others would wait for it in vain.
        """
        value, error = _attempt(act)
        _raise(*self.gather(error))
        return cast(T, value)

    def each(self, act: Callable[[], T]) -> list[T]:
        """What `act` gives each rank, on every rank, in rank order; errors as in `own`."""
        return self.gather(self.own(act))

    def share(self, count: int) -> range:
        """The numbers below `count` that fall to this rank: a run, in rank order."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)


ONE_RANK = Ranks()


def _attempt(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:  # noqa: BLE001 - raised again on every rank
        return None, error


def _raise(*errors: Exception | None) -> None:
    """Raise the first error there is."""
    for error in errors:
        if error is not None:
            raise error


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
