"""``pretrain``: corpus or subset -> checkpoint, for every method that trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from megatron_miniplm import objectives, teachers
from megatron_miniplm.core.config import compose, flat_defaults, part_of, to_flat, write_run
from megatron_miniplm.core.errors import ConfigError, LineageError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.registry import Registry
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.staging import exclusive
from megatron_miniplm.models.build import InitialWeights, build_model, fill_by_name
from megatron_miniplm.models.checkpoint import (
    LOCK,
    CheckpointWriter,
    RetentionConfig,
    complete_checkpoint,
    read_trained_model,
    refuse_foreign_folder,
    remove_unfinished,
    start_over,
)
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.family import ModelConfig, get_family, preset_settings
from megatron_miniplm.models.flops import count_parameters, flops_per_token, peak_flops
from megatron_miniplm.models.recompute import RecomputeConfig, recompute_layers
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.objectives.objective import OBJECTIVES, LossConfig, Objective
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import ParallelConfig, Topology, initialize, shutdown
from megatron_miniplm.teachers.teacher import TEACHERS, Lesson, Teacher
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
    resume_point,
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
    valid_data_path: str | None = None
    """Prefix of a held-out corpus or subset."""
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
    tensorboard_dir: str | None = None
    """Also write TensorBoard events there."""
    peak_tflops: float | None = None
    """Dense peak of one device in TFLOP/s, for MFU; default: known for common GPUs."""
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
        if (self.load is not None) != self.finetune:
            raise ConfigError(
                "--load and --finetune go together: they start a new run from other weights; to "
                "continue a run, repeat its command with the same --save"
            )


def run(config: Config) -> None:
    """Train until done or told to stop; the artifact is the last checkpoint under --save."""
    topology = initialize(config.parallel)
    try:
        _train(config, topology)
    finally:
        shutdown()


def _train(config: Config, topology: Topology) -> None:
    train_corpus = Corpus.open(config.train_data_path)
    valid_corpus = Corpus.open(config.valid_data_path) if config.valid_data_path else None
    shape = _resolve_shape(config, train_corpus, valid_corpus)
    config.training.micro_batches(topology)
    bf16 = config.training.bf16
    dtype = torch.bfloat16 if bf16 else torch.float32
    objective = _objective(config)
    teacher = _teacher(
        config, Lesson(corpus=train_corpus, topology=topology, student=shape, dtype=dtype)
    )
    config = _aligned(config, shape, teacher)
    sources = {"corpus": (train_corpus.fingerprint, train_corpus.prefix)}
    if teacher is not None:
        sources["teacher"] = teacher.parent
    flat = {**to_flat(config), **asdict(shape)}
    save = Path(config.save)
    now = ThisRun(
        model=describe_model(shape, train_corpus, Counters()),
        sources=sources,
        config=flat,
        defaults=flat_defaults(Config),
    )
    resume_from = topology.from_rank0(lambda: _find_start(config, now))

    model, initial_weights = _model(
        config, shape, train_corpus, topology, dtype=dtype, fresh=resume_from is None
    )
    parents = {**sources, **initial_weights}
    wrapped = wrap_for_training(
        model, bf16=bf16, use_distributed_optimizer=config.optimization.use_distributed_optimizer
    )
    optimizer = build_optimizer(config.optimization, wrapped, bf16=bf16)
    scheduler = build_scheduler(
        config.optimization,
        optimizer,
        train_iters=config.training.iterations,
        global_batch_size=config.training.global_batch_size,
    )
    state = TrainingState(
        model=model, optimizer=optimizer, scheduler=scheduler, topology=topology,
        corpus=train_corpus, config=flat, parents=parents, retention=config.retention,
        writer=CheckpointWriter(save, topology),
    )  # fmt: skip
    step = TrainStep(
        model=model, wrapped=wrapped, optimizer=optimizer, scheduler=scheduler, topology=topology,
        objective=objective, teacher=teacher,
        guard=UpdateGuard(topology=topology, may_skip=config.training.on_nan_skip),
    )  # fmt: skip
    with ExitStack() as held:
        # Nothing of --save is touched before this line, so whatever was refused left it as it was.
        topology.from_rank0(lambda: held.enter_context(_own_folder(config, resume_from)))
        if resume_from is not None:
            counters = state.load(resume_from)
            get_logger().info("continuing from %s", resume_from)
        else:
            counters = Counters()
            topology.from_rank0(lambda: _begin(config, save, train_corpus, sources))
        loop = Loop(
            config=config.training, topology=topology, train_corpus=train_corpus,
            valid_corpus=valid_corpus, step=step, state=state, model_config=shape,
            telemetry=_telemetry(config, shape, topology, train_corpus, teacher, counters),
        )  # fmt: skip
        if loop.run(counters):
            get_logger().info(
                "complete: %d iterations, %s tokens, checkpoint in %s",
                counters.iteration, f"{counters.consumed_tokens:,}", save,
            )  # fmt: skip


def _model(
    config: Config,
    shape: ModelConfig,
    corpus: Corpus,
    topology: Topology,
    *,
    dtype: torch.dtype,
    fresh: bool,
) -> tuple[ModelChunks, Parents]:
    """(this rank's part, where its weights are from); `fresh`: filled with what it starts from."""
    model = build_model(
        shape,
        topology,
        valid_vocab=corpus.vocab_size,
        dtype=dtype,
        virtual_stages=config.training.num_virtual_stages_per_pipeline_rank,
    )
    parents: dict[str, tuple[str, Path]] = {}
    if config.load is not None:
        load = Path(config.load)
        if config.ckpt_step is not None:
            load = complete_checkpoint(load, config.ckpt_step)
        weights = open_weights(load)
        weights.check_tokenizer(corpus)
        weights.require(shape)
        parents["initial_weights"] = (weights.shared_fingerprint(topology), weights.path)
        if fresh:
            weights.fill(model, topology)
    elif fresh:
        fill_by_name(model, InitialWeights(shape, config.training.seed))
    recompute_layers(model, config.recompute)
    return model, parents


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
    folder = _resume_point(config)
    if folder is None:
        return None
    if config.overwrite:
        _, found = read_trained_model(folder)
        finished = found.iteration >= config.training.iterations
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
        if resume_from is not None and found != resume_from:
            raise ConfigError(f"another job wrote to {save} meanwhile ({found}): start again")
        remove_unfinished(save)
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


def _telemetry(
    config: Config,
    shape: ModelConfig,
    topology: Topology,
    corpus: Corpus,
    teacher: Teacher | None,
    counters: Counters,
) -> Telemetry:
    """Telemetry of rank 0, and what is being trained, said once."""
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
