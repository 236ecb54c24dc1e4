"""What a run will do, said before it starts: size, data, work, memory, disk and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.models.checkpoint import RetentionConfig
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.flops import (
    count_parameters,
    forward_flops_per_token,
)
from megatron_miniplm.parallel.topology import Layout
from megatron_miniplm.training.estimate import StageMemory
from megatron_miniplm.training.loop import TrainingConfig
from megatron_miniplm.training.resume import Counters

_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class RehearsalConfig:
    """Everything but the training: what would be refused is, and what it would take is said."""

    dry_run: bool = False
    """Check every input, print size, memory, work and time of the run, and stop. No GPU is taken,
    nothing is written, torchrun is not needed; exit code 0 only if the run would start."""
    dry_run_world_size: int | None = None
    """With --dry-run: for so many GPUs, wherever they are; default: this machine's device and as
    many processes as torchrun started."""
    dry_run_gpu_gb: float | None = None
    """With --dry-run: refuse what does not fit into GPUs of so many GB (10^9 bytes)."""
    dry_run_mfu: float | None = None
    """With --dry-run and --peak-tflops: the model FLOPs utilisation to assume, between 0 and 1, for
    the time that it takes."""
    json: bool = False
    """With --dry-run: print JSON for machines."""

    def __post_init__(self) -> None:
        if not self.dry_run:
            for name, value in asdict(self).items():
                if value not in (None, False):
                    raise ConfigError(
                        f"--{name.replace('_', '-')} {value} has no effect without --dry-run"
                    )
        if self.dry_run_mfu is not None and not 0 < self.dry_run_mfu <= 1:
            raise ConfigError(f"--dry-run-mfu {self.dry_run_mfu} must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The facts of a run that has not begun; work is in FLOPs, sizes are in bytes."""

    device: str
    world_size: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    virtual_stages: int
    micro_batches: int
    """Of one rank in one update."""
    parameters: int
    vocabulary: int
    """Tokens of the tokenizer."""
    padded_vocabulary: int
    """Columns of the logits."""
    iterations: int
    done_iterations: int
    """Of these, what a checkpoint in --save has already."""
    samples: int
    sample_tokens: int
    """Inputs that the samples have room for."""
    trained_tokens: int
    """Inputs that they hold, at the corpus's mean length."""
    epochs: float
    data_progress: Mapping[str, float]
    """Samples and epochs of each corpus."""
    training_flops: int
    teacher_flops: int
    validation_flops: int
    stages: Sequence[StageMemory]
    checkpoint: int
    checkpoints_kept: int
    checkpoints_at_once: int
    """On disk while one is written."""
    seconds: float | None
    """None where the peak or the utilisation is not known."""

    @property
    def flops(self) -> int:
        """All the work."""
        return self.training_flops + self.teacher_flops + self.validation_flops

    def as_json(self) -> dict[str, Any]:
        """For machines, with what follows from the fields."""
        return {
            **asdict(self),
            "stages": [{**asdict(stage), "total": stage.total} for stage in self.stages],
            "memory": max(stage.total for stage in self.stages),
            "flops": self.flops,
        }


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a forecast is made of beside memory."""

    shape: ModelConfig
    training: TrainingConfig
    data: Blend
    valid_sets: Mapping[str, Corpus]
    flops_per_token: int
    """Of the student's training."""
    teacher_flops_per_token: float
    retention: RetentionConfig
    done: Counters
    """Of the checkpoint that the run continues."""
    checkpoint: int
    peak_flops: float | None
    mfu: float | None


def forecast(work: Work, layout: Layout, stages: Sequence[StageMemory], *, device: str) -> Forecast:
    """All the facts, of the whole run; the time is that of what is left of it."""
    training, data, shape = work.training, work.data, work.shape
    corpus, done = data.language, work.done
    iterations = done.iteration + training.updates_left(done.iteration, done.consumed_samples)
    samples = training.samples_after(training.iterations)
    room = samples * corpus.seq_length
    validation = _validation_samples(work)
    saves = _saves(training)
    kept = _kept(saves, work.retention)
    costs = {
        "training_flops": room * work.flops_per_token,
        "teacher_flops": round(room * work.teacher_flops_per_token),
        "validation_flops": validation
        * corpus.seq_length
        * forward_flops_per_token(shape, corpus.seq_length),
    }
    seconds = None
    if work.peak_flops and work.mfu:
        left = 1 - done.consumed_samples / samples  # updates may have had other sizes
        seconds = left * sum(costs.values()) / (layout.world_size * work.peak_flops * work.mfu)
    return Forecast(
        device=device,
        world_size=layout.world_size,
        tensor_parallel=layout.tp_size,
        pipeline_parallel=layout.pp_size,
        data_parallel=layout.dp_size,
        virtual_stages=training.num_virtual_stages_per_pipeline_rank,
        micro_batches=training.micro_batches(layout),
        parameters=count_parameters(shape),
        vocabulary=corpus.vocab_size,
        padded_vocabulary=shape.padded_vocab_size,
        iterations=iterations,
        done_iterations=done.iteration,
        samples=samples,
        sample_tokens=room,
        trained_tokens=round(samples * (data.num_tokens / len(data) - 1)),
        epochs=samples / len(data),
        data_progress=data.progress(samples),
        **costs,
        stages=stages,
        checkpoint=work.checkpoint,
        checkpoints_kept=len(kept),
        checkpoints_at_once=min(len(kept) + 1, len(saves)),
        seconds=seconds,
    )


def refuse_too_large(stages: Sequence[StageMemory], gpu_gb: float | None) -> None:
    """Refuse a run that does not fit into GPUs of that size."""
    if gpu_gb is None:
        return
    at, worst = max(enumerate(stages), key=lambda each: each[1].total)
    if worst.total > gpu_gb * _GB:
        raise ConfigError(
            f"pipeline stage {at} needs {worst.total / _GB:.1f} GB on each of its GPUs, which have "
            f"{gpu_gb:g} GB: raise --tensor-model-parallel-size or "
            "--pipeline-model-parallel-size, lower --micro-batch-size, or use "
            "--use-distributed-optimizer and --recompute-granularity full"
        )


def lines(said: Forecast) -> list[str]:
    """The forecast for people."""
    updates = f"{said.iterations:,} updates"
    if said.done_iterations:
        updates += f", of which {said.done_iterations:,} are done"
    text = [
        f"model        {said.parameters:,} parameters; {said.vocabulary:,} tokens, "
        f"{said.padded_vocabulary:,} logit columns",
        f"layout       {said.world_size:,} x {said.device}: TP {said.tensor_parallel} x PP "
        f"{said.pipeline_parallel} x DP {said.data_parallel}, {said.virtual_stages} chunk(s) a "
        f"rank, {said.micro_batches} micro-batch(es) an update",
        f"data         {updates}, {said.samples:,} instances, {said.sample_tokens:,} positions, "
        f"about {said.trained_tokens:,} of them tokens, {said.epochs:.3g} epochs",
        *(
            f"             {name}: {value:.3g}"
            for name, value in said.data_progress.items()
            if name.startswith("epochs")
        ),
        f"work         {said.flops:.3e} FLOPs: training {said.training_flops:.3e}, teacher "
        f"{said.teacher_flops:.3e}, validation {said.validation_flops:.3e}",
        f"checkpoints  {_gb(said.checkpoint)} each; {said.checkpoints_kept:,} stay, at most "
        f"{said.checkpoints_at_once:,} at once: {_gb(said.checkpoints_at_once * said.checkpoint)}",
    ]
    if said.seconds is not None:
        hours = said.seconds / 3600
        text.append(f"time         {hours:,.1f} h, {hours * said.world_size:,.0f} device hours")
    parts = [name for name in vars(said.stages[0]) if name != "parameters"]
    text.append("memory, GB on each rank of a pipeline stage (estimate; training/estimate.py):")
    text.append("  stage  parameters " + " ".join(f"{part:>15}" for part in (*parts, "total")))
    for at, stage in enumerate(said.stages):
        cells = [getattr(stage, part) for part in (*parts, "total")]
        text.append(
            f"  {at:5d} {stage.parameters:11,} " + " ".join(f"{c / _GB:15.3f}" for c in cells)
        )
    return text


def _gb(size: int) -> str:
    return f"{size / _GB:,.2f} GB"


def _saves(training: TrainingConfig) -> list[int]:
    """Iterations at which a run that nobody stops saves."""
    every = training.save_interval
    between = range(every, training.iterations, every) if every else range(0)
    return [*between, training.iterations]


def _kept(saves: Sequence[int], retention: RetentionConfig) -> list[int]:
    """Those of its checkpoints that stay."""
    if retention.save_keep_last is None:
        return list(saves)
    every = retention.save_retain_interval
    last = set(saves[-retention.save_keep_last :])
    return [at for at in saves if at in last or (every and at % every == 0)]


def _validation_samples(work: Work) -> int:
    """Instances of all validations together."""
    training = work.training
    counts = [len(corpus) for corpus in work.valid_sets.values()]
    if training.eval_iters is not None:
        most = training.eval_iters * training.global_batch_size
        counts = [min(count, most) for count in counts]
    times, rest = divmod(training.iterations, training.eval_interval)
    return sum(counts) * (times + bool(rest))
