"""``pretrain``: corpus or subset -> checkpoint, for every method that trains."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from megatron_miniplm import objectives, teachers
from megatron_miniplm.core.config import (
    compose,
    flat_defaults,
    part_of,
    print_json,
    to_flat,
    write_run,
)
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import read_manifest
from megatron_miniplm.core.registry import Registry
from megatron_miniplm.data.blend import Blend, LossOn
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.staging import exclusive
from megatron_miniplm.models.build import (
    InitialWeights,
    build_model,
    check_layout,
    fill_by_name,
)
from megatron_miniplm.models.checkpoint import (
    LOCK,
    CheckpointWriter,
    RetentionConfig,
    TrainedModel,
    complete_checkpoint,
    read_trained_model,
    refuse_foreign_folder,
    remove_unfinished,
    start_over,
    verify_checkpoint,
)
from megatron_miniplm.models.engine import EngineConfig, has_transformer_engine
from megatron_miniplm.models.family import ModelConfig, get_family, preset_settings
from megatron_miniplm.models.flops import (
    count_parameters,
    flops_per_token,
    peak_flops,
    share_beside_teacher,
)
from megatron_miniplm.models.generate import refuse_layout, refuse_shape
from megatron_miniplm.models.recompute import RecomputeConfig, recompute_layers
from megatron_miniplm.models.weights import Weights, open_weights
from megatron_miniplm.objectives.objective import OBJECTIVES, LossConfig, Objective
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import (
    Layout,
    ParallelConfig,
    Topology,
    alone,
    initialize,
    shutdown,
)
from megatron_miniplm.teachers.teacher import TEACHERS, Beside, Lesson, Teacher
from megatron_miniplm.training.capture import OWNER, CaptureConfig, LogitCapture
from megatron_miniplm.training.estimate import MemorySetting, checkpoint_bytes, memory_of_stages
from megatron_miniplm.training.forecast import (
    RehearsalConfig,
    Work,
    forecast,
    lines,
    refuse_too_large,
)
from megatron_miniplm.training.guard import UpdateGuard
from megatron_miniplm.training.loader import Loader
from megatron_miniplm.training.loop import Loop, TrainingConfig
from megatron_miniplm.training.optimizer import (
    OptimizationConfig,
    build_optimizer,
    build_scheduler,
)
from megatron_miniplm.training.resume import (
    Counters,
    Parents,
    ThisRun,
    TrainingState,
    can_continue,
    describe_model,
    refuse_another_run,
    resume_point,
)
from megatron_miniplm.training.sinks import Sink, SinkConfig, open_sinks
from megatron_miniplm.training.spikes import SpikeConfig, SpikeDetector
from megatron_miniplm.training.step import TrainStep, wrap_for_training
from megatron_miniplm.training.telemetry import (
    RunFacts,
    Telemetry,
    TelemetryConfig,
    hours_so_far,
)
from megatron_miniplm.training.timers import Timers
from megatron_miniplm.training.validation import open_validation_sets

Registry.discover(objectives)
Registry.discover(teachers)

_OWN = {name: OBJECTIVES[name].Config for name in OBJECTIVES.names()}
_INITIAL = "initial_weights"
ObjectiveSettings = compose("ObjectiveSettings", {name: own for name, own in _OWN.items() if own})
TeacherSettings = compose("TeacherSettings", {n: TEACHERS[n].Config for n in TEACHERS.names()})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pre-train a model on a corpus or subset; the same command continues an unfinished run."""

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


def run(config: Config) -> None:
    """Train until done or told to stop; the artifact is the last checkpoint under --save."""
    if config.rehearsal.dry_run:
        if int(os.environ.get("RANK", "0")) == 0:
            with platform.without_gpus() as has_gpus:
                rehearse(config, has_gpus=has_gpus)
        return
    topology = initialize(config.parallel)
    try:
        there = has_transformer_engine(has_gpus=not platform.on_cpu())
        _train(check(config, topology, transformer_engine=there), topology)
    finally:
        shutdown()


def rehearse(config: Config, *, has_gpus: bool) -> None:
    """Refuse what `run` refuses, read what it reads, and say what it will take."""
    asked = config.rehearsal
    gpus = has_gpus or asked.dry_run_world_size is not None
    world_size = asked.dry_run_world_size or int(os.environ.get("WORLD_SIZE", "1"))
    layout = Layout.of(config.parallel, world_size)
    platform.refuse_foreign_apex()
    # Of GPUs that are somewhere else, the user knows what is installed beside them.
    there = asked.dry_run_world_size is not None or has_transformer_engine(has_gpus=has_gpus)
    run = check(config, layout, transformer_engine=there)
    run.verify()
    setting = run.setting(layout, "cuda" if gpus else "cpu")
    with alone() as topology:
        stages = memory_of_stages(setting, topology)
    refuse_too_large(stages, asked.dry_run_gpu_gb)
    said = forecast(run.work(), layout, stages, device=setting.device)
    if asked.json:
        print_json(said.as_json())
    else:
        sys.stdout.write("\n".join(lines(said)) + "\n")


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """A run that may start: what it reads is open, fits together, and nothing is written yet."""

    config: Config
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
            checkpoint=_checkpoint_bytes(config, self.shape),
            peak_flops=config.telemetry.peak_flops,
            mfu=config.rehearsal.dry_run_mfu,
        )


def check(config: Config, layout: Layout, *, transformer_engine: bool) -> CheckedRun:
    """Refuse everything that can be refused without a device, before anything is written.

    `transformer_engine`: whether it can be used where the model is built.
    """
    data = Blend.open(config.train_data_path, seed=config.training.seed, loss_on=config.loss_on)
    config.capture.check(data)
    train_corpus = data.language
    valid_sets = open_validation_sets(config.valid_data_path, train_corpus)
    shape = _resolve_shape(config, train_corpus)
    config.training.refuse_misfits(layout)
    check_layout(
        shape, layout, train_corpus.vocab_size,
        virtual_stages=config.training.num_virtual_stages_per_pipeline_rank,
    )  # fmt: skip
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    config.engine.refuse_misfits(dtype, there=transformer_engine)
    objective = _objective(config)
    teacher = _teacher(config, Lesson(data=data, layout=layout, student=shape, dtype=dtype))
    if objective.explores:
        _refuse_exploring(config, layout, shape, teacher)
    config = _aligned(config, shape, objective, teacher)
    config.optimization.schedule(config.training.iterations)
    sources = dict(data.parents)
    if teacher is not None:
        sources |= teacher.parents
        objective = objective.taught_by(teacher.facts)
    if objective.targets is not None:
        _refuse_language(config)
    initial = None
    if config.load is not None:
        load = Path(config.load)
        if config.ckpt_step is not None:
            load = complete_checkpoint(load, config.ckpt_step)
        initial = open_weights(load)
        initial.check_tokenizer(train_corpus)
        initial.require(shape)
    described = describe_model(shape, train_corpus, objective.targets)
    checked = CheckedRun(
        config=config, shape=shape, described=described, data=data, valid_sets=valid_sets,
        dtype=dtype, objective=objective, teacher=teacher, initial=initial, sources=sources,
        resume_from=None,
    )  # fmt: skip
    now = ThisRun(
        model=described,
        sources=sources,
        config=checked.flat,
        defaults=flat_defaults(Config),
    )
    resume_from = layout.from_rank0(lambda: _find_start(config, now))
    checked = replace(checked, resume_from=resume_from)
    needed = _checkpoint_bytes(config, shape) if checked.updates_left else 0
    layout.from_rank0(lambda: _check_place(config, needed))
    return checked


def _checkpoint_bytes(config: Config, shape: ModelConfig) -> int:
    return checkpoint_bytes(
        shape, bf16=config.training.bf16,
        distributed_optimizer=config.optimization.use_distributed_optimizer,
    )  # fmt: skip


def _check_place(config: Config, checkpoint: int) -> None:
    """Refuse a folder that cannot be written, is another job's, or has no room for a checkpoint.

    Whose GPUs are elsewhere has perhaps its disk there, too: then the room is only warned about.
    """
    save = Path(config.save)
    there = next(path for path in (save, *save.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--save {save}: nothing can be written into {there}")
    free = shutil.disk_usage(there).free
    if free < checkpoint:
        short = (
            f"--save {save}: a checkpoint of this model takes {checkpoint / 1e9:.2f} GB, but "
            f"{free / 1e9:.2f} GB are free there: make room, or save elsewhere"
        )
        if config.rehearsal.dry_run_world_size is None:
            raise ConfigError(short)
        get_logger().warning("%s", short)
    if (save / LOCK).exists():
        with exclusive(save / LOCK, wait=False):
            pass


def _build(run: CheckedRun, topology: Topology) -> tuple[TrainStep, TrainingState]:
    """Everything that takes a device: the model with what it starts from, optimizer, teacher."""
    config, training = run.config, run.config.training
    if run.teacher is not None:
        run.teacher.load(topology)
    model = build_model(
        run.shape,
        topology,
        valid_vocab=run.data.language.vocab_size,
        dtype=run.dtype,
        virtual_stages=training.num_virtual_stages_per_pipeline_rank,
        engine=config.engine,
        value_head=run.objective.targets is not None,
    )
    if run.resume_from is None and run.initial is not None:
        run.initial.fill(model, topology)
    elif run.resume_from is None:
        fill_by_name(model, InitialWeights(run.shape, training.seed))
    recompute_layers(model, config.recompute)
    timers = Timers()
    wrapped = wrap_for_training(model, config.optimization, bf16=training.bf16, timers=timers)
    optimizer = build_optimizer(
        config.optimization, wrapped, bf16=training.bf16, head_lr_mult=run.objective.head_lr_mult
    )
    scheduler = build_scheduler(
        config.optimization,
        optimizer,
        train_iters=training.iterations,
        samples_after=training.samples_after,
    )
    spikes = SpikeDetector(config=config.spikes, ranks=topology.ranks, say_rows=run.data.say)
    state = TrainingState(
        model=model, optimizer=optimizer, scheduler=scheduler, topology=topology,
        config=run.flat, parents=run.parents(topology),
        retention=config.retention, writer=CheckpointWriter(Path(config.save), topology),
        spikes=spikes,
    )  # fmt: skip
    explore = None
    if run.objective.explores:
        assert run.teacher is not None
        assert run.teacher.model is not None
        explore = run.objective.explorer(
            student=model, teacher=run.teacher.model, data=run.data, topology=topology,
            seed=training.seed,
        )  # fmt: skip
    step = TrainStep(
        model=model, wrapped=wrapped, optimizer=optimizer, scheduler=scheduler, topology=topology,
        objective=run.objective, teacher=run.teacher, explore=explore, timers=timers, spikes=spikes,
        guard=UpdateGuard(
            topology=topology, may_skip=training.on_nan_skip, say_rows=run.data.say
        ),
    )  # fmt: skip
    return step, state


def _train(run: CheckedRun, topology: Topology) -> None:
    step, state = _build(run, topology)
    config, save = run.config, Path(run.config.save)
    with ExitStack() as held:
        # Nothing of --save is touched before this line, so whatever was refused left it as it was.
        topology.from_rank0(lambda: held.enter_context(_own_folder(config, run.resume_from)))
        capture = _capture(run, topology, state.parents, held)
        if run.resume_from is not None:
            counters = state.load(run.resume_from)
            get_logger().info("continuing from %s", run.resume_from)
        else:
            counters = Counters()
            topology.from_rank0(lambda: _begin(config, save, run.data.language, run.sources))
        if capture is not None:
            capture.go_on(counters)
            step = replace(step, watched=capture.watched)
            state = replace(state, before_save=capture.seal)
        facts = _facts(run, topology, counters)  # before rows of lost work are dropped
        sinks: list[Sink] = []
        topology.from_rank0(
            lambda: sinks.extend(
                open_sinks(config.sinks, save, run=run.flat, start_iteration=counters.iteration)
            )
        )
        telemetry = Telemetry(
            facts,
            config=config.telemetry,
            sinks=sinks,
            timers=step.timers,
            ranks=topology.ranks,
        )
        held.push(lambda error, *_: telemetry.close(failed=error is not None))
        loop = Loop(
            config=config.training, topology=topology,
            loader=Loader(
                data=run.data, config=config.training, topology=topology,
                read_ahead=run.teacher.read_ahead if run.teacher else None,
            ),
            valid_sets=run.valid_sets, step=step, state=state,
            model=run.described, telemetry=telemetry,
        )  # fmt: skip
        if loop.run(counters):
            if capture is not None:
                capture.finish()
            get_logger().info(
                "complete: %d iterations, %s tokens, checkpoint in %s",
                counters.iteration, f"{counters.consumed_tokens:,}", save,
            )  # fmt: skip


def _capture(
    run: CheckedRun, topology: Topology, parents: Parents, held: ExitStack
) -> LogitCapture | None:
    """The store that is filled on the way, if one is asked for (a collective)."""
    config = run.config
    if not config.capture.cache_logits:
        return None
    facts = {
        "teacher": {"path": config.save, "family": run.shape.model_family},
        "teacher_iteration": config.training.iterations,
    }
    capture = LogitCapture(config.capture, data=run.data, topology=topology)
    held.callback(capture.close)
    begins = run.resume_from is None
    capture.open(
        facts, run.flat, parents,
        defaults=flat_defaults(Config), begins=begins, overwrite=config.overwrite,
    )  # fmt: skip
    extra = {OWNER: str(Path(config.save).absolute())}

    def sign() -> None:
        for store in capture.filling:
            write_run(store.path / "run.json", "pretrain", config, **extra)

    topology.from_rank0(sign)
    return capture


def _objective(config: Config) -> Objective:
    """What is minimised; refuses flags of other objectives and a teacher too many or too few."""
    cls = OBJECTIVES[config.objective]
    own = part_of(config.objective_settings, config.objective, "--objective")
    if cls.needs_teacher and config.teacher is None:
        raise ConfigError(
            f"--objective {config.objective} needs --teacher; known: {', '.join(TEACHERS.names())}"
        )
    if config.teacher is not None and not cls.needs_teacher:
        raise ConfigError(
            f"--teacher {config.teacher} has no effect on --objective {config.objective}: leave it "
            "out, or choose an objective that learns from it"
        )
    return cls(config.loss, own)


def _refuse_language(config: Config) -> None:
    """Refuse what asks a language model for its logits, where a number an instance is trained."""
    asked = {
        "loss_on": (config.loss_on != "all", "whole instances are predicted, leave it out"),
        "valid_data_path": (config.valid_data_path, "judge it with `evaluate --proxy-scores`"),
        "cache_logits": (config.capture.cache_logits, "leave it out"),
    }
    for name, (value, remedy) in asked.items():
        if value:
            raise ConfigError(
                f"--{name.replace('_', '-')} asks for a language model, and --objective "
                f"{config.objective} trains something else: {remedy}"
            )


def _teacher(config: Config, lesson: Lesson) -> Teacher | None:
    """The teacher, ready; refuses flags of others."""
    own = part_of(config.teacher_settings, config.teacher, "--teacher")
    return TEACHERS[config.teacher](own, lesson) if config.teacher is not None else None


def _refuse_exploring(
    config: Config, layout: Layout, student: ModelConfig, teacher: Teacher | None
) -> None:
    """Refuse what a student that writes its own data does not allow.

    Here, since with a warm start it writes nothing for thousands of updates.
    """
    refuse_layout(pp_size=layout.pp_size, sequence_parallel=layout.sequence_parallel)
    refuse_shape(student)
    if teacher is not None and isinstance(teacher.beside, Beside):
        refuse_shape(teacher.beside.shape)
    if config.engine.fp8_format is not None:
        raise ConfigError(
            f"--fp8-format {config.engine.fp8_format} is not supported where the student writes: "
            "what generates reads the weights themselves, in bf16. Leave it out"
        )
    if stores := config.capture.cache_logits:
        raise ConfigError(
            f"--cache-logits {' '.join(stores)} is a store of the corpus's text, but "
            f"--objective {config.objective} learns from what the student writes: leave it out"
        )


def _aligned(
    config: Config, shape: ModelConfig, objective: Objective, teacher: Teacher | None
) -> Config:
    """The configuration with its number of updates settled."""
    training = config.training.aligned(
        student=count_parameters(shape),
        teacher=teacher.num_parameters if teacher else 0,
        student_passes=objective.student_passes,
        teacher_passes=objective.teacher_passes,
        plain_samples=objective.plain_samples,
    )
    return replace(config, training=training)


def _find_start(config: Config, now: ThisRun) -> Path | None:
    """The checkpoint to continue from; None to begin. Refuses what belongs to another run.

    --overwrite replaces a run that is finished, its stores as well, or has other settings; an
    unfinished run of these very settings continues all the same, so that a requeued job keeps its
    progress.
    """
    save = Path(config.save)
    refuse_foreign_folder(save, "pretrain")
    folder = _resume_point(config)
    if folder is None:
        return None
    if config.overwrite:
        _, found = read_trained_model(folder)
        left = config.training.updates_left(found.iteration, found.consumed_samples)
        finished = not left and not config.capture.awaits_assembly(found.iteration)
        if finished or not can_continue(folder, now):
            return None
    refuse_another_run(folder, now)
    return folder


def _resume_point(config: Config) -> Path | None:
    # With --load, --ckpt-step speaks of what is loaded.
    return resume_point(Path(config.save), None if config.load else config.ckpt_step)


@contextmanager
def _own_folder(config: Config, resume_from: Path | None) -> Iterator[None]:
    """Hold --save for this job alone; refuses if another job holds it, or came in between."""
    save = Path(config.save)
    save.mkdir(parents=True, exist_ok=True)
    with exclusive(save / LOCK, wait=False):
        found = _resume_point(config)
        if found != resume_from and not (config.overwrite and resume_from is None):
            raise ConfigError(f"another job wrote to {save} meanwhile ({found}): start again")
        remove_unfinished(save)
        yield


def _begin(config: Config, save: Path, corpus: Corpus, sources: Parents) -> None:
    """Clear --save of an earlier run and say what this one is."""
    fingerprints = {role: fingerprint for role, (fingerprint, _) in sources.items()}
    write_run(save / "run.json", "pretrain", config, **fingerprints)
    start_over(save)
    corpus.tokenizer().save(save / "tokenizer")


def _resolve_shape(config: Config, train: Corpus) -> ModelConfig:
    """The shape with its vocabulary; refuses a corpus that does not fit it."""
    shape = config.model_shape
    if shape.vocab_size is None:
        shape = replace(shape, vocab_size=train.vocab_size)
    get_family(shape.model_family).rules(shape)  # refuses what the family cannot express
    if config.seq_length not in (None, train.seq_length):
        raise ConfigError(
            f"--seq-length {config.seq_length}, but the instances of {train.prefix} have "
            f"{train.seq_length} inputs: leave it out, or preprocess with that length"
        )
    if train.seq_length > shape.max_position_embeddings:
        raise ConfigError(
            f"the corpus has instances of {train.seq_length} inputs, but the model's "
            f"--max-position-embeddings is {shape.max_position_embeddings}"
        )
    if config.parallel.sequence_parallel:
        ranks = config.parallel.tensor_model_parallel_size
        if train.seq_length % ranks:
            raise ConfigError(
                f"--sequence-parallel needs the corpus's sequence length {train.seq_length} to be "
                f"a multiple of --tensor-model-parallel-size {ranks}"
            )
    return shape


def _facts(run: CheckedRun, topology: Topology, counters: Counters) -> RunFacts:
    """What turns times into rates; says once what is being trained."""
    config, shape, data = run.config, run.shape, run.data
    seq_length = data.language.seq_length
    get_logger().info(
        "model %s: %s parameters, %s logit columns (%s real) | %s: %s instances, %s tokens "
        "| TP %d x PP %d x DP %d on %s",
        shape.model or shape.model_family, f"{count_parameters(shape):,}",
        f"{shape.padded_vocab_size:,}", f"{data.language.vocab_size:,}",
        ", ".join(f"{role} {prefix}" for role, (_, prefix) in data.parents.items()),
        f"{len(data):,}", f"{data.num_tokens:,}", topology.tp_size, topology.pp_size,
        topology.dp_size, platform.device_name(),
    )  # fmt: skip
    peak = config.telemetry.peak_flops
    if peak is None and config.training.bf16:  # the known peaks are those of bf16
        peak = peak_flops(platform.device_name())
    return RunFacts(
        train_iters=counters.iteration + run.updates_left,
        train_samples=config.training.samples_in_all,
        data_progress=data.progress,
        flops_per_sample=run.flops_per_token * seq_length,
        teacher_flops_per_sample=run.teacher_flops_per_token * seq_length,
        times_plain=run.times_plain,
        peak_flops=peak,
        hours_before=topology.from_rank0(lambda: hours_so_far(Path(config.save) / "metrics.jsonl")),
    )
