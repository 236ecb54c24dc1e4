"""One update: micro-batches through the pipeline schedule, gradients finalised, one step.

Losses arrive as (sum, count); `finalize_model_grads` sums gradients over ranks and divides them
once by the count of the whole global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_miniplm.data.instances import Batch
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.forward import run_decoder
from megatron_miniplm.models.head import Head
from megatron_miniplm.objectives.objective import Explore, LossOutput, Objective, Progress
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import Topology
from megatron_miniplm.teachers.teacher import Ask, Teacher, nothing
from megatron_miniplm.training.guard import UpdateGuard
from megatron_miniplm.training.loader import Update
from megatron_miniplm.training.optimizer import OptimizationConfig, SampleSchedule
from megatron_miniplm.training.spikes import SpikeDetector
from megatron_miniplm.training.timers import Timers


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one update tells the log; the same on every rank."""

    losses: dict[str, float]
    """Metric -> mean over the global batch, nats."""
    num_tokens: int
    """Trained positions of the global batch; 0 if the update was left out."""
    grad_norm: float | None
    """None: the update was left out, since something was wrong with it; `losses` is empty."""
    learning_rate: float
    """The rate that this update was taken with."""


def wrap_for_training(
    model: ModelChunks, optimization: OptimizationConfig, *, bf16: bool, timers: Timers
) -> list[DistributedDataParallel]:
    """Each chunk behind megatron.core's gradient buffers; gradients are reduced in fp32."""
    core = model.config
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optimization.use_distributed_optimizer,
        overlap_grad_reduce=optimization.overlap_grad_reduce,
        overlap_param_gather=optimization.overlap_param_gather,
    )
    wrapped = [
        DistributedDataParallel(core, settings, Float16Module(core, chunk) if bf16 else chunk)
        for chunk in model
    ]
    for chunk in model.decoders:
        chunk.reduction_waits = optimization.overlap_grad_reduce
    # Without this function core neither averages over DP nor syncs tied embeddings over PP.
    core.finalize_model_grads_func = timers.device("gradient reduction")(finalize_model_grads)
    no_syncs = [chunk.no_sync for chunk in wrapped]
    core.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]
    return wrapped


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """Everything that one update needs, so that the loop only has to provide batches."""

    model: ModelChunks
    wrapped: Sequence[DistributedDataParallel]
    """The chunks of `model`, as `wrap_for_training` made them."""
    optimizer: MegatronOptimizer
    scheduler: SampleSchedule
    objective: Objective
    topology: Topology
    guard: UpdateGuard
    spikes: SpikeDetector
    timers: Timers
    teacher: Teacher | None = None
    """Sees the micro-batches first; the objective gets its signals."""
    watched: Callable[[Head, Batch], Head] | None = None
    """Lets somebody see the logits of every micro-batch."""
    explore: Explore | None = None
    """Makes of the data what is learned from, with the weights as they are."""

    def __call__(self, update: Update, progress: Progress) -> StepReport:
        """Update the model with this rank's micro-batches, if losses and gradients are finite.

        `progress`: of the run, before this update.
        """
        batches: Sequence[Batch] = update.batches
        objective = self.objective.at(progress)
        if self.explore and objective.explores:
            self.finish_gathers()
            with self.timers.device("exploration"):
                batches = self.explore(batches, progress)
        signals: Sequence[Ask] = [nothing] * len(batches)
        if self.teacher and objective.needs_teacher:
            with self.timers.device("teacher"):
                signals = self.teacher(batches, update.ahead)
        report = self._update(objective, batches, signals)
        if report.grad_norm is None:
            # As in Megatron, the schedule waits; the data does not.
            return report
        for _ in range(objective.updates_per_batch - 1):
            again = self._update(objective, batches, signals)
            if again.grad_norm is None:
                break  # the weights have changed already
            report = again
        self.scheduler.step(increment=update.global_batch_size)
        return report

    def _update(
        self, objective: Objective, batches: Sequence[Batch], signals: Sequence[Ask]
    ) -> StepReport:
        """Forward and backward, a look at what came out, and the step."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        batch_size, length = batches[0].tokens_bs.shape
        with self.timers.device("forward-backward"):
            reports = get_forward_backward_func(*self.model.stages)(
                forward_step_func=partial(_forward_step, objective, self.watched),
                data_iterator=[zip(batches, signals, strict=True) for _ in self.wrapped],
                model=list(self.wrapped),
                num_microbatches=len(batches),
                seq_length=length,
                micro_batch_size=batch_size,
                forward_only=False,
            )
        losses, num_tokens = self._reduce(objective.metric_names, reports, batches)
        with self.timers.device("gradient check"):
            allowed = self.guard.allows(reports, batches, self.wrapped)
            if allowed:
                name = objective.metric_names[0]
                allowed = self.spikes.allows(name, losses[name], reports, batches)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if not allowed:
            return StepReport(losses={}, num_tokens=0, grad_norm=None, learning_rate=learning_rate)
        with self.timers.device("optimizer"):
            _, norm, _ = self.optimizer.step()
        return StepReport(
            losses=losses,
            num_tokens=num_tokens,
            grad_norm=float(norm or 0.0),
            learning_rate=learning_rate,
        )

    def finish_gathers(self) -> None:
        """Wait for weights that are still under way from other ranks, before anyone reads them."""
        for chunk in self.wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def _reduce(
        self,
        names: Sequence[str],
        reports: Sequence[dict[str, torch.Tensor]],
        batches: Sequence[Batch],
    ) -> tuple[dict[str, float], int]:
        table = torch.zeros((len(names) + 1, 2), dtype=torch.float64, device=platform.device())
        if self.topology.is_last_stage:
            for report in reports:
                table[:-1] += torch.stack([report[name] for name in names])
            table[-1, 0] = sum(batch.mask_bs.sum() for batch in batches)
            dist.all_reduce(table, group=self.topology.dp_group)
        values = self.topology.from_last_stage(table).tolist()
        losses = {
            name: total / max(count, 1.0)
            for name, (total, count) in zip(names, values, strict=False)
        }
        return losses, int(values[-1][0])


def _forward_step(
    objective: Objective,
    watched: Callable[[Head, Batch], Head] | None,
    batches: Iterator[tuple[Batch, Ask]],
    model: Any,
) -> tuple[Any, Callable[[LossOutput], tuple[torch.Tensor, torch.Tensor, Any]]]:
    batch, signal = next(batches)

    def process(head: Head) -> LossOutput:
        return objective(watched(head, batch) if watched else head, batch, signal())

    output = run_decoder(model, batch, process)
    return output, lambda loss: (loss.loss_sum, loss.count, loss.metrics)
