"""What a teacher says of a micro-batch, and what is known of it before the first one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_miniplm.data.movable import Movable
from megatron_miniplm.data.sparse_logits import PaddedLogits
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.value_head import TargetScale


@dataclass(frozen=True, kw_only=True)
class InstanceValues(Movable):
    """A number for each instance of a micro-batch."""

    nats_b: torch.Tensor
    """float32; anything where a row holds no instance."""

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> InstanceValues:
        return InstanceValues(nats_b=change(self.nats_b))


TeacherSignal = Head | PaddedLogits | InstanceValues
"""All logits, as hidden states and an output matrix; the likeliest tokens of every position; or a
number for each instance."""


@dataclass(frozen=True, kw_only=True)
class SignalFacts:
    """Of all signals of a teacher: what an objective must be able to learn from."""

    sparse: bool = False
    """Whether signals are `PaddedLogits`."""
    stored: bool = False
    """Whether they were made before, of the corpus's text alone."""
    temperatures: frozenset[float] = frozenset()
    """Of sparse ones: those of which there are log-partitions."""
    sampled: bool = False
    """Of sparse ones: whether entries were drawn, with weights that make them unbiased."""
    mean_logit_std: float | None = None
    """Standard deviation of a position's logits, the mean over all positions; None: not known."""
    targets: TargetScale | None = None
    """Of signals that are `InstanceValues`: all of them over the training data; else None."""
