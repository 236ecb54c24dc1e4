"""What an objective is: a head and a batch to a summed loss, a count, and what to log.

The sum is divided by the count once, over the whole global batch, after gradients were summed
over micro-batches and ranks. So gradient accumulation, DP and PP cannot change the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from megatron_miniplm.core.registry import Registry
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.models.head import Head

Normalization = Literal["sequence", "token"]


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """Of one micro-batch."""

    loss_sum: torch.Tensor
    """Differentiable scalar: the loss summed, not averaged."""
    count: torch.Tensor
    """int32 scalar: what the global sum is divided by (instances or tokens)."""
    metrics: Mapping[str, torch.Tensor]
    """Name -> detached (sum, count), reduced over ranks and logged as a mean."""


class Objective(Protocol):
    """Anything that turns the final hidden states of a micro-batch into a loss."""

    @property
    def metric_names(self) -> Sequence[str]:
        """Keys of `LossOutput.metrics`, known to every pipeline stage."""

    def __call__(self, head: Head, batch: Batch) -> LossOutput:
        """The loss of one micro-batch."""

    def reference(self, logits_bsV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The same loss by its definition: the mean, from float64 logits of real columns only."""


OBJECTIVES: Registry[Callable[..., Objective]] = Registry("objective")


def token_weights(batch: Batch, normalization: Normalization) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight of every position [b, s] fp32, count int32) of a micro-batch.

    sequence: mean over an instance's tokens, then over instances (arXiv 2410.17215 Eq. 5).
    token: mean over all tokens of the global batch (Megatron's).
    """
    mask = batch.mask_bs.float()
    tokens = mask.sum(1, keepdim=True)
    if normalization == "sequence":
        return mask / tokens.clamp(min=1), (tokens > 0).sum().int()
    return mask, tokens.sum().int()
