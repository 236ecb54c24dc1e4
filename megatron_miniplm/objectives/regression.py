"""Regression: the number of each instance, from its mean final hidden state (MiniPLM-proxy).

    L = mean over instances x of (v(x) - z(x))^2        z = (r - mean) / sd of the training data

v is the linear head of `models.value_head` on the model that is trained with it (arXiv 2410.17215,
Eq. 17: w, b and all of the language model's parameters). r is what the teacher says of an instance
in nats, for the proxy log p - log p_ref per token; mean and sd go into the checkpoint, so that
predictions are in nats again. They change nothing but the size of the learning rates.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.forward import forward_rows
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.signal import InstanceValues, SignalFacts, TeacherSignal
from megatron_miniplm.models.value_head import TargetScale
from megatron_miniplm.objectives.objective import (
    OBJECTIVES,
    LossConfig,
    LossOutput,
    Objective,
)


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """A number for each instance (--objective regression)."""

    head_lr_mult: float = 10.0
    """Learning rate of the linear head, as a multiple of --lr and --min-lr."""

    def __post_init__(self) -> None:
        if not self.head_lr_mult > 0:
            raise ConfigError(f"--head-lr-mult {self.head_lr_mult} must be above 0")


@OBJECTIVES.register("regression")
class Regression(Objective):
    """Squared error of a linear head, in units of the targets' variance."""

    Config = RegressionConfig
    needs_teacher = True
    metric_names = ("regression loss", "absolute error")

    def __init__(self, common: LossConfig, config: RegressionConfig | None = None) -> None:
        given = [
            f"--{name.replace('_', '-')} {value}"
            for name, value in vars(common).items()
            if value != getattr(LossConfig, name)
        ]
        if given:
            raise ConfigError(
                f"{', '.join(given)} has no effect on --objective regression, whose loss is of "
                "instances and has no logits: leave it out"
            )
        self.head_lr_mult = (config or RegressionConfig()).head_lr_mult

    def taught_by(self, facts: SignalFacts) -> Regression:
        """For targets of that mean and spread; refuses signals that are no numbers."""
        if facts.targets is None:
            raise ConfigError(
                "--objective regression learns a number for each instance, and this --teacher "
                "gives distributions over tokens: pass --teacher scores"
            )
        settled = copy(self)
        settled.targets = facts.targets
        return settled

    def __call__(
        self, head: Head, batch: Batch, teacher: TeacherSignal | None = None
    ) -> LossOutput:
        """The summed loss of one micro-batch; the absolute error is in nats."""
        targets_b, counts_b = self._targets(teacher, batch)
        apart_b = (head.values(batch.mask_bs) - targets_b) * counts_b
        loss_sum, count = apart_b.square().sum(), counts_b.sum().int()
        sums = (loss_sum.detach(), self._scale.sd * apart_b.detach().abs().sum())
        metrics = {
            name: torch.stack([total.double(), count.double()])
            for name, total in zip(self.metric_names, sums, strict=True)
        }
        return LossOutput(loss_sum=loss_sum, count=count, metrics=metrics)

    def reference(
        self, logits_bsV: torch.Tensor, batch: Batch, teacher: Any = None
    ) -> torch.Tensor:
        """Mean squared error from w . h + b of every position, [b, s, 1]."""
        targets_b, counts_b = self._targets(teacher, batch)
        kept = zip(logits_bsV[..., 0], batch.mask_bs, targets_b, counts_b, strict=True)
        errors = [row[mask].mean() - target for row, mask, target, counts in kept if counts]
        return torch.stack(errors).square().mean()

    @property
    def _scale(self) -> TargetScale:
        assert self.targets is not None, "taught_by was not told of targets"
        return self.targets

    def _targets(
        self, teacher: TeacherSignal | None, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(standardised target, whether the row holds an instance with trained positions), [b]."""
        assert isinstance(teacher, InstanceValues), "regression needs numbers"
        counts_b = batch.mask_bs.any(1)
        return torch.where(counts_b, self._scale.standardised(teacher.nats_b), 0), counts_b


def predict_rows(
    model: ModelChunks,
    corpus: Corpus,
    rows: np.ndarray,
    scale: TargetScale,
    *,
    micro_batch_size: int,
) -> np.ndarray | None:
    """Nats that the model predicts for each of `rows`, float64; None off the last stage."""

    def values(head: Head, batch: Batch) -> list[float]:
        numbers: list[float] = head.values(batch.mask_bs).tolist()
        return numbers

    found = forward_rows(model, corpus, rows, values, micro_batch_size=micro_batch_size)
    return None if found is None else scale.nats(np.array(found))
