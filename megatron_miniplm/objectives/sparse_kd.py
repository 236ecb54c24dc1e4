"""A stored teacher's likeliest tokens as the targets of a loss: temperature and tail are settled.

With l the stored log-probs (full softmax at temperature 1) of the kept set S, T the teacher's
temperature, and k the mass of S at that temperature:

    F = softmax(l / T) on S                   what a teacher would say that knows S alone
    renormalize, renormalize-both             w = F
    raw, residual, uniform                    w = k F, tail 1 - k
    sampled                                   w = exp(l): importance weights, sum near 1

k is 1 - tail mass at T = 1, which the store has; at others it takes the stored log-partition of
that temperature. So weights and tail add up to 1 whatever the encoding of l rounded. Truncation is
before temperature: T only reshapes S (arXiv 2410.16215).

Shapes: b instances of s positions, K entries a position; N = s * b tokens in Megatron's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.sparse_logits import NO_ENTRY, PaddedLogits
from megatron_miniplm.kernels.sparse_loss import SparseForm, SparseLoss, SparseTargets
from megatron_miniplm.models.signal import SignalFacts
from megatron_miniplm.models.teacher_stats import TeacherStats
from megatron_miniplm.objectives.temperature import Scales, Temperature

Tail = Literal["residual", "renormalize", "renormalize-both", "raw", "uniform", "sampled"]
_FORMS: dict[Tail, SparseForm] = {
    "residual": "residual",
    "renormalize": "support",
    "renormalize-both": "on_support",
    "raw": "support",
    "uniform": "uniform",
    "sampled": "support",
}
_OF_SUPPORT = ("renormalize", "renormalize-both")
_SQUARES: dict[str, SparseForm] = {"brier": "square", "mse_centered": "square_logits"}
_REASONS = {
    "mse_logits": "the store has log-probs, which are logits but for a number: use mse_centered",
    "mse_log_probs": "log-probs of tokens that are not stored are not known",
    "reverse_kl": "it is infinite where the student has mass and the stored teacher none",
}
_OTHERWISE = "it needs the teacher's probability of every token, and only some are stored"


@dataclass(frozen=True, kw_only=True)
class SparseKd:
    """How stored logits are learned from."""

    loss: SparseLoss
    tail: Tail
    temperature: Temperature

    @classmethod
    def of(
        cls, kd_loss: str, tail: Tail, temperature: Temperature, facts: SignalFacts, *,
        z_loss: float,
    ) -> SparseKd:  # fmt: skip
        """Refuses what the stores do not say enough for."""
        if kd_loss not in ("forward_kl", "soft_nll", *_SQUARES):
            raise ConfigError(
                f"--kd-loss {kd_loss} does not exist for a stored teacher: "
                f"{_REASONS.get(kd_loss, _OTHERWISE)}; there is forward_kl, soft_nll, "
                f"{', '.join(_SQUARES)}, or --teacher online"
            )
        if kd_loss in _SQUARES and tail not in ("renormalize", "raw"):
            raise ConfigError(
                f"--kd-loss {kd_loss} has no term for --kd-tail {tail}: pass --kd-tail renormalize "
                "or raw"
            )
        if facts.sampled != (tail == "sampled"):
            there = "were sampled" if facts.sampled else "hold the likeliest tokens"
            remedy = "sampled" if facts.sampled else "residual"
            raise ConfigError(
                f"--kd-tail {tail} does not fit the logits, which {there}: pass --kd-tail {remedy}"
            )
        _refuse_temperature(tail, temperature, facts)
        form = _SQUARES.get(kd_loss) or _FORMS[tail]
        loss = SparseLoss(form=form, soft=kd_loss == "soft_nll", z_loss=z_loss)
        return cls(loss=loss, tail=tail, temperature=temperature)

    def scales(self, stored: PaddedLogits, vocab: int) -> Scales:
        """What the temperatures of the tokens are, [b, s] where they differ.

        WTTM's sum is over the kept set alone, renormalised.
        """
        powers = torch.ones_like(stored.entropy)
        if self.temperature.weighs:
            kept = _on_support(stored.log_probs)
            powers = (kept.log() / self.temperature.base).exp().sum(-1)
        stats = TeacherStats(entropy=stored.entropy, logit_std=stored.logit_std, power_sum=powers)
        return self.temperature.of(stats, vocab)

    def targets(
        self, stored: PaddedLogits, scale: torch.Tensor | float, vocab: int
    ) -> SparseTargets:
        """The targets over `vocab` columns; `scale`: 1 / temperature of the teacher, or [b, s]."""
        scaled = stored.log_probs * (scale[..., None] if isinstance(scale, torch.Tensor) else scale)
        tail = torch.zeros_like(stored.tail_mass)
        if self.tail == "sampled":
            weights = stored.log_probs.exp()
        else:
            weights = _on_support(scaled)
            if self.tail not in _OF_SUPPORT:
                tail = self._tail(stored, scaled, vocab)
                weights = weights * (1 - tail)[..., None]
        return SparseTargets(
            ids_NK=stored.ids.transpose(0, 1).flatten(0, 1),
            probs_NK=weights.transpose(0, 1).flatten(0, 1),
            tail_N=tail.t().flatten(),
        )

    def _tail(self, stored: PaddedLogits, scaled: torch.Tensor, vocab: int) -> torch.Tensor:
        """Mass off the kept set at the teacher's temperature; 0 where nothing is off it."""
        if self.temperature.only == 1:
            return stored.tail_mass
        partition = stored.log_partitions[self.temperature.base]
        off = 1 - (scaled - partition[..., None]).exp().sum(-1)
        # Mass at temperature 1 would not say it: 1e-9 of a sure teacher is a tenth at 2.
        kept = (stored.ids != NO_ENTRY).sum(-1)
        return torch.where((kept > 0) & (kept < vocab), off.clamp(0, 1), 0)


def _on_support(log_weights: torch.Tensor) -> torch.Tensor:
    """Softmax over the entries; a position without any has none."""
    return log_weights.softmax(-1).nan_to_num(0) if log_weights.shape[-1] else log_weights


def _refuse_temperature(tail: Tail, temperature: Temperature, facts: SignalFacts) -> None:
    """Tempered mass off the kept set takes the log-partition of that very temperature."""
    if tail in _OF_SUPPORT or temperature.only == 1:
        return
    if tail == "sampled":
        raise ConfigError(
            "weights of sampled logits are unbiased at temperature 1 alone: leave out "
            "--kd-temperature and --kd-temperature-method"
        )
    if temperature.only is None:
        raise ConfigError(
            f"--kd-tail {tail} needs the log-partition of each token's temperature, and "
            f"--kd-temperature-method {temperature.config.kd_temperature_method} gives every token "
            "another: pass --kd-tail renormalize"
        )
    if temperature.only not in facts.temperatures:
        known = ", ".join(f"{tau:g}" for tau in sorted(facts.temperatures)) or "none"
        raise ConfigError(
            f"--kd-tail {tail} at --kd-temperature {temperature.only:g} needs log-partitions of "
            f"that temperature, and the logits have {known}: cache them with "
            f"--kd-temperatures {temperature.only:g}, or pass --kd-tail renormalize"
        )
