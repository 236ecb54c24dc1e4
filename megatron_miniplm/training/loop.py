"""The training loop. It never learns which method it is serving.

One update after another as the loader gives them, and between updates: log, validate, save, and
look whether to stop.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.models.checkpoint import SaveFailedError, TrainedModel
from megatron_miniplm.models.flops import FORWARD_AND_BACKWARD, nearest, share_beside_teacher
from megatron_miniplm.parallel.topology import Layout, Topology
from megatron_miniplm.training.batch_size import BatchConfig
from megatron_miniplm.training.guard import NotFiniteError
from megatron_miniplm.training.loader import Loader, Update
from megatron_miniplm.training.resume import Counters, TrainingState
from megatron_miniplm.training.step import TrainStep
from megatron_miniplm.training.telemetry import DATA_WAIT, Telemetry
from megatron_miniplm.training.validation import held_out_losses

_AT_LEAST_ONE = (
    "micro_batch_size", "global_batch_size", "eval_interval", "eval_iters", "save_interval",
    "exit_interval", "train_iters", "train_samples", "align_flops_to",
    "num_virtual_stages_per_pipeline_rank",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(BatchConfig):
    """Length, batches and cadence of a run."""

    num_virtual_stages_per_pipeline_rank: int = 1
    """Interleaved pipeline: runs of layers on every rank; above 1, the pipeline fills in a fraction
    of the time and exchanges more messages."""
    train_iters: int | None = None
    """Updates; or give --train-samples."""
    train_samples: int | None = None
    """Instances to train on in all, over as many epochs as that takes."""
    align_flops_to: int | None = None
    """Beside a teacher: as many updates as cost what --train-iters updates without it would, at the
    nearest multiple of this (the paper: 5000; 1: exactly)."""
    seed: int = 10
    """Seed of initial weights and data order."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights; otherwise fp32."""
    eval_interval: int = 1000
    """Updates between two validations."""
    eval_iters: int | None = None
    """Validate on this many global batches; default: on all held-out instances."""
    save_interval: int | None = None
    """Updates between two checkpoints; default: only at the end."""
    async_save: bool = False
    """Copy what is to be saved to host memory, and train on while it is written."""
    on_nan_skip: int = 0
    """Leave out up to so many updates in a row whose loss or gradient is not finite; default: stop
    at the first, before it reaches the weights."""
    exit_interval: int | None = None
    """Save and exit when the iteration is a multiple of this."""
    exit_duration_in_mins: float | None = None
    """Save and exit this many minutes after the process was started."""
    exit_signal_handler: bool = True
    """On SIGTERM or SIGUSR1: finish the update, save, exit with code 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.train_iters is None) == (self.train_samples is None):
            raise ConfigError("give one of --train-iters and --train-samples")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.on_nan_skip < 0:
            raise ConfigError(f"--on-nan-skip {self.on_nan_skip} must not be negative")
        if self.iterations < 1:
            raise ConfigError(
                f"--train-samples {self.train_samples} is less than one global batch of "
                f"{self.size_after(0)}"
            )

    def aligned(
        self,
        *,
        student: int,
        teacher: int,
        student_passes: int = FORWARD_AND_BACKWARD,
        teacher_passes: int = 1,
        plain_samples: int = 0,
    ) -> TrainingConfig:
        """The same with as many updates as --align-flops-to asks for beside such a teacher.

        Counts are parameters of the models, 0 for no teacher in the step; passes are forward passes
        that a token costs of each, after so many samples that are trained on without a teacher.
        """
        if self.align_flops_to is None:
            return self
        if not teacher or self.train_iters is None:
            raise ConfigError(
                "--align-flops-to lowers --train-iters for the work of a teacher: it needs both, "
                "--train-iters and a --teacher that runs in the step"
            )
        share = share_beside_teacher(
            student=student, teacher=teacher,
            student_passes=student_passes, teacher_passes=teacher_passes,
        )  # fmt: skip
        budget = self.samples_after(self.train_iters)
        # An update belongs to the phase in which it begins.
        plain = min(budget, self.samples_begun(plain_samples))
        exact = self.updates_of(plain + share * (budget - plain))
        iterations = nearest(exact, self.align_flops_to)
        return replace(self, train_iters=iterations, align_flops_to=None)

    @property
    def iterations(self) -> int:
        """Updates of the whole run; a batch that --train-samples would cut is left out."""
        if self.train_iters is not None:
            return self.train_iters
        return int(self.updates_of(self.train_samples or 0))

    @property
    def samples_in_all(self) -> int:
        """What the whole run may consume."""
        return self.train_samples or self.samples_after(self.iterations)

    def updates_left(self, iteration: int, consumed: int) -> int:
        """Updates after so many updates and samples.

        Of --train-samples the samples count, since earlier updates may have had another size.
        """
        if self.train_iters is not None:
            return max(0, self.train_iters - iteration)
        count = 0
        while consumed + (size := self.size_after(consumed)) <= self.samples_in_all:
            if size == self.global_batch_size:  # the last size
                return count + (self.samples_in_all - consumed) // size
            consumed, count = consumed + size, count + 1
        return count

    def refuse_misfits(self, layout: Layout) -> None:
        """Refuse sizes of updates that do not divide over micro-batches, ranks and stages."""
        per_pass = self.micro_batch_size * layout.dp_size
        chunks = self.num_virtual_stages_per_pipeline_rank
        for size in self.batch_sizes:
            said = f"--global-batch-size {size}"
            if size != self.global_batch_size:
                said += " (of --rampup-batch-size)"
            if size % per_pass:
                raise ConfigError(
                    f"{said} is not a multiple of --micro-batch-size {self.micro_batch_size} x "
                    f"{layout.dp_size} data-parallel ranks"
                )
            count = size // per_pass
            if chunks > 1 and count % layout.pp_size:
                raise ConfigError(
                    f"--num-virtual-stages-per-pipeline-rank {chunks} needs a multiple of "
                    f"{layout.pp_size} (--pipeline-model-parallel-size) micro-batches, but "
                    f"{said} makes {count}"
                )

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches of one rank in an update of full size."""
        return self.global_batch_size // (self.micro_batch_size * layout.dp_size)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A run, ready to go."""

    config: TrainingConfig
    topology: Topology
    loader: Loader
    valid_sets: Mapping[str, Corpus]
    """Held-out data by name."""
    step: TrainStep
    state: TrainingState
    telemetry: Telemetry
    model: TrainedModel
    """What a checkpoint says of the model, but for how far it is."""

    def run(self, counters: Counters) -> bool:
        """Train from `counters` on; True when the run is complete, False when told to stop."""
        stop = StopRequest(self.config)
        left = self.config.updates_left(counters.iteration, counters.consumed_samples)
        end = counters.iteration + left
        for update in self.loader.updates(counters.consumed_samples, left):
            try:
                self._update(update, counters)
            except NotFiniteError:
                self._keep_last_save()
                raise
            last = counters.iteration == end
            if self.valid_sets and (last or counters.iteration % self.config.eval_interval == 0):
                self._validate(counters)
            stopping = self.topology.any_rank(stop.wanted(counters.iteration))
            interval = self.config.save_interval
            if last or stopping or (interval and counters.iteration % interval == 0):
                self._save(counters, final=last or stopping)
            else:
                self._finish_save(wait=False)
            if stopping and not last:
                get_logger().info(
                    "stopping at iteration %d, saved: the same command continues",
                    counters.iteration,
                )
                return False
        return True

    def _save(self, counters: Counters, *, final: bool) -> None:
        """Save; only a `final` one must not fail: after others the run goes on."""
        self._finish_save(wait=True)
        self.step.finish_gathers()
        trained = replace(
            self.model, iteration=counters.iteration, consumed_samples=counters.consumed_samples
        )
        background = self.config.async_save and not final
        try:
            with self.telemetry.aside("save"):
                self.state.save(trained, counters, background=background)
        except SaveFailedError as error:
            if final:
                raise
            self._say_failed(error)

    def _finish_save(self, *, wait: bool) -> None:
        """Finish the save that is under way in the background, if there is one."""
        try:
            with self.telemetry.aside("save"):
                self.state.finish_save(wait=wait)
        except SaveFailedError as error:
            self._say_failed(error)

    def _keep_last_save(self) -> None:
        """Keep the save that is under way, on the way out of an error that all ranks raise."""
        try:
            self.state.finish_save(wait=True)
        except SaveFailedError as error:
            get_logger().error("%s; the earlier checkpoints are as they were", error)

    def _say_failed(self, error: SaveFailedError) -> None:
        get_logger().error(
            "%s; training goes on from memory, the earlier checkpoints are as they were, and the "
            "next save is due after %s updates",
            error, self.config.save_interval,
        )  # fmt: skip

    def _update(self, update: Update, counters: Counters) -> None:
        self.telemetry.timers.add(DATA_WAIT, update.waited)
        progress = self.step.scheduler.progress(
            counters.consumed_samples, self.config.samples_in_all
        )
        report = self.step(update, progress)
        counters.iteration += 1
        counters.consumed_samples += update.global_batch_size
        counters.consumed_tokens += report.num_tokens
        self.telemetry.step(counters, report, global_batch_size=update.global_batch_size)

    def _validate(self, counters: Counters) -> None:
        self.step.finish_gathers()
        iters = self.config.eval_iters
        with self.telemetry.aside("validation"):
            losses = held_out_losses(
                self.state.model,
                self.valid_sets,
                most=iters and iters * self.config.global_batch_size,
                micro_batch_size=self.config.micro_batch_size,
                topology=self.topology,
            )
        self.telemetry.validation(counters, losses)


class StopRequest:
    """Whether this rank has a reason to stop: a signal, a number of updates, or the time."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        # Of the process, as a scheduler counts: starting up takes minutes, too.
        self.started = psutil.Process().create_time()
        self.signalled = False
        if config.exit_signal_handler:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._on_signal)

    def wanted(self, iteration: int) -> bool:
        """Asked after every update; the ranks agree on the answer by a collective."""
        config = self.config
        minutes = (time.time() - self.started) / 60
        return (
            self.signalled
            or (config.exit_interval is not None and iteration % config.exit_interval == 0)
            or (config.exit_duration_in_mins is not None and minutes > config.exit_duration_in_mins)
        )

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signalled = True
