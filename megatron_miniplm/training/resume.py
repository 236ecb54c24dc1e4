"""Where a run starts: fresh, where it was, or from other weights.

The state of a run is model, optimizer, schedule and three counters; the data pipeline adds none.
A run continues only under the configuration that it began with: what may change between two starts
is the layout, the cadence of logs and saves, and where things lie, never what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_miniplm.core.errors import CheckpointError, ConfigError, LineageError, MiniPLMError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.models.checkpoint import (
    CheckpointWriter,
    RetentionConfig,
    TrainedModel,
    checkpoint_metadata,
    complete_checkpoint,
    latest_checkpoint,
    load_state,
    read_trained_model,
    remove_old_checkpoints,
)
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.pretrained import check_same_shape
from megatron_miniplm.models.value_head import TargetScale
from megatron_miniplm.parallel.topology import Topology
from megatron_miniplm.training.spikes import SpikeDetector

Parents = Mapping[str, tuple[str, Path]]
"""Role -> (fingerprint, path) of an artifact."""

MAY_CHANGE = frozenset({
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel",
    "num_virtual_stages_per_pipeline_rank", "recompute_granularity", "recompute_method",
    "recompute_num_layers", "recompute_modules",
    "save_keep_last", "save_retain_interval", "on_nan_skip", "transformer_impl",
    "on_loss_spike", "loss_spike_stds",
    "distributed_backend", "distributed_timeout_minutes", "deterministic_mode",
    "micro_batch_size", "rollout_batch_size",
    "train_data_path", "valid_data_path", "num_workers", "save", "load", "finetune", "overwrite",
    "save_interval", "async_save", "ckpt_step", "log_interval", "eval_interval", "eval_iters",
    "tensorboard_dir",
    "exit_interval", "exit_duration_in_mins", "exit_signal_handler", "peak_tflops", "model",
    "overlap_grad_reduce", "overlap_param_gather", "timing_log_level",
    "wandb_project", "wandb_exp_name", "wandb_entity", "wandb_save_dir",
    "teacher_load", "logits_path", "logits_teacher", "teacher_scores", "reference_scores",
    # A store that is filled on the way refuses another run, truncation and encoding itself.
    "cache_logits", "truncate", "top_p", "top_k", "sampling", "sampling_draws", "sampling_power",
    "sampling_seed", "force_gold", "kd_temperatures", "value_bits", "zstd",
    "dry_run", "dry_run_world_size", "dry_run_gpu_gb", "dry_run_mfu", "json", "seq_length",
})  # fmt: skip
"""Flags that do not change what is computed (up to the order of floating-point sums)."""

MAY_CHANGE_BY_SAMPLES = frozenset({"global_batch_size", "rampup_batch_size"})
"""With --train-samples: data order and schedule are functions of the samples, so a run may go on in
updates of another size."""


@dataclass
class Counters:
    """How far a run is."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    """Trained positions so far."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything that a checkpoint of a run holds, and how to write and read it."""

    model: ModelChunks
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    topology: Topology
    config: Mapping[str, Any]
    """The run's flags, flat."""
    parents: Parents
    """Role -> (fingerprint, path) of what the model is made from: corpus, teacher, ..."""
    spikes: SpikeDetector
    writer: CheckpointWriter
    retention: RetentionConfig
    before_save: Callable[[int], None] | None = None
    """Is told the iteration before its checkpoint is written (a collective); what it raises, it
    raises on every rank: `SaveFailedError` where training may go on."""

    def save(self, trained: TrainedModel, counters: Counters, *, background: bool) -> None:
        """Write a checkpoint of this moment; `background`: `finish_save` is still to be called."""
        if self.before_save is not None:
            self.before_save(counters.iteration)
        state = self._sharded(is_loading=False)
        state["counters"] = vars(counters).copy()
        state["scheduler"] = self.scheduler.state_dict()
        state["recent_losses"] = list(self.spikes.recent)
        self.writer.start(trained, state, parents=self.parents, config=self.config, copy=background)
        if not background:
            self.finish_save(wait=True)

    def finish_save(self, *, wait: bool) -> None:
        """Finish the save that is under way once it is written, and remove what need not stay."""
        finished = self.writer.finish(wait=wait)
        if finished is not None and self.topology.rank == 0:
            saved = int(finished.name.removeprefix("iter_"))
            remove_old_checkpoints(finished.parent, self.retention, saved=saved)

    def load(self, folder: Path) -> Counters:
        """Continue from a checkpoint of this very run."""
        state = load_state(folder, self._sharded(is_loading=True), topology=self.topology)
        self.model.load_sharded(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.spikes.recent.extend(state.get("recent_losses", ()))  # older versions have none
        return Counters(**state["counters"])

    def _sharded(self, *, is_loading: bool) -> dict[str, Any]:
        state = {"model": self.model.sharded_state_dict(metadata=checkpoint_metadata())}
        state["optimizer"] = self.optimizer.sharded_state_dict(
            state, is_loading=is_loading, metadata=checkpoint_metadata()
        )
        return state


def describe_model(
    shape: ModelConfig, corpus: Corpus, targets: TargetScale | None = None
) -> TrainedModel:
    """What the checkpoints of a run say of its model, at its start."""
    return TrainedModel(
        config=shape,
        valid_vocab=corpus.vocab_size,
        tokenizer_fingerprint=corpus.manifest.content["tokenizer"]["fingerprint"],
        iteration=0,
        consumed_samples=0,
        targets=targets,
    )


@dataclass(frozen=True, kw_only=True)
class ThisRun:
    """What the command line asks for, to be compared with what is in SAVE."""

    model: TrainedModel
    sources: Parents
    """What every update reads, by role (corpus, teacher)."""
    config: Mapping[str, Any]
    """Its flags, flat."""
    defaults: Mapping[str, Any]
    """What flags are where nobody says them: so were those that an older version did not have."""


def decisive(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's flags, those that may not change between two starts."""
    may_change = MAY_CHANGE
    if flags.get("train_samples") is not None:
        may_change |= MAY_CHANGE_BY_SAMPLES
    return {name: value for name, value in flags.items() if name not in may_change}


def refuse_another_run(folder: Path, now: ThisRun) -> None:
    """Refuse to continue from a checkpoint of another shape, source or configuration."""
    manifest, found = read_trained_model(folder)
    check_same_shape(now.model.config, found.config, str(folder))
    for role, (fingerprint, path) in now.sources.items():
        parent = manifest.parents.get(role)
        if parent is None or parent.fingerprint != fingerprint:
            there = {role: parent} if parent else manifest.parents
            other = ", ".join(f"{name} {it.fingerprint}" for name, it in there.items())
            raise LineageError(
                f"{folder} was trained with {other}, but {role} is {path}, {fingerprint}: pass the "
                f"same, or --load it with --finetune and another --save"
            )
    before = {**now.defaults, **manifest.config}
    differ = [
        f"--{name.replace('_', '-')} {before.get(name)} there, {value} here"
        for name, value in decisive(now.config).items()
        if before.get(name) != value
    ]
    if differ:
        raise ConfigError(
            f"{folder} belongs to a run with other settings: {'; '.join(differ)}. Repeat them "
            "to continue it, or use another --save, or --overwrite to start over"
        )


def resume_point(save: Path, ckpt_step: int | None) -> Path | None:
    """The checkpoint from which the run in SAVE goes on: the latest, or that of --ckpt-step.

    A run that was taken back to --ckpt-step and has saved since goes on from there, so that the
    same command may be repeated.
    """
    if ckpt_step is None:
        return latest_checkpoint(save)
    with suppress(CheckpointError):  # the latest may be what it is taken back from
        if (latest := latest_checkpoint(save)) is not None:
            manifest, found = read_trained_model(latest)
            if manifest.config.get("ckpt_step") == ckpt_step and found.iteration > ckpt_step:
                return latest
    return complete_checkpoint(save, ckpt_step)


def can_continue(folder: Path, now: ThisRun) -> bool:
    """Whether `refuse_another_run` has nothing to say."""
    try:
        refuse_another_run(folder, now)
    except MiniPLMError:
        return False
    return True
