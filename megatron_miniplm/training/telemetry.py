"""What a run says while it runs: Megatron's log line, JSON lines, TensorBoard.

``SAVE/metrics.jsonl`` holds one object a logged step under the names of the log line; after a
resume, rows beyond the checkpoint are dropped first, so the file reads as one uninterrupted run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import atomic_file
from megatron_miniplm.training.resume import Counters
from megatron_miniplm.training.step import StepReport

_WITH_TEACHER = "throughput with teacher (TFLOP/s/GPU)"


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
    world_size: int
    peak_flops: float | None
    """Dense peak of one device in the compute dtype; None: unknown, no MFU is said."""


@dataclass
class _Window:
    """Sums since the last logged step."""

    steps: int = 0
    skipped: int = 0
    """Of these, updates that were left out: they have no losses."""
    samples: int = 0
    tokens: int = 0
    data_wait: float = 0.0
    """Seconds that training waited for batches."""
    losses: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def add(self, report: StepReport, *, samples: int, data_wait: float) -> None:
        self.steps += 1
        self.samples += samples
        self.data_wait += data_wait
        self.skipped += report.grad_norm is None
        self.tokens += report.num_tokens
        for name, value in report.losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value


class Telemetry:
    """Writes the metrics of rank 0; on other ranks everything is a no-op."""

    def __init__(
        self,
        facts: RunFacts,
        *,
        save: Path,
        active: bool,
        tensorboard_dir: str | None = None,
        start_iteration: int = 0,
    ) -> None:
        self.facts, self.active = facts, active
        self.path = save / "metrics.jsonl"
        self.window = _Window()
        self.add_scalar: Callable[[str, float, int], Any] = lambda *unused: None
        if active:
            drop_rows_after(self.path, start_iteration)
            if tensorboard_dir:
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(tensorboard_dir, purge_step=start_iteration + 1)
                self.add_scalar = writer.add_scalar

    def step(
        self,
        counters: Counters,
        report: StepReport,
        *,
        global_batch_size: int,
        data_wait: float,
        log_now: bool,
    ) -> None:
        """Count the update that led to `counters`; say it when it is one of the logged ones.

        `data_wait`: seconds that it waited for its batches.
        """
        self.window.add(report, samples=global_batch_size, data_wait=data_wait)
        if not log_now:
            return
        if self.active:
            row = self._row(counters, report, global_batch_size)
            get_logger().info("%s", log_line(row, self.facts.train_iters))
            self._write(row)
            names = ("learning rate", "grad norm", "tokens per second", "data wait")
            progress = (name for name in row if name.startswith("epochs ("))
            for name in (*names, *progress, *self.window.losses):
                if name in row:
                    self.add_scalar(name.replace(" ", "-"), row[name], counters.iteration)
        self.window = _Window()

    def validation(
        self, counters: Counters, losses: Mapping[str, float], *, seconds: float
    ) -> None:
        """Say the losses on held-out data; the `seconds` it took do not count as training."""
        self.window.started += seconds
        if not self.active:
            return
        said = " | ".join(
            f"{name} value: {value:.6E} | {name} PPL: {math.exp(min(value, 700)):.6E}"
            for name, value in losses.items()
        )
        at, samples = counters.iteration, counters.consumed_samples
        get_logger().info(" validation loss at iteration %d | %s | ", at, said)
        self._write({"iteration": at, "consumed_samples": samples, "validation": dict(losses)})
        for name, value in losses.items():
            self.add_scalar(f"{name.replace(' ', '-')}-validation", value, at)

    def _row(
        self, counters: Counters, report: StepReport, global_batch_size: int
    ) -> dict[str, Any]:
        window, facts = self.window, self.facts
        seconds = max(time.monotonic() - window.started, 1e-9)
        flops = facts.flops_per_sample * window.samples / seconds / facts.world_size
        row: dict[str, Any] = {
            "iteration": counters.iteration,
            "consumed_samples": counters.consumed_samples,
            "consumed_tokens": counters.consumed_tokens,
            "iteration time (ms)": 1e3 * seconds / window.steps,
            "tokens per second": window.tokens / seconds,
            "throughput (TFLOP/s/GPU)": flops / 1e12,
            "learning rate": report.learning_rate,
            "global batch size": global_batch_size,
            **{
                name: total / (window.steps - window.skipped)
                for name, total in window.losses.items()
            },
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
        row["data wait"] = window.data_wait / seconds
        row |= facts.data_progress(counters.consumed_samples)
        left = facts.train_samples - counters.consumed_samples
        row["eta (s)"] = left * seconds / window.samples
        return row

    def _write(self, row: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def log_line(row: Mapping[str, Any], train_iters: int) -> str:
    """Megatron's training log line, with tokens/s, MFU and ETA appended."""
    rates = (
        "iteration", "consumed_samples", "consumed_tokens", "iteration time (ms)", "mfu",
        "tokens per second", "throughput (TFLOP/s/GPU)", _WITH_TEACHER, "mfu with teacher",
        "learning rate",
        "global batch size", "grad norm", "skipped iterations", "eta (s)", "data wait",
    )  # fmt: skip
    progress = ("consumed samples (", "epochs (")
    parts = [
        f" iteration {row['iteration']:8d}/{train_iters:8d}",
        f"consumed samples: {row['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {row['iteration time (ms)']:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {row['throughput (TFLOP/s/GPU)']:.1f}",
        f"learning rate: {row['learning rate']:.6E}",
        f"global batch size: {row['global batch size']:5d}",
        *(
            f"{name}: {value:.6E}"
            for name, value in row.items()
            if name not in rates and not name.startswith(progress)
        ),
        f"grad norm: {row['grad norm']:.3f}" if "grad norm" in row else "grad norm: none",
        f"number of skipped iterations: {row.get('skipped iterations', 0):3d}",
        *(f"{name}: {row[name]:.3f}" for name in row if name.startswith("epochs (")),
        f"tokens/s: {row['tokens per second']:,.0f}",
        f"data wait: {100 * row['data wait']:.1f}%",
    ]
    if _WITH_TEACHER in row:
        parts.append(f"{_WITH_TEACHER}: {row[_WITH_TEACHER]:.1f}")
    if "mfu" in row:
        parts.append(f"MFU: {100 * row['mfu']:.1f}%")
    parts.append(f"ETA: {row['eta (s)']:,.0f} s")
    return " | ".join(parts) + " |"


def drop_rows_after(path: Path, iteration: int) -> None:
    """Keep the rows of metrics.jsonl up to `iteration`; a line cut by a kill is dropped too."""
    if not path.exists():
        return
    kept: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["iteration"] <= iteration:
            kept.append(line)
    with atomic_file(path) as file:
        file.writelines(kept)
