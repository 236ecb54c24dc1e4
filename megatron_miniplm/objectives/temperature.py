"""The teacher's temperature: one for all tokens, or one that follows how sure it is of each.

With h the entropy of the teacher at temperature 1 (nats), std the standard deviation of its logits,
both of one token and over the V real columns, and T `--kd-temperature`:

    fixed      tau = T
    normkd     tau = T std, student at 1                 NormKD, arXiv:2308.00520
    wttm       tau = T, student at 1; the divergence is weighed with sum_v q_v^(1/T) / center:
               Weighted Transformed Teacher Matching, arXiv:2402.11148
    adakd-sd   tau = clip(T std / center)                mirrored: clip(T center / std)
    adakd-h    tau = max - (max - min) h / log V         mirrored: min + (max - min) h / log V

NormKD's own student is divided by the std of its own logits, which would take a gradient through a
temperature; here it is as Pre-training Distillation has it. WTTM's sum is V^(1 - 1/T) for a teacher
that knows nothing and 1 for a sure one, 220 times as much at 50,000 columns and T = 2; `center` (1)
keeps the learning rate's scale.

The last two are named by Pre-training Distillation (arXiv 2410.16215), whose text gives no formula:
these are DEFINITIONS OF OUR OWN, not verified against the paper. Where one would average std over
past batches, there is a fixed `center`: a state would make a loss depend on micro-batches, ranks
and resumes. No gradient goes through a temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron_miniplm.core.config import refuse_idle
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.kernels.token_loss import Tokens
from megatron_miniplm.models.teacher_stats import TeacherStats, dense_stats
from megatron_miniplm.parallel.vocab import VocabShard

TemperatureMethod = Literal["fixed", "normkd", "wttm", "adakd-sd", "adakd-h"]
_ADAKD = ("adakd-sd", "adakd-h")
_USERS = {
    "kd_temperature_min": _ADAKD,
    "kd_temperature_max": _ADAKD,
    "kd_temperature_center": ("adakd-sd", "wttm"),
    "kd_temperature_mirrored": _ADAKD,
}
_LEAST_STD = 1e-3  # of logits that are all but equal


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """Temperatures that follow the teacher, token by token."""

    kd_temperature_method: TemperatureMethod = "fixed"
    """fixed; normkd: --kd-temperature times the std of the teacher's logits; wttm: fixed, and
    tokens weighed by how unsure the teacher is; adakd-sd (std), adakd-h (entropy): a sure teacher
    is softened, bounded. The last two are definitions of our own, not verified against a paper."""
    kd_temperature_min: float = 0.5
    """adakd-*: least temperature."""
    kd_temperature_max: float = 2.0
    """adakd-*: highest temperature."""
    kd_temperature_center: float | None = None
    """adakd-sd: std of logits at which the temperature is --kd-temperature; default: the mean of
    the store that is learned from. wttm: what the weights of tokens are divided by, 1 (a sure
    teacher's) to the square root of the vocabulary at --kd-temperature 2; default: 1. Fixed, so
    that batches, ranks and resumes change nothing."""
    kd_temperature_mirrored: bool = False
    """adakd-*: the other way round, so that an unsure teacher is softened."""

    def __post_init__(self) -> None:
        refuse_idle(self, _USERS, "--kd-temperature-method", self.kd_temperature_method)
        low, high = self.kd_temperature_min, self.kd_temperature_max
        if not 0 < low <= high:
            raise ConfigError(
                f"--kd-temperature-min {low} must be above 0 and at most --kd-temperature-max "
                f"{high}"
            )
        if self.kd_temperature_center is not None and not self.kd_temperature_center > 0:
            raise ConfigError(
                f"--kd-temperature-center {self.kd_temperature_center} must be above 0"
            )


@dataclass(frozen=True, kw_only=True)
class Scales:
    """What temperatures make of a divergence: numbers for all tokens, or one a token."""

    student: torch.Tensor | float
    """1 / temperature."""
    teacher: torch.Tensor | float
    weight: torch.Tensor | float
    """Factor of the divergence."""


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """The temperatures of a run."""

    config: TemperatureConfig
    base: float
    """--kd-temperature."""
    student: float | None
    """None: the teacher's, token by token."""
    power: int
    """The divergence is weighed with the student's temperature to this power."""

    @property
    def adapts(self) -> bool:
        """Whether tokens differ."""
        return self.config.kd_temperature_method != "fixed"

    @property
    def weighs(self) -> bool:
        """Whether tokens are weighed with `TeacherStats.power_sum`."""
        return self.config.kd_temperature_method == "wttm"

    @property
    def only(self) -> float | None:
        """The teacher's temperature, where all tokens have one."""
        return self.base if self.config.kd_temperature_method in ("fixed", "wttm") else None

    @property
    def center(self) -> float:
        """Of adakd-sd; ConfigError where nobody said it."""
        if self.config.kd_temperature_center is None:
            raise ConfigError(
                "--kd-temperature-method adakd-sd beside a teacher of which the mean std of logits "
                "is not known needs --kd-temperature-center (2 to 4 is usual of language models)"
            )
        return self.config.kd_temperature_center

    def fixed(self) -> Scales:
        """Of all tokens, where they do not differ."""
        return self._scales(self.base, 1.0)

    def of(self, stats: TeacherStats, vocab: int) -> Scales:
        """Of tokens of which the teacher has such statistics over `vocab` columns."""
        if not self.adapts:
            return self.fixed()
        weight: torch.Tensor | float = 1.0
        if self.weighs:
            weight = stats.power_sum / (self.config.kd_temperature_center or 1.0)
        return self._scales(self.tau(stats, vocab), weight)

    def tau(self, stats: TeacherStats, vocab: int) -> torch.Tensor | float:
        """The teacher's temperature."""
        config, method = self.config, self.config.kd_temperature_method
        low, high = config.kd_temperature_min, config.kd_temperature_max
        std = stats.logit_std.clamp_min(_LEAST_STD)
        if method == "normkd":
            return self.base * std
        if method == "adakd-sd":
            ratio = self.center / std if config.kd_temperature_mirrored else std / self.center
            return (self.base * ratio).clamp(low, high)
        if method == "adakd-h":
            part = (stats.entropy / math.log(vocab)).clamp(0, 1)
            part = 1 - part if config.kd_temperature_mirrored else part
            return high - (high - low) * part
        return self.base

    def _scales(self, tau: torch.Tensor | float, weight: torch.Tensor | float) -> Scales:
        student = tau if self.student is None else self.student
        return Scales(student=1 / student, teacher=1 / tau, weight=weight * student**self.power)

    def adapt(self, teacher_Cv: torch.Tensor, tokens: Tokens, shard: VocabShard) -> Tokens:
        """The tokens of a chunk with the temperatures that the teacher's logits give them."""
        stats = dense_stats(teacher_Cv, shard, temperature=self.base if self.weighs else None)
        scales = self.of(stats, shard.valid)
        learns = tokens.kd_weight_N != 0  # the logits of others may be anything

        def settled(value: torch.Tensor | float, other: float) -> torch.Tensor:
            like = tokens.kd_weight_N
            if not isinstance(
                value, torch.Tensor
            ):  # filled on the device: a copy would be waited for
                return torch.where(learns, torch.full_like(like, value), other)
            return torch.where(learns, value.to(like.dtype), other)

        return replace(
            tokens,
            kd_weight_N=tokens.kd_weight_N * settled(scales.weight, 0),
            student_scale_N=settled(scales.student, 1),
            teacher_scale_N=settled(scales.teacher, 1),
        )
