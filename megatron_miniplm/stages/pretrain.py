"""``pretrain``: corpus or subset -> checkpoint, for every method that trains."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
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
from megatron_miniplm.core.errors import ConfigError, LineageError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.registry import Registry
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
    RetentionConfig,
    latest_checkpoint,
    read_trained_model,
    refuse_foreign_folder,
    start_over,
    verify_checkpoint,
)
from megatron_miniplm.models.family import ModelConfig, get_family, preset_settings
from megatron_miniplm.models.flops import count_parameters, flops_per_token, peak_flops
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
from megatron_miniplm.teachers.teacher import TEACHERS, Lesson, Teacher
from megatron_miniplm.training.estimate import Setting, checkpoint_bytes, memory_of_stages
from megatron_miniplm.training.forecast import (
    RehearsalConfig,
    Work,
    forecast,
    lines,
    refuse_too_large,
)
from megatron_miniplm.training.guard import UpdateGuard
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
)
from megatron_miniplm.training.step import TrainStep, wrap_for_training
from megatron_miniplm.training.telemetry import RunFacts, Telemetry

Registry.discover(objectives)
Registry.discover(teachers)

_OWN = {name: OBJECTIVES[name].Config for name in OBJECTIVES.names()}
ObjectiveSettings = compose("ObjectiveSettings", {name: own for name, own in _OWN.items() if own})
TeacherSettings = compose("TeacherSettings", {n: TEACHERS[n].Config for n in TEACHERS.names()})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pre-train a model on a corpus or subset; the same command continues an unfinished run."""

    expand_flags: ClassVar[dict[str, Any]] = {"--model": preset_settings}

    train_data_path: str
    """Prefix of the corpus or subset to train on."""
    seq_length: int | None = None
    """Inputs of an instance: a property of the corpus, and refused where it has another."""
    valid_data_path: str | None = None
    """Prefix of a held-out corpus or subset."""
    save: str
    """Folder for checkpoints, metrics.jsonl and run.json."""
    load: str | None = None
    """Start from this checkpoint or Hugging Face folder; needs --finetune."""
    finetune: bool = False
    """With --load: take the weights only, start counting at 0."""
    overwrite: bool = False
    """Remove the run that is in --save and start over."""
    objective: str = "lm"
    """What is minimised; an unknown name is answered with the known ones."""
    teacher: str | None = None
    """Where the teacher's opinion comes from, for objectives that need one (e.g. online)."""
    tensorboard_dir: str | None = None
    """Also write TensorBoard events there."""
    peak_tflops: float | None = None
    """Dense peak of one device in TFLOP/s, for MFU; default: known for common GPUs."""
    rehearsal: RehearsalConfig = field(default_factory=RehearsalConfig)
    model_shape: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    objective_settings: ObjectiveSettings = field(  # type: ignore[valid-type]
        default_factory=ObjectiveSettings
    )
    teacher_settings: TeacherSettings = field(  # type: ignore[valid-type]
        default_factory=TeacherSettings
    )

    def __post_init__(self) -> None:
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
        _train(check(config, topology), topology)
    finally:
        shutdown()


def rehearse(config: Config, *, has_gpus: bool) -> None:
    """Refuse what `run` refuses, read what it reads, and say what it will take."""
    asked = config.rehearsal
    gpus = has_gpus or asked.dry_run_world_size is not None
    world_size = asked.dry_run_world_size or int(os.environ.get("WORLD_SIZE", "1"))
    layout = Layout.of(config.parallel, world_size)
    platform.refuse_foreign_apex()
    run = check(config, layout)
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
    train_corpus: Corpus
    valid_corpus: Corpus | None
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

    def parents(self, layout: Layout) -> Parents:
        """What the model is made of, by role."""
        if self.initial is None:
            return self.sources
        origin = (self.initial.shared_fingerprint(layout), self.initial.path)
        return {**self.sources, "initial_weights": origin}

    def verify(self) -> None:
        """Refuse weights that are damaged: each byte is read once, as when they are loaded."""
        if self.teacher is not None:
            self.teacher.verify()
        if self.resume_from is not None:
            verify_checkpoint(self.resume_from)
        elif self.initial is not None:
            self.initial.verify()

    def setting(self, layout: Layout, device: str) -> Setting:
        """What the memory of a rank depends on."""
        training = self.config.training
        return Setting(
            shape=self.shape,
            layout=layout,
            virtual_stages=training.num_virtual_stages_per_pipeline_rank,
            micro_batch_size=training.micro_batch_size,
            micro_batches=training.micro_batches(layout),
            seq_length=self.train_corpus.seq_length,
            dtype=self.dtype,
            distributed_optimizer=self.config.optimization.use_distributed_optimizer,
            recompute=self.config.recompute,
            teacher=self.teacher.beside if self.teacher is not None else None,
            device=device,
        )

    def work(self) -> Work:
        """What its cost depends on."""
        config = self.config
        done = read_trained_model(self.resume_from)[1].iteration if self.resume_from else 0
        return Work(
            shape=self.shape,
            training=config.training,
            corpus=self.train_corpus,
            valid_corpus=self.valid_corpus,
            teacher_flops_per_token=self.teacher.flops_per_token if self.teacher else 0,
            retention=config.retention,
            done_iterations=done,
            checkpoint=_checkpoint_bytes(config, self.shape),
            peak_flops=config.peak_tflops * 1e12 if config.peak_tflops else None,
            mfu=config.rehearsal.dry_run_mfu,
        )


def check(config: Config, layout: Layout) -> CheckedRun:
    """Refuse everything that can be refused without a device, before anything is written."""
    train_corpus = Corpus.open(config.train_data_path)
    valid_corpus = Corpus.open(config.valid_data_path) if config.valid_data_path else None
    shape = _resolve_shape(config, train_corpus, valid_corpus)
    config.training.micro_batches(layout)
    check_layout(
        shape, layout, train_corpus.vocab_size,
        virtual_stages=config.training.num_virtual_stages_per_pipeline_rank,
    )  # fmt: skip
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    if config.tensorboard_dir is not None and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard-dir needs tensorboard: pip install tensorboard")
    objective = _objective(config)
    teacher = _teacher(
        config, Lesson(corpus=train_corpus, layout=layout, student=shape, dtype=dtype)
    )
    config = _aligned(config, shape, teacher)
    config.optimization.schedule(config.training.iterations)
    sources = {"corpus": (train_corpus.fingerprint, train_corpus.prefix)}
    if teacher is not None:
        sources["teacher"] = teacher.parent
    initial = None
    if config.load is not None:
        initial = open_weights(Path(config.load))
        initial.check_tokenizer(train_corpus)
        initial.require(shape)
    checked = CheckedRun(
        config=config, shape=shape, train_corpus=train_corpus, valid_corpus=valid_corpus,
        dtype=dtype, objective=objective, teacher=teacher, initial=initial, sources=sources,
        resume_from=None,
    )  # fmt: skip
    now = ThisRun(
        model=describe_model(shape, train_corpus, Counters()),
        sources=sources,
        config=checked.flat,
        defaults=flat_defaults(Config),
    )
    resume_from = layout.from_rank0(lambda: _find_start(config, now))
    layout.from_rank0(lambda: _check_place(config, _checkpoint_bytes(config, shape)))
    return replace(checked, resume_from=resume_from)


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
        valid_vocab=run.train_corpus.vocab_size,
        dtype=run.dtype,
        virtual_stages=training.num_virtual_stages_per_pipeline_rank,
    )
    if run.resume_from is None and run.initial is not None:
        run.initial.fill(model, topology)
    elif run.resume_from is None:
        fill_by_name(model, InitialWeights(run.shape, training.seed))
    recompute_layers(model, config.recompute)
    wrapped = wrap_for_training(
        model, bf16=training.bf16,
        use_distributed_optimizer=config.optimization.use_distributed_optimizer,
    )  # fmt: skip
    optimizer = build_optimizer(config.optimization, wrapped, bf16=training.bf16)
    scheduler = build_scheduler(
        config.optimization,
        optimizer,
        train_iters=training.iterations,
        global_batch_size=training.global_batch_size,
    )
    state = TrainingState(
        model=model, optimizer=optimizer, scheduler=scheduler, topology=topology,
        corpus=run.train_corpus, config=run.flat, parents=run.parents(topology),
        retention=config.retention,
    )  # fmt: skip
    step = TrainStep(
        model=model, wrapped=wrapped, optimizer=optimizer, scheduler=scheduler, topology=topology,
        objective=run.objective, teacher=run.teacher,
        guard=UpdateGuard(topology=topology, may_skip=training.on_nan_skip),
    )  # fmt: skip
    return step, state


def _train(run: CheckedRun, topology: Topology) -> None:
    step, state = _build(run, topology)
    config, save = run.config, Path(run.config.save)
    with ExitStack() as held:
        # Nothing of --save is touched before this line, so whatever was refused left it as it was.
        topology.from_rank0(lambda: held.enter_context(_own_folder(save, run.resume_from)))
        if run.resume_from is not None:
            counters = state.load(run.resume_from)
            get_logger().info("continuing from %s", run.resume_from)
        else:
            counters = Counters()
            topology.from_rank0(lambda: _begin(config, save, run.train_corpus, run.sources))
        loop = Loop(
            config=config.training, topology=topology, train_corpus=run.train_corpus,
            valid_corpus=run.valid_corpus, step=step, state=state, save=save,
            model_config=run.shape, telemetry=_telemetry(run, topology, counters),
        )  # fmt: skip
        if loop.run(counters):
            get_logger().info(
                "complete: %d iterations, %s tokens, checkpoint in %s",
                counters.iteration, f"{counters.consumed_tokens:,}", save,
            )  # fmt: skip


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


def _teacher(config: Config, lesson: Lesson) -> Teacher | None:
    """The teacher, ready; refuses flags of others."""
    own = part_of(config.teacher_settings, config.teacher, "--teacher")
    return TEACHERS[config.teacher](own, lesson) if config.teacher is not None else None


def _aligned(config: Config, shape: ModelConfig, teacher: Teacher | None) -> Config:
    """The configuration with its number of updates settled."""
    extra = teacher.num_parameters if teacher else 0
    training = config.training.aligned(student=count_parameters(shape), teacher=extra)
    return replace(config, training=training)


def _find_start(config: Config, now: ThisRun) -> Path | None:
    """The checkpoint to continue from; None to begin. Refuses what belongs to another run.

    --overwrite replaces a run that is finished or has other settings; an unfinished run of these
    very settings continues all the same, so that a requeued job keeps its progress.
    """
    save = Path(config.save)
    refuse_foreign_folder(save, "pretrain")
    folder = latest_checkpoint(save)
    if folder is None:
        return None
    if config.overwrite:
        _, found = read_trained_model(folder)
        finished = found.iteration >= config.training.iterations
        if finished or not can_continue(folder, now):
            return None
    refuse_another_run(folder, now)
    return folder


@contextmanager
def _own_folder(save: Path, resume_from: Path | None) -> Iterator[None]:
    """Hold --save for this job alone; refuses if another job holds it, or came in between."""
    save.mkdir(parents=True, exist_ok=True)
    with exclusive(save / LOCK, wait=False):
        found = latest_checkpoint(save)
        if resume_from is not None and found != resume_from:
            raise ConfigError(f"another job wrote to {save} meanwhile ({found}): start again")
        yield


def _begin(config: Config, save: Path, corpus: Corpus, sources: Parents) -> None:
    """Clear --save of an earlier run and say what this one is."""
    fingerprints = {role: fingerprint for role, (fingerprint, _) in sources.items()}
    write_run(save / "run.json", "pretrain", config, **fingerprints)
    start_over(save)
    corpus.tokenizer().save(save / "tokenizer")


def _resolve_shape(config: Config, train: Corpus, valid: Corpus | None) -> ModelConfig:
    """The shape with its vocabulary; refuses corpora that do not fit it or each other."""
    shape = config.model_shape
    if shape.vocab_size is None:
        shape = replace(shape, vocab_size=train.vocab_size)
    get_family(shape.model_family).rules(shape)  # refuses what the family cannot express
    tokenizer = train.manifest.content["tokenizer"]["fingerprint"]
    if valid is not None and valid.manifest.content["tokenizer"]["fingerprint"] != tokenizer:
        raise LineageError(
            f"--valid-data-path {valid.prefix} has tokenizer "
            f"{valid.manifest.content['tokenizer']['fingerprint']}, --train-data-path "
            f"{train.prefix} has {tokenizer}: preprocess both with one tokenizer"
        )
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


def _telemetry(run: CheckedRun, topology: Topology, counters: Counters) -> Telemetry:
    """Telemetry of rank 0, and what is being trained, said once."""
    config, shape, corpus, teacher = run.config, run.shape, run.train_corpus, run.teacher
    get_logger().info(
        "model %s: %s parameters, %s logit columns (%s real) | corpus %s: %s instances, %s tokens "
        "| TP %d x PP %d x DP %d on %s",
        shape.model or shape.model_family, f"{count_parameters(shape):,}",
        f"{shape.padded_vocab_size:,}", f"{corpus.vocab_size:,}", corpus.prefix,
        f"{len(corpus):,}", f"{corpus.num_tokens:,}", topology.tp_size, topology.pp_size,
        topology.dp_size, platform.device_name(),
    )  # fmt: skip
    peak = config.peak_tflops * 1e12 if config.peak_tflops else None
    if peak is None and config.training.bf16:  # the known peaks are those of bf16
        peak = peak_flops(platform.device_name())
    facts = RunFacts(
        train_iters=config.training.iterations,
        global_batch_size=config.training.global_batch_size,
        flops_per_sample=flops_per_token(shape, corpus.seq_length) * corpus.seq_length,
        teacher_flops_per_sample=teacher.flops_per_token * corpus.seq_length if teacher else 0,
        world_size=topology.world_size,
        peak_flops=peak,
    )
    return Telemetry(
        facts, save=Path(config.save), active=topology.rank == 0,
        tensorboard_dir=config.tensorboard_dir, start_iteration=counters.iteration,
    )  # fmt: skip
