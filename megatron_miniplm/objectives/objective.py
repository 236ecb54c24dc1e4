"""What an objective is: a head and a batch to a summed loss, a count, and what to log.

The sum is divided by the count once, over the whole global batch, after gradients were summed
over micro-batches and ranks. So gradient accumulation, DP and PP cannot change the mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.registry import Registry
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.data.sparse_logits import PaddedLogits
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.flops import FORWARD_AND_BACKWARD
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.signal import SignalFacts, TeacherSignal
from megatron_miniplm.models.value_head import TargetScale
from megatron_miniplm.parallel.topology import Topology

Normalization = Literal["sequence", "token"]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What all objectives have in common."""

    loss_normalization: Normalization = "sequence"
    """Mean over an instance's tokens, then instances (paper), or over all tokens (Megatron)."""
    z_loss_weight: float = 0.0
    """Factor of the squared log-sum-exp of the logits that is added to the cross entropy (PaLM)."""

    def __post_init__(self) -> None:
        if self.z_loss_weight < 0:
            raise ConfigError(f"--z-loss-weight {self.z_loss_weight} must not be negative")


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """Of one micro-batch."""

    loss_sum: torch.Tensor
    """Differentiable scalar: the loss summed, not averaged."""
    count: torch.Tensor
    """int32 scalar: what the global sum is divided by (instances or tokens)."""
    metrics: Mapping[str, torch.Tensor]
    """Name -> detached (sum, count), reduced over ranks and logged as a mean."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is before an update, in samples (instances)."""

    consumed: int
    total: int
    """Of the whole run."""
    warmup: int
    """Of the learning rate's warm-up."""
    decay: int
    """Of the learning rate's final decay (WSD); a tenth of the run under other schedules."""


Explore = Callable[[Sequence[Batch], Progress], Sequence[Batch]]
"""This rank's micro-batches of an update -> as many of the same shape (a collective)."""


class Objective(ABC):
    """Anything that turns the final hidden states of a micro-batch into a loss."""

    Config: ClassVar[type | None] = None
    """Flags of its own: a frozen dataclass."""
    needs_teacher: ClassVar[bool] = False
    """Whether it is given a teacher's signal."""
    explores: ClassVar[bool] = False
    """Whether it learns from what the student writes: then it has an `explorer`."""
    targets: TargetScale | None = None
    """Where it trains a head for a number of each instance: what that predicts."""
    head_lr_mult: float = 1.0
    """Learning rate of that head, as a multiple of the others'."""
    metric_names: Sequence[str]
    """Keys of `LossOutput.metrics`, known to every pipeline stage."""
    updates_per_batch: int = 1
    """How often the weights are updated with the same batches."""
    student_passes: int = FORWARD_AND_BACKWARD
    """Work of a token in an update, in forward passes of the student."""
    teacher_passes: int = 1
    """The same of the teacher's passes, where it has one in the step."""
    plain_samples: int = 0
    """Samples of a run before that work begins, which cost what training without a teacher does."""

    @abstractmethod
    def __init__(self, common: LossConfig, config: Any = None) -> None: ...

    def at(self, progress: Progress) -> Objective:
        """What is minimised in the update that follows; itself, where that never changes."""
        return self

    def taught_by(self, facts: SignalFacts) -> Objective:
        """Itself, settled for such signals; refuses those that it cannot learn from."""
        return self

    def explorer(
        self,
        *,
        student: ModelChunks,
        teacher: ModelChunks,
        data: Blend,
        topology: Topology,
        seed: int,
    ) -> Explore:
        """What makes the micro-batches of an update into those that it learns from."""
        raise NotImplementedError

    @abstractmethod
    def __call__(
        self, head: Head, batch: Batch, teacher: TeacherSignal | None = None
    ) -> LossOutput:
        """The loss of one micro-batch; `teacher` is what the teacher says of the same batch."""

    @abstractmethod
    def reference(
        self,
        logits_bsV: torch.Tensor,
        batch: Batch,
        teacher: torch.Tensor | PaddedLogits | None = None,
    ) -> torch.Tensor:
        """The same loss by its definition: the mean, from float64 logits of real columns only.

        `teacher`: its logits, or what is stored of them.
        """


OBJECTIVES: Registry[type[Objective]] = Registry("objective")


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


def mean_by_definition(
    losses_bs: torch.Tensor, batch: Batch, normalization: Normalization
) -> torch.Tensor:
    """The mean of the losses of a batch, row by row (spec: section 4): for `reference`."""
    kept = [row[mask] for row, mask in zip(losses_bs, batch.mask_bs, strict=True) if mask.any()]
    if normalization == "token":
        return torch.cat(kept).mean()
    return torch.stack([row.mean() for row in kept]).mean()
