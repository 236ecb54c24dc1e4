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

from megatron_miniplm.core.lines import LineFile
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import atomic_file
from megatron_miniplm.training.step import StepReport

_WITH_TEACHER = "throughput with teacher (TFLOP/s/GPU)"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Constants of a run that turn times into rates."""

    train_iters: int
    global_batch_size: int
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
    tokens: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def add(self, report: StepReport) -> None:
        self.steps += 1
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
        self.lines = LineFile(save / "metrics.jsonl")
        self.window = _Window()
        self.add_scalar: Callable[[str, float, int], Any] = lambda *unused: None
        if active:
            drop_rows_after(self.lines.path, start_iteration)
            if tensorboard_dir:
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(tensorboard_dir, purge_step=start_iteration + 1)
                self.add_scalar = writer.add_scalar

    def step(
        self, iteration: int, report: StepReport, *, consumed_tokens: int, log_now: bool
    ) -> None:
        """Count one update; say it when it is one of the logged ones."""
        self.window.add(report)
        if not log_now:
            return
        if self.active:
            row = self._row(iteration, report, consumed_tokens)
            get_logger().info("%s", log_line(row, self.facts.train_iters))
            self._write(row)
            for name in ("learning rate", "grad norm", "tokens per second", *self.window.losses):
                if name in row:
                    self.add_scalar(name.replace(" ", "-"), row[name], iteration)
        self.window = _Window()

    def validation(self, iteration: int, losses: Mapping[str, float], *, seconds: float) -> None:
        """Say the losses on held-out data; the `seconds` it took do not count as training."""
        self.window.started += seconds
        if not self.active:
            return
        said = " | ".join(
            f"{name} value: {value:.6E} | {name} PPL: {math.exp(min(value, 700)):.6E}"
            for name, value in losses.items()
        )
        get_logger().info(" validation loss at iteration %d | %s | ", iteration, said)
        samples = iteration * self.facts.global_batch_size
        self._write(
            {"iteration": iteration, "consumed_samples": samples, "validation": dict(losses)}
        )
        for name, value in losses.items():
            self.add_scalar(f"{name.replace(' ', '-')}-validation", value, iteration)

    def _row(self, iteration: int, report: StepReport, consumed_tokens: int) -> dict[str, Any]:
        window, facts = self.window, self.facts
        seconds = max(time.monotonic() - window.started, 1e-9)
        samples = window.steps * facts.global_batch_size
        flops = facts.flops_per_sample * samples / seconds / facts.world_size
        row: dict[str, Any] = {
            "iteration": iteration,
            "consumed_samples": iteration * facts.global_batch_size,
            "consumed_tokens": consumed_tokens,
            "iteration time (ms)": 1e3 * seconds / window.steps,
            "tokens per second": window.tokens / seconds,
            "throughput (TFLOP/s/GPU)": flops / 1e12,
            "learning rate": report.learning_rate,
            "global batch size": facts.global_batch_size,
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
        row["eta (s)"] = (facts.train_iters - iteration) * seconds / window.steps
        return row

    def _write(self, row: Mapping[str, Any]) -> None:
        self.lines.add(json.dumps(row))


def log_line(row: Mapping[str, Any], train_iters: int) -> str:
    """Megatron's training log line, with tokens/s, MFU and ETA appended."""
    rates = (
        "iteration", "consumed_samples", "consumed_tokens", "iteration time (ms)", "mfu",
        "tokens per second", "throughput (TFLOP/s/GPU)", _WITH_TEACHER, "mfu with teacher",
        "learning rate",
        "global batch size", "grad norm", "skipped iterations", "eta (s)",
    )  # fmt: skip
    parts = [
        f" iteration {row['iteration']:8d}/{train_iters:8d}",
        f"consumed samples: {row['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {row['iteration time (ms)']:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {row['throughput (TFLOP/s/GPU)']:.1f}",
        f"learning rate: {row['learning rate']:.6E}",
        f"global batch size: {row['global batch size']:5d}",
        *(f"{name}: {value:.6E}" for name, value in row.items() if name not in rates),
        f"grad norm: {row['grad norm']:.3f}" if "grad norm" in row else "grad norm: none",
        f"number of skipped iterations: {row.get('skipped iterations', 0):3d}",
        f"tokens/s: {row['tokens per second']:,.0f}",
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
