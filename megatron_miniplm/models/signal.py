"""What a teacher says of a micro-batch, and what is known of it before the first one."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_miniplm.data.sparse_logits import PaddedLogits
from megatron_miniplm.models.head import Head

TeacherSignal = Head | PaddedLogits
"""All logits, as hidden states and an output matrix; or the likeliest tokens of every position."""


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
