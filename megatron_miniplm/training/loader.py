"""This rank's batches, update after update, read ahead by threads.

What an update reads follows from the consumed samples alone: their order from the blend, their
number from the batch size, and this rank's part of them from its place. Threads are enough, since
reads leave the interpreter to the training. An error of a read is raised where training waits for
that update.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.instances import Batch, make_batch, rank_share
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import Topology
from megatron_miniplm.teachers.teacher import Ahead
from megatron_miniplm.training.batch_size import BatchConfig

_Read = tuple[Batch, Ahead | None]
"""A micro-batch and what goes with it, in host memory."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one update is made of."""

    batches: list[Batch]
    """This rank's micro-batches, on its device."""
    ahead: list[Ahead | None]
    """What was read for the teacher with each, on the host: it moves when its turn comes."""
    global_batch_size: int
    """Instances, over all ranks."""
    waited: float
    """Seconds that training waited for them."""


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Where the training loop gets its batches."""

    data: Blend
    config: BatchConfig
    topology: Topology
    read_ahead: Callable[[Batch], Ahead | None] | None = None
    """What else is read with a batch: a teacher's signals on a disk."""

    def updates(self, consumed: int, count: int) -> Iterator[Update]:
        """The `count` updates that follow after `consumed` samples."""
        device, workers = platform.device(), self.config.num_workers
        jobs = self._jobs(consumed, count)
        pool = ThreadPoolExecutor(max(1, workers), initializer=partial(platform.join, device))

        def begin(job: tuple[int, int]) -> tuple[int, Callable[[], list[_Read]]]:
            read = partial(self._read, *job)
            return job[1], pool.submit(read).result if workers else read

        try:
            ahead = deque(map(begin, islice(jobs, max(1, workers))))
            while ahead:
                size, get = ahead.popleft()
                started = time.monotonic()
                found = get()
                update = Update(
                    batches=[batch.to(device) for batch, _ in found],
                    ahead=[more for _, more in found],
                    global_batch_size=size,
                    waited=time.monotonic() - started,
                )
                ahead.extend(map(begin, islice(jobs, 1)))
                yield update
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _jobs(self, consumed: int, count: int) -> Iterator[tuple[int, int]]:
        """(samples before it, its own) of each update."""
        for _ in range(count):
            size = self.config.size_after(consumed)
            yield consumed, size
            consumed += size

    def _read(self, consumed: int, size: int) -> list[_Read]:
        share = rank_share(
            self.data.order.rows(consumed, size),
            micro_batch_size=self.config.micro_batch_size,
            rank=self.topology.dp_rank,
            size=self.topology.dp_size,
        )
        length = self.data.language.seq_length
        batches = [make_batch(self.data, rows, length=length) for rows in share]
        found = [(batch, self.read_ahead and self.read_ahead(batch)) for batch in batches]
        if platform.on_cpu():
            return found
        return [(batch.pinned(), more and more.pinned()) for batch, more in found]
