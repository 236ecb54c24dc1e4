"""Whether a run may start: what it reads is opened, and everything that does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron_miniplm.core.config import flat_defaults, part_of
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.models.build import check_layout
from megatron_miniplm.models.checkpoint import complete_checkpoint
from megatron_miniplm.models.family import ModelConfig, get_family
from megatron_miniplm.models.flops import count_parameters
from megatron_miniplm.models.generate import refuse_layout, refuse_shape
from megatron_miniplm.models.weights import Weights, open_weights
from megatron_miniplm.objectives.objective import OBJECTIVES, Objective
from megatron_miniplm.parallel.topology import Layout
from megatron_miniplm.teachers.teacher import TEACHERS, Beside, Lesson, Teacher
from megatron_miniplm.training.checked_run import CheckedRun
from megatron_miniplm.training.resume import ThisRun, describe_model
from megatron_miniplm.training.run_config import RunConfig
from megatron_miniplm.training.run_folder import check_place, find_start
from megatron_miniplm.training.validation import open_validation_sets


def check(config: RunConfig, layout: Layout, *, transformer_engine: bool) -> CheckedRun:
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
    objective = objective_of(config)
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
    initial = _initial_weights(config, shape, train_corpus)
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
        defaults=flat_defaults(RunConfig),
    )
    resume_from = layout.from_rank0(lambda: find_start(config, now))
    checked = replace(checked, resume_from=resume_from)
    needed = checked.checkpoint_bytes if checked.updates_left else 0
    layout.from_rank0(lambda: check_place(config, needed))
    return checked


def _resolve_shape(config: RunConfig, train: Corpus) -> ModelConfig:
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


def objective_of(config: RunConfig) -> Objective:
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


def _teacher(config: RunConfig, lesson: Lesson) -> Teacher | None:
    """The teacher, ready; refuses flags of others."""
    own = part_of(config.teacher_settings, config.teacher, "--teacher")
    return TEACHERS[config.teacher](own, lesson) if config.teacher is not None else None


def _aligned(
    config: RunConfig, shape: ModelConfig, objective: Objective, teacher: Teacher | None
) -> RunConfig:
    """The configuration with its number of updates settled."""
    training = config.training.aligned(
        student=count_parameters(shape),
        teacher=teacher.num_parameters if teacher else 0,
        student_passes=objective.student_passes,
        teacher_passes=objective.teacher_passes,
        plain_samples=objective.plain_samples,
    )
    return replace(config, training=training)


def _initial_weights(config: RunConfig, shape: ModelConfig, train: Corpus) -> Weights | None:
    """The weights of --load; refuses those of another shape or tokenizer."""
    if config.load is None:
        return None
    load = Path(config.load)
    if config.ckpt_step is not None:
        load = complete_checkpoint(load, config.ckpt_step)
    initial = open_weights(load)
    initial.check_tokenizer(train)
    initial.require(shape)
    return initial


def _refuse_exploring(
    config: RunConfig, layout: Layout, student: ModelConfig, teacher: Teacher | None
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


def _refuse_language(config: RunConfig) -> None:
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
