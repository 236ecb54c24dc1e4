"""Runs commands that depend on each other, several at a time, and shows how far each one is.

A `Job` is a command line and a test of its artifact: a job whose artifact is complete is not run,
so the state of a run is its artifacts and nothing else. Output of a job goes to ``LOGS/NAME.log``;
its progress is read from there.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from megatron_miniplm.core.errors import ConfigError, MiniPLMError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import read_json, write_json

_STEP = re.compile(r" iteration +(\d+)/ *(\d+) .*?lm loss: ([\d.E+-]+)")
_COUNT = re.compile(r": ([\d,]+)/([\d,]+) [\w]+,")
_TICK_S, _SAY_EVERY_S, _PATIENCE_S = 0.1, 15.0, 20.0


class JobError(MiniPLMError):
    """A job failed, or ended without its artifact."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command, what it waits for, and how to see that its artifact is complete."""

    name: str
    stage: str
    """What its seconds are counted under."""
    words: Sequence[str]
    done: Callable[[], bool]
    after: Sequence[str] = ()


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def progress(self) -> tuple[float, str]:
        """(share done, words about it), from the end of the log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4096))
            tail = file.read().decode(errors="replace")
        if steps := _STEP.findall(tail):
            at, of, loss = steps[-1]
            return int(at) / int(of), f"iteration {at}/{of}, lm loss {float(loss):.3f}"
        if counts := _COUNT.findall(tail):
            at, of = (int(number.replace(",", "")) for number in counts[-1])
            return at / max(of, 1), f"{at:,}/{of:,}"
        return 0.0, ""


def run_jobs(
    jobs: Sequence[Job], *, slots: int, logs: Path, environment: Mapping[str, str]
) -> dict[str, float]:
    """Run what is not done, `slots` at a time, in order where there is a choice.

    Returns the seconds of each stage (sums over its jobs) and of the whole ("wall"), over all runs
    that it took. A failing job stops the others and raises JobError; so does an interrupt.
    """
    _refuse_loose_ends(jobs)
    logs.mkdir(parents=True, exist_ok=True)
    timing, started = logs / "seconds.json", time.monotonic()
    seconds = defaultdict(float, read_json(timing) if timing.exists() else {})
    before = seconds["wall"]
    done = {job.name for job in jobs if job.done()}
    waiting = [job for job in jobs if job.name not in done]
    running: list[_Running] = []
    with _board(len(jobs), len(done)) as board:
        try:
            while waiting or running:
                for job in [job for job in waiting if done.issuperset(job.after)]:
                    if len(running) < slots:
                        waiting.remove(job)
                        running.append(_start(job, logs, environment))
                        board.started(running[-1])
                time.sleep(_TICK_S)
                for item in [item for item in running if item.process.poll() is not None]:
                    running.remove(item)
                    seconds[item.job.stage] += item.seconds
                    seconds["wall"] = before + time.monotonic() - started
                    write_json(timing, seconds)
                    _check(item)
                    done.add(item.job.name)
                    board.finished(item)
                board.update(running)
        finally:
            _stop(running)
    return dict(seconds)


def _refuse_loose_ends(jobs: Sequence[Job]) -> None:
    seen: set[str] = set()
    for job in jobs:
        if job.name in seen or not seen.issuperset(job.after):
            raise ConfigError(f"job {job.name!r} is there twice, or waits for a later one")
        seen.add(job.name)


def _start(job: Job, logs: Path, environment: Mapping[str, str]) -> _Running:
    log = logs / f"{job.name.replace(' ', '-')}.log"
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(job.words)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            job.words, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env={**os.environ, **environment},
        )  # fmt: skip
    return _Running(job=job, process=process, log=log)


def _check(item: _Running) -> None:
    """Raise, with the end of the log, unless the job ended well and its artifact is there."""
    code = item.process.returncode
    if code == 0 and item.job.done():
        return
    tail = "\n".join(item.log.read_text(errors="replace").splitlines()[-15:])
    what = f"ended with code {code}" if code else "ended without its artifact"
    raise JobError(f"{item.job.name} {what}; the end of {item.log}:\n{tail}")


def _stop(running: Sequence[_Running]) -> None:
    """Ask what still runs to stop (training saves a checkpoint), then insist."""
    for item in running:
        item.process.terminate()
    for item in running:
        try:
            item.process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            item.process.kill()
            item.process.wait()


class _Lines:
    """Progress as plain lines: starts, ends, and now and then how far."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.said = total, done, time.monotonic()
        if done:
            get_logger().info("%d of %d steps are there already", done, total)

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *unused: object) -> None:
        pass

    def started(self, item: _Running) -> None:
        get_logger().info("%s: started", item.job.name)

    def finished(self, item: _Running) -> None:
        self.done += 1
        get_logger().info(
            "%s: done in %.0f s (%d of %d)", item.job.name, item.seconds, self.done, self.total
        )

    def update(self, running: Sequence[_Running]) -> None:
        if time.monotonic() - self.said < _SAY_EVERY_S:
            return
        self.said = time.monotonic()
        for item in running:
            share, words = item.progress()
            if words:
                get_logger().info("%s: %.0f %%, %s", item.job.name, 100 * share, words)


class _Bars:
    """Progress as one bar over all jobs and one for each that runs."""

    def __init__(self, total: int, done: int) -> None:
        self.bars = Progress(
            TextColumn("{task.description:<22}"), BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
            TextColumn("{task.fields[words]}"), console=Console(stderr=True),
        )  # fmt: skip
        self.all = self.bars.add_task("all steps", total=total, completed=done, words="")
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self.bars.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.bars.stop()

    def started(self, item: _Running) -> None:
        self.tasks[item.job.name] = self.bars.add_task(item.job.name, total=1.0, words="")

    def finished(self, item: _Running) -> None:
        self.bars.remove_task(self.tasks.pop(item.job.name))
        self.bars.advance(self.all)
        self.bars.console.print(f"{item.job.name}: {item.seconds:.0f} s")

    def update(self, running: Sequence[_Running]) -> None:
        for item in running:
            share, words = item.progress()
            self.bars.update(self.tasks[item.job.name], completed=share, words=words)


def _board(total: int, done: int) -> _Bars | _Lines:
    return _Bars(total, done) if sys.stderr.isatty() else _Lines(total, done)
