"""How long the parts of an update take, on every rank, without making the device wait.

On a GPU a part is timed by two events in its stream, which are read when a line is logged; on the
CPU by the clock. What the host waits for (data, files) is timed by the clock everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_miniplm.parallel import platform


class Timers:
    """Seconds of named parts since they were last read; parts may contain each other."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def device(self, name: str) -> Iterator[None]:
        """Time what the device does for these lines."""
        if platform.on_cpu():
            with self.host(name):
                yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((name, start, end))

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """Time how long this process is in these lines."""
        started = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - started)

    def read(self) -> dict[str, float]:
        """Seconds by part, in the order of their first end; then starts again from zero."""
        if self._events:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self._add(name, start.elapsed_time(end) / 1e3)
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
