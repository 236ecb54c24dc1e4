"""Knowledge distillation: cross entropy with the label and a divergence from a teacher.

    L = (1 - alpha) CE(label, p) + alpha kappa D(q, p)      nats, per token

p and q are the student's and the teacher's next-token distributions over the real vocabulary, in
the divergence each at its temperature; kappa is the student's squared, as it is, or 1. The mean
over tokens is the one of `lm`, with the same mask. Vanilla KD of the MiniPLM paper: soft_nll (or
forward_kl, which has the same gradient), alpha 0.5, temperature 1.

The teacher runs beside the student (all logits), or its likeliest tokens were stored
(`objectives.sparse_kd`). Alpha may follow the run (`objectives.schedules`), the temperature the
teacher (`objectives.temperature`).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from megatron_miniplm.core.config import refuse_idle
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.data.sparse_logits import PaddedLogits
from megatron_miniplm.kernels.definition import token_losses
from megatron_miniplm.kernels.sparse_definition import sparse_losses
from megatron_miniplm.kernels.token_loss import MIXTURES, TokenLoss, Tokens
from megatron_miniplm.models.head import Head, Positions
from megatron_miniplm.models.logit_loss import FunctionLoss, KernelLoss, SparseKernelLoss
from megatron_miniplm.models.signal import SignalFacts, TeacherSignal
from megatron_miniplm.models.teacher_stats import TeacherStats
from megatron_miniplm.objectives.kd_losses import KD_LOSSES
from megatron_miniplm.objectives.objective import (
    OBJECTIVES,
    LossConfig,
    LossOutput,
    Objective,
    Progress,
    mean_by_definition,
    token_weights,
)
from megatron_miniplm.objectives.schedules import AlphaConfig
from megatron_miniplm.objectives.sparse_kd import SparseKd, Tail
from megatron_miniplm.objectives.temperature import Scales, Temperature, TemperatureConfig
from megatron_miniplm.parallel.vocab import VocabShard

_KAPPA_POWER = {"square": 2, "linear": 1, "none": 0}
_UNSCALED = Scales(student=1.0, teacher=1.0, weight=1.0)


@dataclass(frozen=True, kw_only=True)
class KdConfig:
    """Distillation from a teacher (--objective kd)."""

    kd_loss: str = "forward_kl"
    """Divergence from the teacher: forward_kl, soft_nll, reverse_kl, jsd, skew_kl, skew_rkl, tvd,
    mse_logits, mse_centered, mse_log_probs, brier, or the name of a function registered as one.
    Of a stored teacher: forward_kl, soft_nll, brier, mse_centered."""
    kd_alpha: float = 0.5
    """Share of the divergence in the loss, 0 to 1; the rest is cross entropy."""
    alpha: AlphaConfig = field(default_factory=AlphaConfig)
    kd_temperature: float = 1.0
    """Temperature of the teacher in the divergence."""
    kd_student_temperature: float | None = None
    """Temperature of the student in the divergence; default: the teacher's, token by token; 1 with
    --kd-temperature-method normkd and wttm."""
    kd_temperature_scaling: Literal["square", "linear", "none"] = "square"
    """Factor of the divergence that makes up for the student's temperature T: T^2, T or 1."""
    adaptive: TemperatureConfig = field(default_factory=TemperatureConfig)
    kd_beta: float = 0.5
    """Weight of the mixture of jsd (0: forward KL, 1: reverse KL) and of the skewed divergences."""
    kd_tail: Tail = "residual"
    """What becomes of the tokens that a stored teacher does not name: residual (all of them as
    one), renormalize (the teacher has none), renormalize-both (the student has none, either), raw
    (left out), uniform (alike), sampled (of stores that were sampled)."""

    def __post_init__(self) -> None:
        if not 0 <= self.kd_alpha <= 1:
            raise ConfigError(f"--kd-alpha {self.kd_alpha} must be from 0 to 1")
        if self.alpha.kd_alpha_min > self.kd_alpha:
            raise ConfigError(
                f"--kd-alpha-min {self.alpha.kd_alpha_min} is above --kd-alpha {self.kd_alpha}, "
                "the highest value"
            )
        for name in ("kd_temperature", "kd_student_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be above 0")
        if not 0 <= self.kd_beta <= 1:
            raise ConfigError(f"--kd-beta {self.kd_beta} must be from 0 to 1")
        refuse_idle(self, {"kd_beta": MIXTURES}, "--kd-loss", self.kd_loss)
        if self.kd_temperature != 1 and self.adaptive.kd_temperature_method == "adakd-h":
            raise ConfigError(
                f"--kd-temperature {self.kd_temperature} has no effect on --kd-temperature-method "
                "adakd-h, whose temperatures are from --kd-temperature-min to "
                "--kd-temperature-max: leave it out"
            )

    @property
    def temperature(self) -> Temperature:
        """Of teacher and student."""
        student = self.kd_student_temperature
        if student is None and self.adaptive.kd_temperature_method in ("normkd", "wttm"):
            student = 1.0
        return Temperature(
            config=self.adaptive,
            base=self.kd_temperature,
            student=student,
            power=_KAPPA_POWER[self.kd_temperature_scaling],
        )


@OBJECTIVES.register("kd")
class Distillation(Objective):
    """(1 - alpha) cross entropy + alpha kappa divergence from the teacher."""

    Config = KdConfig
    needs_teacher = True
    metric_names: Sequence[str] = (
        "lm loss", "kd loss", "teacher loss", "teacher entropy", "top-1 agreement",
    )  # fmt: skip

    def __init__(self, common: LossConfig, config: KdConfig | None = None) -> None:
        self.common, self.config = common, config or KdConfig()
        self.alpha, self.temperature = self.config.kd_alpha, self.config.temperature
        self.scheduled = self.config.alpha.kd_alpha_schedule != "constant"
        if self.alpha == 1 and not self.scheduled and self.common.z_loss_weight:
            raise ConfigError(
                f"--z-loss-weight {self.common.z_loss_weight} is a part of the cross entropy, "
                "whose share is 0 with --kd-alpha 1: leave it out or lower --kd-alpha"
            )
        self.kind = _kind(self.common, self.config)
        self.stored: SparseKd | None = None
        if self.scheduled:
            self.metric_names = (*self.metric_names, "kd alpha")

    def at(self, progress: Progress) -> Distillation:
        """The same with the alpha of that moment."""
        if not self.scheduled:
            return self
        now = copy(self)
        now.alpha = self.config.alpha.alpha(self.config.kd_alpha, progress)
        return now

    def taught_by(self, facts: SignalFacts) -> Distillation:
        """For such signals; refuses losses, tails and temperatures that they do not allow."""
        if facts.targets is not None:
            raise ConfigError(
                "--objective kd learns from distributions over tokens, and this --teacher gives a "
                "number for each instance: pass --objective regression"
            )
        settled = copy(self)
        adaptive = self.temperature.config
        if adaptive.kd_temperature_method == "adakd-sd":
            if adaptive.kd_temperature_center is None and facts.mean_logit_std is not None:
                known = replace(adaptive, kd_temperature_center=facts.mean_logit_std)
                settled.temperature = replace(self.temperature, config=known)
            _ = settled.temperature.center  # refuses a center that nobody knows
        if facts.sparse:
            settled.stored = SparseKd.of(
                self.config.kd_loss, self.config.kd_tail, settled.temperature, facts,
                z_loss=self.common.z_loss_weight,
            )  # fmt: skip
            settled.metric_names = (*self.metric_names, "kept mass")
        elif self.config.kd_tail != KdConfig.kd_tail:
            raise ConfigError(
                f"--kd-tail {self.config.kd_tail} has no effect on a teacher of which all logits "
                "are known: leave it out"
            )
        return settled

    def __call__(
        self, head: Head, batch: Batch, teacher: TeacherSignal | None = None
    ) -> LossOutput:
        """The summed loss of one micro-batch. Metrics have neither alpha nor kappa in them."""
        assert teacher is not None, "distillation needs a teacher's signal"
        weights_bs, count = token_weights(batch, self.common.loss_normalization)
        if isinstance(teacher, PaddedLogits):
            loss_sum, said = self._from_store(head, batch, weights_bs, teacher)
        else:
            assert isinstance(teacher, Head), "distillation needs distributions"
            loss_sum, said = self._from_head(head, batch, weights_bs, teacher)
        metrics = {
            name: torch.stack([(value_bs * weights_bs).sum(dtype=torch.float64), count.double()])
            for name, value_bs in said.items()
        }
        if self.scheduled:
            metrics["kd alpha"] = torch.stack([self.alpha * count.double(), count.double()])
        return LossOutput(loss_sum=loss_sum, count=count, metrics=metrics)

    def _from_head(
        self, head: Head, batch: Batch, weights_bs: torch.Tensor, teacher: Head
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(summed loss, metric -> value of each position) beside all logits of the teacher."""
        adapts = self.temperature.adapts
        loss_sum, values = head.loss(
            self.kind,
            self._positions(batch, weights_bs, _UNSCALED if adapts else self.temperature.fixed()),
            teacher,
            adapt=self.temperature.adapt if adapts else None,
        )
        said = (
            values.ce, values.kd, values.teacher_nll, values.teacher_entropy,
            values.agreement,
        )  # fmt: skip
        named = zip(Distillation.metric_names, said, strict=True)
        return loss_sum, {name: value for name, value in named if value is not None}

    def _from_store(
        self, head: Head, batch: Batch, weights_bs: torch.Tensor, stored: PaddedLogits
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The same beside what is stored of it."""
        assert self.stored is not None, "taught_by was not told of stored logits"
        scales = self.stored.scales(stored, head.shard.valid)
        loss_sum, values = head.loss(
            SparseKernelLoss(self.stored.loss),
            self._positions(batch, weights_bs, scales),
            self.stored.targets(stored, scales.teacher, head.shard.valid),
        )
        assert values.agreement is not None
        return loss_sum, {
            "lm loss": values.ce,
            "kd loss": values.kd,
            "teacher loss": -stored.gold_log_prob,
            "teacher entropy": stored.entropy,
            "top-1 agreement": values.agreement,
            "kept mass": 1 - stored.tail_mass,
        }

    def _positions(self, batch: Batch, weights_bs: torch.Tensor, scales: Scales) -> Positions:
        return Positions(
            labels_bs=batch.labels_bs,
            ce_weight=(1 - self.alpha) * weights_bs,
            kd_weight=self.alpha * scales.weight * weights_bs,
            student_scale=scales.student,
            teacher_scale=scales.teacher,
        )

    def reference(
        self,
        logits_bsV: torch.Tensor,
        batch: Batch,
        teacher: torch.Tensor | PaddedLogits | None = None,
    ) -> torch.Tensor:
        """Mean loss, straight from whole logits of both."""
        assert teacher is not None, "distillation needs a teacher's logits"
        columns = logits_bsV.shape[-1]
        student = logits_bsV.transpose(0, 1).flatten(0, 1)
        whole = VocabShard(first=0, size=columns, valid=columns, group=None)
        weights_bs = batch.mask_bs.double()
        if isinstance(teacher, PaddedLogits):
            assert self.stored is not None, "taught_by was not told of stored logits"
            scales = self.stored.scales(teacher, columns)
            tokens = self._positions(batch, weights_bs, scales).tokens(whole)
            targets = self.stored.targets(teacher, scales.teacher, columns)
            losses = sparse_losses(self.stored.loss, student, targets, tokens)
        else:
            scales = self.temperature.of(_plain_stats(teacher, self.temperature), columns)
            tokens = self._positions(batch, weights_bs, scales).tokens(whole)
            losses = self._losses(student, teacher.transpose(0, 1).flatten(0, 1), tokens)
        losses_bs = losses.view(batch.labels_bs.t().shape).t()
        return mean_by_definition(losses_bs, batch, self.common.loss_normalization)

    def _losses(self, student: torch.Tensor, teacher: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        if not isinstance(self.kind, FunctionLoss):
            return token_losses(self.kind.loss, student, teacher, tokens)
        losses = token_losses(TokenLoss(z_loss=self.kind.z_loss), student, None, tokens)
        divergence = self.kind.function(
            student * tokens.student_scale_N[:, None],
            teacher * tokens.teacher_scale_N[:, None],
            tokens.labels_N,
        )
        return losses + tokens.kd_weight_N * divergence


def _plain_stats(teacher_bsV: torch.Tensor, temperature: Temperature) -> TeacherStats:
    """The statistics by their definitions."""
    log_q = teacher_bsV.log_softmax(-1)
    return TeacherStats(
        entropy=-(log_q.exp() * log_q).sum(-1),
        logit_std=teacher_bsV.std(-1),
        power_sum=(log_q / temperature.base).exp().sum(-1),
    )


def _kind(common: LossConfig, config: KdConfig) -> KernelLoss | FunctionLoss:
    """By the kernels where they know the divergence, else by its function."""
    found = KD_LOSSES[config.kd_loss]
    if callable(found):
        return FunctionLoss(found, z_loss=common.z_loss_weight)
    return KernelLoss(TokenLoss(divergence=found, beta=config.kd_beta, z_loss=common.z_loss_weight))
