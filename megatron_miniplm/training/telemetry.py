"""What a run says while it runs: one row a logged update, as Megatron's log line and in sinks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_miniplm.core.lines import read_objects
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.ranks import ONE_RANK, Ranks
from megatron_miniplm.training.resume import Counters
from megatron_miniplm.training.sinks import Row, Sink
from megatron_miniplm.training.step import StepReport
from megatron_miniplm.training.timers import Timers

_WITH_TEACHER = "throughput with teacher (TFLOP/s/GPU)"
_TIMES_PLAIN = "FLOPs (x 6 N D)"
_HOURS = "GPU-hours"
_MEMORY = "peak memory (GiB)"
DATA_WAIT = "data wait"
"""The timer of what training waits for its batches."""


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """What the log says."""

    log_interval: int = 10
    """Updates between two log lines."""
    timing_log_level: Literal[0, 1] = 0
    """1: also log how long the parts of an update took (metrics.jsonl always has it)."""
    peak_tflops: float | None = None
    """Dense peak of one device in TFLOP/s, for MFU; default: known for common GPUs."""

    @property
    def peak_flops(self) -> float | None:
        """The same in FLOP/s."""
        return None if self.peak_tflops is None else self.peak_tflops * 1e12


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Constants of a run that turn times into rates."""

    train_iters: int
    train_samples: int
    """Samples that these consume."""
    data_progress: Callable[[int], Mapping[str, float]] = lambda consumed: {}
    """Metric -> value: how far each corpus is, after so many samples."""
    flops_per_sample: float
    """Megatron's formula, forward and backward, per sequence slot of full length."""
    teacher_flops_per_sample: float = 0.0
    """What a teacher adds to that; it is said beside it, and not in it."""
    times_plain: float = 1.0
    """FLOPs of all that an update takes over those of a plain one, as --align-flops-to counts."""
    plain_samples: int = 0
    """Samples of the updates before that, each of which is a plain one."""
    peak_flops: float | None
    """Dense peak of one device in the compute dtype; None: unknown, no MFU is said."""
    hours_before: float = 0.0
    """GPU-hours of earlier starts of this run."""


@dataclass
class _Window:
    """Sums since the last logged update."""

    steps: int = 0
    skipped: int = 0
    """Of these, updates that were left out: they have no losses."""
    samples: int = 0
    tokens: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> its values; an update need not have all of them."""
    started: float = field(default_factory=time.monotonic)

    def add(self, report: StepReport, samples: int) -> None:
        self.steps += 1
        self.skipped += report.grad_norm is None
        self.samples += samples
        self.tokens += report.num_tokens
        for name, value in report.losses.items():
            self.losses.setdefault(name, []).append(value)


class Telemetry:
    """Gathers from all ranks; rank 0, the one that has sinks, says it."""

    def __init__(
        self,
        facts: RunFacts,
        *,
        sinks: Sequence[Sink],
        timers: Timers,
        config: TelemetryConfig = TelemetryConfig(),
        ranks: Ranks = ONE_RANK,
    ) -> None:
        self.facts, self.config, self.ranks = facts, config, ranks
        self.sinks, self.timers = sinks, timers
        self.window = _Window()
        self.began = time.monotonic()

    def step(self, counters: Counters, report: StepReport, *, global_batch_size: int) -> None:
        """Count one update, after which the run is at `counters`; say it if it is one to log."""
        self.window.add(report, global_batch_size)
        at = counters.iteration
        if at % self.config.log_interval and at != self.facts.train_iters:
            return
        everywhere = self.ranks.gather((self.timers.read(), platform.peak_memory()))
        if self.ranks.rank == 0:
            row = self._row(counters, report, global_batch_size)
            row[_MEMORY] = max(memory for _, memory in everywhere) / 2**30
            parts = _slowest_and_fastest([seconds for seconds, _ in everywhere], self.window.steps)
            if DATA_WAIT in parts:
                row[DATA_WAIT] = parts[DATA_WAIT][1] / row["iteration time (ms)"]
            row["timers (ms)"] = parts
            line = log_line(row, self.facts.train_iters, losses=self.window.losses)
            get_logger().info("%s", line)
            if self.config.timing_log_level:
                get_logger().info("%s", timer_lines(parts))
            self._write(row)
        self.window = _Window()

    @contextmanager
    def aside(self, part: str) -> Iterator[None]:
        """Time these lines as that part, and not as training."""
        started = time.monotonic()
        try:
            with self.timers.host(part):
                yield
        finally:
            self.window.started += time.monotonic() - started

    def validation(self, counters: Counters, losses: Mapping[str, float]) -> None:
        """Say the losses on held-out data."""
        if self.ranks.rank != 0:
            return
        said = " | ".join(
            f"{name} value: {value:.6E} | {name} PPL: {math.exp(min(value, 700)):.6E}"
            for name, value in losses.items()
        )
        at = counters.iteration
        get_logger().info(" validation loss at iteration %d | %s | ", at, said)
        row = {"iteration": at, "consumed_samples": counters.consumed_samples}
        self._write({**row, "validation": dict(losses)})

    def close(self, *, failed: bool) -> None:
        """Let every sink write what it holds back; `failed`: an error ended the run."""
        for sink in self.sinks:
            sink.close(failed=failed)

    def _write(self, row: Row) -> None:
        for sink in self.sinks:
            sink.write(row)

    def _row(
        self, counters: Counters, report: StepReport, global_batch_size: int
    ) -> dict[str, Any]:
        window, facts = self.window, self.facts
        now = time.monotonic()
        seconds = max(now - window.started, 1e-9)
        flops = facts.flops_per_sample * window.samples / seconds / self.ranks.size
        row: dict[str, Any] = {
            **vars(counters),
            "world size": self.ranks.size,
            "iteration time (ms)": 1e3 * seconds / window.steps,
            "tokens per second": window.tokens / seconds,
            "throughput (TFLOP/s/GPU)": flops / 1e12,
            "learning rate": report.learning_rate,
            "global batch size": global_batch_size,
            **{name: sum(values) / len(values) for name, values in window.losses.items()},
        }
        if report.grad_norm is not None:
            row["grad norm"] = report.grad_norm
        if window.skipped:
            row["skipped iterations"] = window.skipped
        if facts.peak_flops:
            row["mfu"] = flops / facts.peak_flops
        if facts.teacher_flops_per_sample:
            both = flops * (1 + facts.teacher_flops_per_sample / facts.flops_per_sample)
            row[_WITH_TEACHER] = both / 1e12
            if facts.peak_flops:
                row["mfu with teacher"] = both / facts.peak_flops
        if facts.times_plain != 1:
            before = counters.consumed_samples - window.samples
            plain = min(max(facts.plain_samples - before, 0), window.samples) / window.samples
            row[_TIMES_PLAIN] = plain + (1 - plain) * facts.times_plain
        row |= facts.data_progress(counters.consumed_samples)
        left = facts.train_samples - counters.consumed_samples
        row["eta (s)"] = left * seconds / window.samples
        row[_HOURS] = facts.hours_before + self.ranks.size * (now - self.began) / 3600
        return row


def hours_so_far(metrics: Path) -> float:
    """GPU-hours that the last row of a metrics.jsonl says; those of work that a kill lost count."""
    return max((row.get(_HOURS, 0.0) for row in read_objects(metrics)), default=0.0)


def log_line(row: Row, train_iters: int, *, losses: Collection[str]) -> str:
    """Megatron's training log line, with tokens/s, MFU and ETA appended."""
    parts = [
        f" iteration {row['iteration']:8d}/{train_iters:8d}",
        f"consumed samples: {row['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {row['iteration time (ms)']:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {row['throughput (TFLOP/s/GPU)']:.1f}",
        f"learning rate: {row['learning rate']:.6E}",
        f"global batch size: {row['global batch size']:5d}",
        *(f"{name}: {row[name]:.6E}" for name in losses),
        f"grad norm: {row['grad norm']:.3f}" if "grad norm" in row else "grad norm: none",
        f"number of skipped iterations: {row.get('skipped iterations', 0):3d}",
        *(f"{name}: {row[name]:.3f}" for name in row if name.startswith("epochs (")),
        f"tokens/s: {row['tokens per second']:,.0f}",
    ]
    if _WITH_TEACHER in row:
        parts.append(f"{_WITH_TEACHER}: {row[_WITH_TEACHER]:.1f}")
    if "mfu" in row:
        parts.append(f"MFU: {100 * row['mfu']:.1f}%")
    if DATA_WAIT in row:
        parts.append(f"data wait: {100 * row[DATA_WAIT]:.1f}%")
    parts.append(f"{_MEMORY}: {row[_MEMORY]:.2f}")
    parts.append(f"GPU-hours: {row[_HOURS]:,.2f}")
    parts.append(f"ETA: {row['eta (s)']:,.0f} s")
    return " | ".join(parts) + " |"


def timer_lines(parts: Mapping[str, tuple[float, float]]) -> str:
    """Megatron's block of timers."""
    lines = (
        f"    {name + ' ':.<34}: ({fastest:.2f}, {slowest:.2f})"
        for name, (fastest, slowest) in parts.items()
    )
    return "(min, max) time across ranks (ms), per iteration:\n" + "\n".join(lines)


def _slowest_and_fastest(
    everywhere: Sequence[Mapping[str, float]], steps: int
) -> dict[str, tuple[float, float]]:
    """Part -> (fastest, slowest rank), milliseconds an update; of the ranks that have the part."""
    names = dict.fromkeys(name for seconds in everywhere for name in seconds)
    found = {}
    for name in names:
        took = [1e3 * seconds[name] / steps for seconds in everywhere if name in seconds]
        found[name] = (min(took), max(took))
    return found
