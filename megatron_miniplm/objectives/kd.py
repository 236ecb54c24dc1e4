"""Knowledge distillation: cross entropy with the label and a divergence from a teacher.

    L = (1 - alpha) CE(label, p) + alpha kappa(T) D(q_T, p_T)      nats, per token

p and q are the student's and the teacher's next-token distributions over the real vocabulary, at
temperature T in the divergence; kappa is T^2, T or 1. The mean over tokens is the one of `lm`, with
the same mask. Vanilla KD of the MiniPLM paper: soft_nll (or forward_kl, which has the same
gradient), alpha 0.5, T 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.kernels.definition import token_losses
from megatron_miniplm.kernels.token_loss import MIXTURES, TokenLoss, Tokens
from megatron_miniplm.models.head import Head, Positions
from megatron_miniplm.models.logit_loss import FunctionLoss, KernelLoss, LogitLoss
from megatron_miniplm.objectives.kd_losses import KD_LOSSES
from megatron_miniplm.objectives.objective import (
    OBJECTIVES,
    LossConfig,
    LossOutput,
    Objective,
    mean_by_definition,
    token_weights,
)

_KAPPA_POWER = {"square": 2, "linear": 1, "none": 0}


@dataclass(frozen=True, kw_only=True)
class KdConfig:
    """Distillation from a teacher (--objective kd)."""

    kd_loss: str = "forward_kl"
    """Divergence from the teacher: forward_kl, soft_nll, reverse_kl, jsd, skew_kl, skew_rkl, tvd,
    mse_logits, mse_centered, mse_log_probs, brier, or the name of a function registered as one."""
    kd_alpha: float = 0.5
    """Share of the divergence in the loss, 0 to 1; the rest is cross entropy."""
    kd_temperature: float = 1.0
    """Temperature of student and teacher in the divergence."""
    kd_temperature_scaling: Literal["square", "linear", "none"] = "square"
    """Factor of the divergence that makes up for the temperature T: T^2, T or 1."""
    kd_beta: float = 0.5
    """Weight of the mixture of jsd (0: forward KL, 1: reverse KL) and of the skewed divergences."""

    def __post_init__(self) -> None:
        if not 0 <= self.kd_alpha <= 1:
            raise ConfigError(f"--kd-alpha {self.kd_alpha} must be from 0 to 1")
        if not self.kd_temperature > 0:
            raise ConfigError(f"--kd-temperature {self.kd_temperature} must be above 0")
        if not 0 <= self.kd_beta <= 1:
            raise ConfigError(f"--kd-beta {self.kd_beta} must be from 0 to 1")
        if self.kd_beta != KdConfig.kd_beta and self.kd_loss not in MIXTURES:
            raise ConfigError(
                f"--kd-beta {self.kd_beta} has no effect on --kd-loss {self.kd_loss}, only on "
                f"{', '.join(MIXTURES)}: leave it out"
            )

    @property
    def kappa(self) -> float:
        """Factor of the divergence for its temperature."""
        return float(self.kd_temperature ** _KAPPA_POWER[self.kd_temperature_scaling])


@OBJECTIVES.register("kd")
class Distillation(Objective):
    """(1 - alpha) cross entropy + alpha kappa divergence from the teacher."""

    Config = KdConfig
    needs_teacher = True
    metric_names = (
        "lm loss", "kd loss", "teacher loss", "teacher entropy", "top-1 agreement",
    )  # fmt: skip

    def __init__(self, common: LossConfig, config: KdConfig | None = None) -> None:
        self.common, self.config = common, config or KdConfig()
        if self.config.kd_alpha == 1 and self.common.z_loss_weight:
            raise ConfigError(
                f"--z-loss-weight {self.common.z_loss_weight} is a part of the cross entropy, "
                "whose share is 0 with --kd-alpha 1: leave it out or lower --kd-alpha"
            )
        self.kind = _kind(self.common, self.config)

    def __call__(self, head: Head, batch: Batch, teacher: Head | None = None) -> LossOutput:
        """The summed loss of one micro-batch. Metrics have neither alpha nor kappa in them."""
        assert teacher is not None, "distillation needs a teacher's signal"
        config = self.config
        weights_bs, count = token_weights(batch, self.common.loss_normalization)
        loss_sum, values = head.loss(
            self.kind,
            Positions(
                labels_bs=batch.labels_bs,
                ce_weight=(1 - config.kd_alpha) * weights_bs,
                kd_weight=config.kd_alpha * config.kappa * weights_bs,
                student_scale=1 / config.kd_temperature,
                teacher_scale=1 / config.kd_temperature,
            ),
            teacher,
        )
        said = (
            values.ce, values.kd, values.teacher_nll, values.teacher_entropy,
            values.agreement,
        )  # fmt: skip
        metrics = {
            name: torch.stack([(value_bs * weights_bs).sum(dtype=torch.float64), count.double()])
            for name, value_bs in zip(self.metric_names, said, strict=True)
            if value_bs is not None
        }
        return LossOutput(loss_sum=loss_sum, count=count, metrics=metrics)

    def reference(
        self, logits_bsV: torch.Tensor, batch: Batch, teacher_bsV: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean loss, straight from whole logits of both."""
        assert teacher_bsV is not None, "distillation needs a teacher's logits"
        alpha, scale = self.config.kd_alpha, 1 / self.config.kd_temperature
        student, teacher = logits_bsV.flatten(0, 1), teacher_bsV.flatten(0, 1)
        tokens = Tokens.of(
            batch.labels_bs.flatten(), kd_weight=alpha * self.config.kappa, ce_weight=1 - alpha,
            student_scale=scale, teacher_scale=scale, valid=student.shape[-1],
        )  # fmt: skip
        assert isinstance(self.kind.loss, TokenLoss), "a dense teacher's"
        losses = token_losses(self.kind.loss, student, teacher, tokens)
        if isinstance(self.kind, FunctionLoss):
            losses = token_losses(TokenLoss(z_loss=self.kind.z_loss), student, None, tokens)
            divergence = self.kind.function(student * scale, teacher * scale, tokens.labels_N)
            losses = losses + alpha * self.config.kappa * divergence
        losses_bs = losses.view(batch.labels_bs.shape)
        return mean_by_definition(losses_bs, batch, self.common.loss_normalization)


def _kind(common: LossConfig, config: KdConfig) -> LogitLoss:
    """By the kernels where they know the divergence, else by its function."""
    found = KD_LOSSES[config.kd_loss]
    if callable(found):
        return FunctionLoss(found, z_loss=common.z_loss_weight)
    return KernelLoss(TokenLoss(divergence=found, beta=config.kd_beta, z_loss=common.z_loss_weight))
