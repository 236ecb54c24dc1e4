"""Alpha over a run: constant, rising, falling, switched, or warm-up, plateau and decay (WSD).

A function of the samples that a run has consumed, so that a resumed run, growing batches and any
layout give the same. The shapes are those of Pre-training Distillation (arXiv 2410.16215; the paper
names them, the formulas are ours). With s of T samples consumed, from `highest` H
to `lowest` L:

    constant     H
    linear-inc   L + (H - L) s / T
    linear-dec   H - (H - L) s / T
    period       H in the first `duty` of every period, L in the rest
    wsd          H s / W in the warm-up, then H, then L + (H - L) (1 + cos(pi x)) / 2 over the decay
    wsd-beta     H, less a wsd from 0 to H - L and back to 0: with H 1 and L 0, the share of the
                 cross entropy follows the curve

W and the length D of the decay are the learning rate's unless they are said, so that a teacher is
phased out while the rate falls. A decay that would begin in the warm-up begins at its end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

from megatron_miniplm.core.config import refuse_idle
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.objectives.objective import Progress

AlphaShape = Literal["constant", "linear-inc", "linear-dec", "period", "wsd", "wsd-beta"]
_WSD = ("wsd", "wsd-beta")
_USERS = {
    "kd_alpha_min": ("linear-inc", "linear-dec", "period", *_WSD),
    "kd_alpha_warmup_fraction": _WSD,
    "kd_alpha_decay_fraction": _WSD,
    "kd_alpha_period": ("period",),
    "kd_alpha_duty": ("period",),
}


@dataclass(frozen=True, kw_only=True)
class AlphaConfig:
    """How the share of the divergence changes; --kd-alpha is its highest value."""

    kd_alpha_schedule: AlphaShape = "constant"
    """Alpha over the run's samples: constant; linear-inc, linear-dec (between --kd-alpha-min and
    --kd-alpha); period (the two in turn); wsd (warm-up from 0, plateau, cosine decay); wsd-beta
    (the same curve for the cross entropy's share: alpha falls to --kd-alpha-min and rises at the
    end)."""
    kd_alpha_min: float = 0.0
    """Lowest alpha of a schedule; wsd begins with 0 and ends with this."""
    kd_alpha_warmup_fraction: float | None = None
    """wsd: part of the run that the warm-up takes; default: as long as the learning rate's."""
    kd_alpha_decay_fraction: float | None = None
    """wsd: part of the run that the final decay takes; default: as long as the learning rate's
    under --lr-decay-style WSD, a tenth of the run under others; at most what the warm-up leaves."""
    kd_alpha_period: float = 0.1
    """period: its length, as a part of the run."""
    kd_alpha_duty: float = 0.5
    """period: the part of it in which alpha is high; it comes first."""

    def __post_init__(self) -> None:
        refuse_idle(self, _USERS, "--kd-alpha-schedule", self.kd_alpha_schedule)
        for name in ("kd_alpha_min", "kd_alpha_duty"):
            self._refuse_unless(name, 0 <= getattr(self, name) <= 1)
        self._refuse_unless("kd_alpha_period", 0 < self.kd_alpha_period <= 1)
        parts = (self.kd_alpha_warmup_fraction, self.kd_alpha_decay_fraction)
        for name in ("kd_alpha_warmup_fraction", "kd_alpha_decay_fraction"):
            value = getattr(self, name)
            self._refuse_unless(name, value is None or 0 <= value <= 1)
        if sum(filter(None, parts)) > 1:
            raise ConfigError(
                f"--kd-alpha-warmup-fraction {parts[0]} and --kd-alpha-decay-fraction {parts[1]} "
                "are more than the whole run: lower one"
            )

    def _refuse_unless(self, name: str, fits: bool) -> None:
        if not fits:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {getattr(self, name)} must be from 0 to 1")

    def alpha(self, highest: float, progress: Progress) -> float:
        """The share of the divergence in the update that follows."""
        shape, lowest = self.kd_alpha_schedule, self.kd_alpha_min
        if shape == "constant":
            return highest
        done = progress.consumed / progress.total
        if shape == "linear-inc":
            return lowest + (highest - lowest) * done
        if shape == "linear-dec":
            return highest - (highest - lowest) * done
        if shape == "period":
            return highest if done / self.kd_alpha_period % 1 < self.kd_alpha_duty else lowest
        total = progress.total
        warmup = self._samples(self.kd_alpha_warmup_fraction, progress.warmup, total)
        decay = self._samples(self.kd_alpha_decay_fraction, progress.decay, total)
        curve = partial(
            wsd, progress.consumed, total, warmup=warmup, decay=max(0, min(decay, total - warmup))
        )
        if shape == "wsd":
            return curve(highest=highest, lowest=lowest)
        return highest - curve(highest=highest - lowest)

    @staticmethod
    def _samples(fraction: float | None, default: int, total: int) -> int:
        return default if fraction is None else math.ceil(fraction * total)


def wsd(
    step: int, total: int, *, warmup: int, decay: int, highest: float, lowest: float = 0.0
) -> float:
    """Linear warm-up from 0, plateau, cosine decay to `lowest`; in steps of any unit."""
    if step < warmup:
        return highest * step / warmup
    into = step - (total - decay)
    if into <= 0:
        return highest
    return lowest + 0.5 * (highest - lowest) * (1 + math.cos(math.pi * into / decay))
