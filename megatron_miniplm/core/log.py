"""Logging and progress: one logger, rank 0 speaks, ranks above it only warn.

Everything goes to stderr; stdout belongs to a command's answer (``inspect --json``).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

LOGGER_NAME = "megatron_miniplm"


def get_logger() -> logging.Logger:
    """The package's logger."""
    return logging.getLogger(LOGGER_NAME)


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's log to stderr; other ranks than 0 are tagged and only warn."""
    rank = int(os.environ.get("RANK", "0"))
    logger = get_logger()
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    tag = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {tag}%(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else logging.WARNING)
    logger.propagate = False


class Progress(Protocol):
    """What `progress` hands out."""

    def advance(self, amount: float = 1) -> None:
        """Count `amount` more units as done."""


class _Silent:
    def advance(self, amount: float = 1) -> None:
        pass


class _Lines:
    """Plain progress lines with rate and ETA, at most one every `interval` seconds."""

    def __init__(self, title: str, total: float | None, unit: str, interval: float = 10.0) -> None:
        self.title, self.total, self.unit, self.interval = title, total, unit, interval
        self.done, self.start = 0.0, time.monotonic()
        self.last, self.said = self.start, -1.0

    def advance(self, amount: float = 1) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last >= self.interval:
            self.last = now
            self._say(now - self.start)

    def finish(self) -> None:
        if self.said != self.done:
            self._say(time.monotonic() - self.start)

    def _say(self, elapsed: float) -> None:
        self.said = self.done
        rate = self.done / max(elapsed, 1e-9)
        of, eta = "", ""
        if self.total:
            of = f"/{self.total:,.0f}"
            eta = f", ETA {max(self.total - self.done, 0) / max(rate, 1e-9):,.0f} s"
        get_logger().info(
            "%s: %s%s %s, %s %s/s%s",
            self.title, f"{self.done:,.0f}", of, self.unit, f"{rate:,.0f}", self.unit, eta,
        )  # fmt: skip


class _Bar:
    """A rich progress bar; made only on a terminal."""

    def __init__(self, title: str, total: float | None, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.start, self.done, self.unit = time.monotonic(), 0.0, unit
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=Console(stderr=True),
        )  # fmt: skip
        self.task = self.bar.add_task(title, total=total, rate="")
        self.bar.start()

    def advance(self, amount: float = 1) -> None:
        self.done += amount
        rate = self.done / max(time.monotonic() - self.start, 1e-9)
        self.bar.update(self.task, advance=amount, rate=f"{rate:,.0f} {self.unit}/s")

    def finish(self) -> None:
        self.bar.stop()


@contextmanager
def progress(title: str, total: float | None, unit: str) -> Iterator[Progress]:
    """Progress of a long job: a bar on a terminal, plain lines otherwise, silence above rank 0."""
    if int(os.environ.get("RANK", "0")) != 0:
        yield _Silent()
        return
    shown = _Bar(title, total, unit) if sys.stderr.isatty() else _Lines(title, total, unit)
    try:
        yield shown
    finally:
        shown.finish()
