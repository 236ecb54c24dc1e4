"""The flags of a training run, and which of them contradict each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_miniplm import objectives, teachers
from megatron_miniplm.core.config import compose
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.registry import Registry
from megatron_miniplm.data.blend import LossOn
from megatron_miniplm.models.checkpoint import RetentionConfig
from megatron_miniplm.models.engine import EngineConfig
from megatron_miniplm.models.family import ModelConfig, preset_settings
from megatron_miniplm.models.recompute import RecomputeConfig
from megatron_miniplm.objectives.objective import OBJECTIVES, LossConfig
from megatron_miniplm.parallel.topology import ParallelConfig
from megatron_miniplm.teachers.teacher import TEACHERS
from megatron_miniplm.training.capture import CaptureConfig
from megatron_miniplm.training.forecast import RehearsalConfig
from megatron_miniplm.training.loop import TrainingConfig
from megatron_miniplm.training.optimizer import OptimizationConfig
from megatron_miniplm.training.sinks import SinkConfig
from megatron_miniplm.training.spikes import SpikeConfig
from megatron_miniplm.training.telemetry import TelemetryConfig

Registry.discover(objectives)
Registry.discover(teachers)

_OWN = {name: OBJECTIVES[name].Config for name in OBJECTIVES.names()}
ObjectiveSettings = compose("ObjectiveSettings", {name: own for name, own in _OWN.items() if own})
TeacherSettings = compose("TeacherSettings", {n: TEACHERS[n].Config for n in TEACHERS.names()})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of a training run; a verb that trains adds its own description and defaults."""

    expand_flags: ClassVar[dict[str, Any]] = {"--model": preset_settings}

    train_data_path: tuple[str, ...]
    """Prefix of the corpus or subset to train on; several, or WEIGHT PREFIX pairs, are mixed
    (without weights: as many of each as it has)."""
    seq_length: int | None = None
    """Inputs of an instance: a property of the corpus, and refused where it has another."""
    valid_data_path: tuple[str, ...] = ()
    """Prefix of a held-out corpus or subset; further ones have names: NAME=PREFIX."""
    loss_on: LossOn = "all"
    """What of an instance is trained on; continuation: what a model wrote (`generate`), its prompt
    being context."""
    save: str
    """Folder for checkpoints, metrics.jsonl and run.json."""
    load: str | None = None
    """Start from this checkpoint or Hugging Face folder; needs --finetune."""
    finetune: bool = False
    """With --load: take the weights only, start counting at 0."""
    ckpt_step: int | None = None
    """Take the run in --save back to its checkpoint of this iteration; with --load: start from that
    one of it. Default: the latest."""
    overwrite: bool = False
    """Remove the run that is in --save and start over."""
    objective: str = "lm"
    """What is minimised; an unknown name is answered with the known ones."""
    teacher: str | None = None
    """Where the teacher's opinion comes from, for objectives that need one (e.g. online)."""
    rehearsal: RehearsalConfig = field(default_factory=RehearsalConfig)
    model_shape: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    sinks: SinkConfig = field(default_factory=SinkConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    objective_settings: ObjectiveSettings = field(  # type: ignore[valid-type]
        default_factory=ObjectiveSettings
    )
    teacher_settings: TeacherSettings = field(  # type: ignore[valid-type]
        default_factory=TeacherSettings
    )

    def __post_init__(self) -> None:
        if self.engine.fp8_format is not None and self.recompute.recompute_granularity is not None:
            raise ConfigError(
                f"--fp8-format {self.engine.fp8_format} with --recompute-granularity "
                f"{self.recompute.recompute_granularity} is not supported: leave one out"
            )
        if self.load == self.save and not self.finetune:
            # Megatron's way to say that the run continues, which it does anyway.
            object.__setattr__(self, "load", None)
        if (self.load is not None) != self.finetune:
            raise ConfigError(
                "--load and --finetune go together: they start a new run from other weights; to "
                "continue a run, repeat its command with the same --save"
            )
