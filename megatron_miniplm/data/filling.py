"""How the ranks of a job, and the jobs of an array, fill one folder window by window.

Rank 0 starts the folder and the others join it; data-parallel ranks take the missing windows in
turn; whoever is killed loses the window at hand, and the same command goes on with the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from megatron_miniplm.core.errors import ConfigError, DataError, MiniPLMError
from megatron_miniplm.core.log import get_logger, progress
from megatron_miniplm.data.windowed import WindowedWriter
from megatron_miniplm.parallel.topology import Topology

W = TypeVar("W", bound=WindowedWriter)
_POLL_S = 0.05


class Windows(Protocol):
    """What is filled: a `WindowedWriter`, or what has its windows."""

    @property
    def path(self) -> Path:
        """The artifact, as messages name it."""
        ...

    def todo(self, shard: tuple[int, int], /) -> list[int]:
        """Windows not yet written, of those that fall to job i of n (``shard = (i, n)``)."""
        ...

    def rows(self, number: int, /) -> Sized:
        """The rows of one window."""
        ...

    def finish(self) -> bool:
        """Make the artifact if every window is there; False while other jobs still run."""
        ...


@dataclass(frozen=True, kw_only=True)
class FillConfig:
    """This job's part in filling --output."""

    shard: str = "0/1"
    """Job i of n of an array (``--shard i/n``); all jobs fill one folder."""
    overwrite: bool = False
    """Remove what is in --output and start over (not with --shard)."""

    def __post_init__(self) -> None:
        _, jobs = self.job
        if self.overwrite and jobs > 1:
            raise ConfigError(
                "--overwrite with --shard would remove what the other jobs write: remove the "
                "folder once, before they start"
            )

    @property
    def job(self) -> tuple[int, int]:
        """(i, n) of --shard i/n."""
        number, _, count = self.shard.partition("/")
        if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
            raise ConfigError(f"--shard {self.shard}: write i/n with 0 <= i < n")
        return int(number), int(count)

    def open(self, make: Callable[[bool], W], topology: Topology) -> W:
        """The writer on every rank (a collective); `make(overwrite)` opens it."""

        def make_first() -> W:
            # --overwrite replaces finished work and another job's, never its own progress.
            if not self.overwrite:
                return make(False)
            try:
                writer = make(False)
            except MiniPLMError:
                return make(True)
            return make(True) if writer.finished else writer

        made: list[W] = []
        topology.from_rank0(lambda: made.append(make_first()))
        return made[0] if made else make(False)

    def windows(self, writer: Windows, topology: Topology) -> list[int]:
        """The missing windows that this rank is to fill (a collective)."""
        # Dealt after the finished ones are left out, so that every rank has its share of the rest.
        todo = topology.from_rank0(lambda: writer.todo(self.job))
        return todo[topology.dp_rank :: topology.dp_size]

    def fill(
        self, writer: Windows, topology: Topology, title: str, act: Callable[[int], None]
    ) -> None:
        """`act` of every missing window of this rank, which writes it (a collective)."""
        mine = self.windows(writer, topology)
        rows = sum(len(writer.rows(number)) for number in mine)
        with progress(f"{title} (this rank)", rows, "instances") as bar:
            for number in mine:
                act(number)
                bar.advance(len(writer.rows(number)))

    def finish(self, writer: Windows, topology: Topology) -> bool:
        """Whether the artifact is complete, by this job; rank 0 waits for the others' windows."""
        if topology.rank != 0:
            return False
        # No collective waits for the slowest rank: a window may take longer than its timeout. A
        # rank that died ends this one too (torchrun).
        while writer.todo(self.job):
            time.sleep(_POLL_S)
        if writer.finish():
            return True
        if self.job[1] == 1:
            raise DataError(f"windows of {writer.path} vanished while it was filled: run it again")
        get_logger().info("this job is done; %s is complete when the others are", writer.path)
        return False
