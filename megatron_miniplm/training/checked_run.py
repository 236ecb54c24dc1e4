"""A run that may start, and what follows from what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_miniplm.core.config import to_flat
from megatron_miniplm.core.manifest import read_manifest
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.models.checkpoint import TrainedModel, read_trained_model, verify_checkpoint
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.flops import count_parameters, flops_per_token, share_beside_teacher
from megatron_miniplm.models.weights import Weights
from megatron_miniplm.objectives.objective import Objective
from megatron_miniplm.parallel.topology import Layout
from megatron_miniplm.teachers.teacher import Teacher
from megatron_miniplm.training.estimate import MemorySetting, checkpoint_bytes
from megatron_miniplm.training.forecast import Work
from megatron_miniplm.training.resume import Counters, Parents
from megatron_miniplm.training.run_config import RunConfig

_INITIAL = "initial_weights"


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """A run that may start: what it reads is open, fits together, and nothing is written yet."""

    config: RunConfig
    """With its number of updates settled."""
    shape: ModelConfig
    described: TrainedModel
    """What checkpoints say of the model, at the start."""
    data: Blend
    valid_sets: Mapping[str, Corpus]
    dtype: torch.dtype
    objective: Objective
    teacher: Teacher | None
    initial: Weights | None
    """Other weights to start from."""
    sources: Parents
    """What every update reads, by role."""
    resume_from: Path | None
    """The checkpoint that it continues; None to begin."""

    @property
    def flat(self) -> dict[str, Any]:
        """The run's flags."""
        return {**to_flat(self.config), **asdict(self.shape)}

    @property
    def flops_per_token(self) -> int:
        """What its training makes of an update, without the teacher and what is written."""
        once = flops_per_token(self.shape, self.data.language.seq_length)
        return self.objective.updates_per_batch * once

    @property
    def teacher_flops_per_token(self) -> float:
        """What the teacher adds to an update."""
        if self.teacher is None:
            return 0.0
        return self.objective.teacher_passes * self.teacher.flops_per_token

    @property
    def times_plain(self) -> float:
        """Work of an update over that of a plain one, as --align-flops-to counts it."""
        share = share_beside_teacher(
            student=count_parameters(self.shape),
            teacher=self.teacher.num_parameters if self.teacher else 0,
            student_passes=self.objective.student_passes,
            teacher_passes=self.objective.teacher_passes,
        )
        return float(1 / share)

    @property
    def done(self) -> Counters:
        """Of the checkpoint that it continues."""
        if self.resume_from is None:
            return Counters()
        _, found = read_trained_model(self.resume_from)
        return Counters(iteration=found.iteration, consumed_samples=found.consumed_samples)

    @property
    def updates_left(self) -> int:
        """Of the run, after that checkpoint."""
        done = self.done
        return self.config.training.updates_left(done.iteration, done.consumed_samples)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint on disk."""
        return checkpoint_bytes(
            self.shape, bf16=self.config.training.bf16,
            distributed_optimizer=self.config.optimization.use_distributed_optimizer,
        )  # fmt: skip

    def parents(self, layout: Layout) -> Parents:
        """What the model is made of, by role."""
        if self.resume_from is not None:  # whatever --load says by now
            path = self.resume_from / "manifest.json"
            manifest = read_manifest(path)
            if (began := manifest.parents.get(_INITIAL)) is None:
                return self.sources
            origin = (began.fingerprint, manifest.parent_path(path, _INITIAL))
        elif self.initial is not None:
            origin = (self.initial.shared_fingerprint(layout), self.initial.path)
        else:
            return self.sources
        return {**self.sources, _INITIAL: origin}

    def verify(self) -> None:
        """Refuse weights that are damaged: each byte is read once, as when they are loaded."""
        if self.teacher is not None:
            self.teacher.verify()
        if self.resume_from is not None:
            verify_checkpoint(self.resume_from)
        elif self.initial is not None:
            self.initial.verify()

    def setting(self, layout: Layout, device: str) -> MemorySetting:
        """What the memory of a rank depends on."""
        training = self.config.training
        return MemorySetting(
            shape=self.shape,
            layout=layout,
            virtual_stages=training.num_virtual_stages_per_pipeline_rank,
            micro_batch_size=training.micro_batch_size,
            micro_batches=training.micro_batches(layout),
            seq_length=self.data.language.seq_length,
            dtype=self.dtype,
            distributed_optimizer=self.config.optimization.use_distributed_optimizer,
            recompute=self.config.recompute,
            teacher=self.teacher.beside if self.teacher is not None else None,
            device=device,
        )

    def work(self) -> Work:
        """What its cost depends on."""
        config = self.config
        return Work(
            shape=self.shape,
            training=config.training,
            data=self.data,
            valid_sets=self.valid_sets,
            flops_per_token=self.flops_per_token,
            teacher_flops_per_token=self.teacher_flops_per_token,
            retention=config.retention,
            done=self.done,
            checkpoint=self.checkpoint_bytes,
            peak_flops=config.telemetry.peak_flops,
            mfu=config.rehearsal.dry_run_mfu,
        )
