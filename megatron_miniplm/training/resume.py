"""Where a run starts: fresh, where it was, or from other weights.

The state of a run is model, optimizer, schedule and three counters; the data pipeline adds none.
A run continues only under the configuration that it began with: what may change between two starts
is the layout, the cadence of logs and saves, and where things lie, never what is computed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_miniplm.core.errors import CheckpointError, ConfigError, LineageError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.models.checkpoint import (
    LATEST,
    TrainedModel,
    checkpoint_metadata,
    load_state,
    read_trained_model,
    save_checkpoint,
)
from megatron_miniplm.models.convert import check_same_shape
from megatron_miniplm.models.layers import Decoder
from megatron_miniplm.parallel.topology import Topology

MAY_CHANGE = frozenset({
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel",
    "distributed_backend", "distributed_timeout_minutes", "micro_batch_size",
    "train_data_path", "valid_data_path", "save", "load", "finetune", "overwrite",
    "save_interval", "log_interval", "eval_interval", "eval_iters", "tensorboard_dir",
    "exit_interval", "exit_duration_in_mins", "exit_signal_handler", "peak_tflops", "model",
})  # fmt: skip
"""Flags that do not change what is computed (up to the order of floating-point sums)."""


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

    model: Decoder
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    topology: Topology
    corpus: Corpus
    config: Mapping[str, Any]
    """The run's flags, flat."""

    def save(self, save: Path, trained: TrainedModel, counters: Counters) -> Path:
        """Write a checkpoint of this moment."""
        state = self._sharded(is_loading=False)
        state["counters"] = vars(counters).copy()
        state["scheduler"] = self.scheduler.state_dict()
        return save_checkpoint(
            save,
            trained,
            state,
            topology=self.topology,
            parents={"corpus": self.corpus.prefix},
            parent_fingerprints={"corpus": self.corpus.fingerprint},
            config=self.config,
        )

    def load(self, folder: Path, trained: TrainedModel) -> Counters:
        """Continue from a checkpoint of this very run; refuses one of another run."""
        self._check_same_run(folder, trained)
        state = load_state(folder, self._sharded(is_loading=True), topology=self.topology)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        return Counters(**state["counters"])

    def _sharded(self, *, is_loading: bool) -> dict[str, Any]:
        state = {"model": self.model.sharded_state_dict(metadata=checkpoint_metadata())}
        state["optimizer"] = self.optimizer.sharded_state_dict(
            state, is_loading=is_loading, metadata=checkpoint_metadata()
        )
        return state

    def _check_same_run(self, folder: Path, trained: TrainedModel) -> None:
        manifest, found = read_trained_model(folder)
        check_same_shape(trained.config, found.config, str(folder))
        trained_on = manifest.parents["corpus"].fingerprint
        if trained_on != self.corpus.fingerprint:
            raise LineageError(
                f"{folder} was trained on corpus {trained_on}, but --train-data-path "
                f"{self.corpus.prefix} is {self.corpus.fingerprint}: pass the same corpus, or "
                "--load it with --finetune and another --save"
            )
        differ = [
            f"--{name.replace('_', '-')} {manifest.config.get(name)} there, {value} here"
            for name, value in self.config.items()
            if name not in MAY_CHANGE and manifest.config.get(name) != value
        ]
        if differ:
            raise ConfigError(
                f"{folder} belongs to a run with other settings: {'; '.join(differ)}. Repeat them "
                "to continue it, or use another --save, or --overwrite to start over"
            )


def start_over(save: Path) -> None:
    """Remove what an earlier run left in SAVE, and nothing else."""
    for folder in [*save.glob("iter_*"), *save.glob(".iter_*.tmp")]:
        shutil.rmtree(folder)
    for name in (LATEST, "metrics.jsonl", "run.json"):
        (save / name).unlink(missing_ok=True)


def refuse_foreign_folder(save: Path) -> None:
    """SAVE may be new, empty, or a run of ours; anything else is not overwritten."""
    if save.exists() and not save.is_dir():
        raise ConfigError(f"--save {save} is a file, not a folder")
    if save.is_dir() and any(save.iterdir()) and not (save / "run.json").exists():
        raise CheckpointError(
            f"--save {save} is not empty and holds no run (no run.json): choose another folder"
        )
