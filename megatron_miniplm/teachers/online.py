"""A teacher that runs beside the student, on the same devices in the same layout.

Before the student's schedule, the teacher's own forward-only schedule goes through the same
micro-batches. The last stage keeps its final hidden states, 2 bytes x hidden size a token in bf16
(4 KB for a width of 2,048; under sequence parallelism a rank keeps its part), and the loss puts
them through the teacher's output matrix chunk by chunk. So the teacher may have any depth and
width; its vocabulary is laid out as wide as the student's, so that a rank holds the same columns of
both.

The teacher is frozen and in no optimizer, gradient buffer or checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.flops import count_parameters, forward_flops_per_token
from megatron_miniplm.models.forward import forward_only
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.parallel.topology import Topology
from megatron_miniplm.teachers.teacher import TEACHERS, Ahead, Ask, Beside, Lesson, Teacher, nothing

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """A teacher inside the training step (--teacher online)."""

    teacher_load: str = ""
    """Checkpoint, Hugging Face folder or GGUF file of the teacher; same tokenizer as the corpus."""
    teacher_dtype: Literal["student", "fp32", "bf16"] = "student"
    """What the teacher computes in; student: the same as the student."""


@TEACHERS.register("online")
class OnlineTeacher(Teacher):
    """A frozen model whose final hidden states are the signal."""

    Config = OnlineConfig
    model: ModelChunks

    def __init__(self, config: OnlineConfig, lesson: Lesson) -> None:
        if not config.teacher_load:
            raise ConfigError("--teacher online needs --teacher-load: a checkpoint or HF folder")
        self.weights = open_weights(Path(config.teacher_load))
        self.dtype = _DTYPES.get(config.teacher_dtype, lesson.dtype)
        corpus = lesson.data.language
        self.valid_vocab = corpus.vocab_size
        width = lesson.student.padded_vocab_size
        self.shape = self.weights.fit(corpus, lesson.layout, width=width)
        self.beside = Beside(shape=self.shape, dtype=self.dtype)
        fingerprint = self.weights.shared_fingerprint(lesson.layout)
        self.parents = {"teacher": (fingerprint, self.weights.path)}
        shape = self.weights.config
        self.num_parameters = count_parameters(shape)
        self.flops_per_token = forward_flops_per_token(shape, corpus.seq_length)

    def verify(self) -> None:
        """See `Weights.verify`."""
        self.weights.verify()

    def load(self, topology: Topology) -> None:
        """Its part of this rank, frozen."""
        self.model = self.weights.read(
            self.shape, topology, self.dtype, valid_vocab=self.valid_vocab
        )
        get_logger().info(
            "teacher %s (%s): %s layers of width %s, %s parameters, all of them loaded, in %s",
            self.weights.path, self.parents["teacher"][0], self.weights.config.num_layers,
            self.weights.config.hidden_size, f"{self.num_parameters:,}", self.dtype,
        )  # fmt: skip

    def __call__(self, batches: Sequence[Batch], ahead: Sequence[Ahead | None]) -> list[Ask]:
        """Its head on each micro-batch on the last stage, None on the others."""
        heads = forward_only(self.model, batches, lambda head, batch: head)
        if not heads:
            return [nothing] * len(batches)
        return [partial(_itself, head) for head in heads]


def _itself(head: Head) -> Head:
    return head
