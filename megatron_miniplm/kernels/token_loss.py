"""What a token-level loss is made of: the words that all kernels, the record and the head share.

Of token n with student logits s, teacher logits t (real columns only) and label y:

    a = student_scale_n * s,  b = teacher_scale_n * t                    (scale = 1 / temperature)
    L_n = kd_weight_n * D(softmax(b), softmax(a))
        + ce_weight_n * (logsumexp(s) - s_y + z_loss * logsumexp(s)^2)

Mixing (alpha), temperature correction (T^2, T or 1), masks and normalization are in the weights
already: no kernel knows them. A token of which both weights are 0 is not read; its gradient row is
exactly 0. Columns from `valid` on do not exist: probability 0, gradient 0, never read.

Shapes: N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from megatron_miniplm.core.errors import ConfigError

Divergence = Literal[
    "forward_kl",  # KL(q || p): Hinton et al., arXiv:1503.02531; q teacher, p student
    "soft_nll",  # -sum q log p: forward KL + entropy of q (MiniPLM's Vanilla KD)
    "reverse_kl",  # KL(p || q): MiniLLM, arXiv:2306.08543
    "jsd",  # beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p: arXiv:2306.13649
    "skew_kl",  # KL(q || beta q + (1 - beta) p): DistiLLM, arXiv:2402.03898
    "skew_rkl",  # KL(p || beta p + (1 - beta) q): DistiLLM
    "tvd",  # sum |p - q| / 2: arXiv:2307.15190
    "mse_logits",  # mean (a - b)^2 over the vocabulary: arXiv:2105.08919
    "mse_centered",  # the same of logits without their means
    "mse_log_probs",  # mean (log p - log q)^2 over the vocabulary
    "brier",  # sum (p - q)^2
]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
MIXTURES: tuple[Divergence, ...] = ("jsd", "skew_kl", "skew_rkl")
"""Those that mix the two distributions with weight beta."""


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """Which loss; the same for all tokens."""

    divergence: Divergence | None = None
    """Between teacher and student; None: cross entropy alone, there is no teacher."""
    beta: float = 0.5
    """Weight of the mixture of jsd and of the skewed divergences; unused by the others."""
    z_loss: float = 0.0
    """Factor of the squared log-sum-exp that is added to the cross entropy (PaLM)."""

    def __post_init__(self) -> None:
        if self.divergence is not None and self.divergence not in DIVERGENCES:
            raise ConfigError(
                f"there is no divergence {self.divergence!r}; there is: {', '.join(DIVERGENCES)}"
            )
        if not 0 <= self.beta <= 1 or (self.beta == 1 and str(self.divergence).startswith("skew")):
            raise ConfigError(
                f"beta {self.beta} of {self.divergence} must be from 0 to 1, below 1 where it skews"
            )

    @property
    def form(self) -> Divergence | None:
        """The divergence that is computed: at an end of beta, a mixture is a plain KL.

        JSD at 0 and 1 is forward and reverse KL by definition, as in TRL and Liger; its limits
        there would be 0.
        """
        ends: dict[tuple[Divergence | None, float], Divergence] = {
            ("jsd", 0): "forward_kl",
            ("jsd", 1): "reverse_kl",
            ("skew_kl", 0): "forward_kl",
            ("skew_rkl", 0): "reverse_kl",
        }
        return ends.get((self.divergence, self.beta), self.divergence)

    @property
    def needs_inner(self) -> bool:
        """Whether a second pass (and collective) over normalised probabilities is needed."""
        return self.form in ("jsd", "skew_kl", "skew_rkl", "tvd", "brier")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a loss knows of each token, and where this shard of the vocabulary lies."""

    labels_N: torch.Tensor
    """int64, global ids; one that is no real column has no gold logit (weigh its ce with 0)."""
    kd_weight_N: torch.Tensor
    ce_weight_N: torch.Tensor
    student_scale_N: torch.Tensor
    """1 / temperature, above 0."""
    teacher_scale_N: torch.Tensor
    first: int
    """Global id of the shard's column 0."""
    valid: int
    """How many of the shard's columns are real."""

    @classmethod
    def of(
        cls,
        labels_N: torch.Tensor,
        *,
        kd_weight: torch.Tensor | float = 1.0,
        ce_weight: torch.Tensor | float = 0.0,
        student_scale: torch.Tensor | float = 1.0,
        teacher_scale: torch.Tensor | float = 1.0,
        valid: int,
        first: int = 0,
    ) -> Tokens:
        """Dense float tensors out of numbers and tensors; numbers become fp32."""

        def dense(value: torch.Tensor | float) -> torch.Tensor:
            if isinstance(value, torch.Tensor):
                return value.expand(labels_N.shape).contiguous()
            return labels_N.new_full(labels_N.shape, value, dtype=torch.float32)

        return cls(
            labels_N=labels_N.contiguous(),
            kd_weight_N=dense(kd_weight),
            ce_weight_N=dense(ce_weight),
            student_scale_N=dense(student_scale),
            teacher_scale_N=dense(teacher_scale),
            first=first,
            valid=valid,
        )

    def rows(self, part: slice) -> Tokens:
        """Some of the tokens; views."""
        return replace(
            self,
            labels_N=self.labels_N[part],
            kd_weight_N=self.kd_weight_N[part],
            ce_weight_N=self.ce_weight_N[part],
            student_scale_N=self.student_scale_N[part],
            teacher_scale_N=self.teacher_scale_N[part],
        )

    @property
    def active(self) -> torch.Tensor:
        """Which tokens count at all: bool, [N]."""
        return (self.kd_weight_N != 0) | (self.ce_weight_N != 0)
