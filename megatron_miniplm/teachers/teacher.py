"""What a teacher is: micro-batches to signals, one each, that an objective compares a student with.

Where the opinion comes from (a model that runs beside the student, a store on disk) is the
teacher's matter; what is done with it is the objective's. Training sees neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from megatron_miniplm.core.registry import Registry
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.head import Head
from megatron_miniplm.parallel.topology import Layout, Topology


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a teacher must fit: the student, its data and the layout of the job."""

    corpus: Corpus
    layout: Layout
    student: ModelConfig
    dtype: torch.dtype
    """What the student computes in."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A model beside the student, as far as memory is concerned."""

    shape: ModelConfig
    dtype: torch.dtype


class Teacher(ABC):
    """A source of signals."""

    Config: ClassVar[type]
    """Its flags: a frozen dataclass."""
    parent: tuple[str, Path]
    """(fingerprint, path) of the artifact that the signals come from."""
    num_parameters: int
    """Of the model that runs in every step; 0 if none does."""
    flops_per_token: float
    """What the teacher adds to a training step, per token of a full instance."""
    beside: Beside | None = None
    """The model that it holds on the devices, if it does."""

    @abstractmethod
    def __init__(self, config: Any, lesson: Lesson) -> None:
        """Open what the signals come from; refuses what does not fit, and takes no device yet."""

    @abstractmethod
    def load(self, topology: Topology) -> None:
        """Be ready for batches on this rank."""

    @abstractmethod
    def verify(self) -> None:
        """Refuse what is damaged in what `load` reads; nothing is kept of it."""

    @abstractmethod
    def __call__(self, batches: Sequence[Batch]) -> list[Head | None]:
        """A signal for each micro-batch, in order; None where this pipeline stage needs none."""


TEACHERS: Registry[type[Teacher]] = Registry("teacher")
