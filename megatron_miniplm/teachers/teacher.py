"""What a teacher is: micro-batches to signals, one each, that an objective compares a student with.

Where the opinion comes from (a model that runs beside the student, a store on disk) is the
teacher's matter; what is done with it is the objective's. Training sees neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from megatron_miniplm.core.registry import Registry
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.signal import SignalFacts, TeacherSignal
from megatron_miniplm.parallel.topology import Layout, Topology


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a teacher must fit: the student, its data and the layout of the job."""

    data: Blend
    """What is trained on; it says whose row a batch's row is."""
    layout: Layout
    student: ModelConfig
    dtype: torch.dtype
    """What the student computes in."""


class Ahead(Protocol):
    """What a thread read for a batch; it goes to the device when its loss is computed."""

    def to(self, device: torch.device) -> Any:
        """The same there."""

    def pinned(self) -> Any:
        """The same in pinned memory."""


Ask = Callable[[], TeacherSignal | None]
"""Makes the signal of a micro-batch, on this rank's device; None on a stage that needs none."""


def nothing() -> None:
    """The signal where none is needed."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A model beside the student, as far as memory is concerned."""

    shape: ModelConfig
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Signals that come from elsewhere, as far as memory is concerned: on the last stage."""

    token_bytes: int
    """Of a token of the micro-batch that is learned from."""
    matrix_width: int = 0
    """Columns of an output matrix that makes logits of them; 0: there is none."""
    dtype: torch.dtype
    """Of that matrix and its logits."""


class Teacher(ABC):
    """A source of signals."""

    Config: ClassVar[type]
    """Its flags: a frozen dataclass."""
    parents: Mapping[str, tuple[str, Path]]
    """Role -> (fingerprint, path) of the artifacts that the signals come from."""
    facts: SignalFacts = SignalFacts()
    """What is known of its signals."""
    num_parameters: int
    """Of the model that runs in every step; 0 if none does."""
    flops_per_token: float
    """What the teacher adds to a training step, per token of a full instance."""
    beside: Beside | Signals
    """What it holds on the devices."""
    model: ModelChunks | None = None
    """The model, once it is loaded, where there is one on the devices: it can be asked more."""

    @abstractmethod
    def __init__(self, config: Any, lesson: Lesson) -> None:
        """Open what the signals come from; refuses what does not fit, and takes no device yet."""

    @abstractmethod
    def load(self, topology: Topology) -> None:
        """Be ready for batches on this rank."""

    @abstractmethod
    def verify(self) -> None:
        """Refuse what is damaged in what `load` reads; nothing is kept of it."""

    def read_ahead(self, batch: Batch) -> Ahead | None:
        """What can be read for a batch (on the CPU) while others are trained on; by any thread."""
        return None

    @abstractmethod
    def __call__(self, batches: Sequence[Batch], ahead: Sequence[Ahead | None]) -> list[Ask]:
        """A signal for each micro-batch, in order, to be asked for when the loss wants it.

        `ahead`: what `read_ahead` gave for each, still on the host.
        """


TEACHERS: Registry[type[Teacher]] = Registry("teacher")
