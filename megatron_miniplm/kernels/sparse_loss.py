"""Losses from a teacher of which only some tokens are known: the words of the sparse kernels.

Of token n with student logits s and label y, a = student_scale_n * s and p = softmax(a) over all
real columns V, as in `kernels.token_loss`. The teacher says weights w of K tokens, the support S
(top-k, top-p, or sampled), and how much is off it, `tail`. With c = sum_S w and p_S = sum_S p:

    form            D                                              dD/da on S          off S
    support         sum_S w (log w - log p)                        c p - w             c p
    residual        the same + tail (log tail - log(1 - p_S))      (c + tail) p - w    (c + tail) p
                                                                          - tail p / (1 - p_S)
    uniform         the same, tail spread evenly off S: u each     (c + tail) p - w    (c + tail) p
                                                                                       - u
    on_support      sum_S w (log w - log r), r = p / p_S           c r - w             0
    square          sum_V (p - w)^2, w = 0 off S                   2 p (p - w - m)     2 p (p - m)
    square_logits   variance over S of d = a - log w               2 (d - mean d) / K  0

with m = sum_V p (p - w). The loss of a token has its cross entropy beside it, at temperature 1:

    L_n = kd_weight_n * D + ce_weight_n * (logsumexp(s) - s_y + z_loss * logsumexp(s)^2)

`support` is a KL divergence only where w is a distribution; it is unbiased for w that were sampled
with importance weights. `residual` is one where w and tail are: that of the distributions with all
tokens off S as one. Where no column is off S, there is no tail; where a row has no entries, p_S
and c are 0. What the weights mean (renormalised, tempered) is settled in `objectives.sparse_kd`.

Shapes: N tokens, K entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from megatron_miniplm.core.errors import ConfigError

SparseForm = Literal["support", "residual", "uniform", "on_support", "square", "square_logits"]
SPARSE_FORMS: tuple[SparseForm, ...] = get_args(SparseForm)
LOGARITHMIC: tuple[SparseForm, ...] = ("support", "residual", "uniform", "on_support")
"""Those with a teacher's entropy in them, which `SparseLoss.soft` leaves out."""


@dataclass(frozen=True, kw_only=True)
class SparseLoss:
    """Which loss; the same for all tokens."""

    form: SparseForm
    soft: bool = False
    """Leave out w log w (and the tail's): the negative log-likelihood, with the same gradient."""
    z_loss: float = 0.0
    """Factor of the squared log-sum-exp that is added to the cross entropy (PaLM)."""

    def __post_init__(self) -> None:
        if self.form not in SPARSE_FORMS:
            raise ConfigError(
                f"there is no sparse loss {self.form!r}; there is: {', '.join(SPARSE_FORMS)}"
            )
        if self.soft and self.form not in LOGARITHMIC:
            raise ConfigError(
                f"soft leaves out a teacher's entropy, and {self.form} has none; it goes with "
                f"{', '.join(LOGARITHMIC)}"
            )


@dataclass(frozen=True, kw_only=True)
class SparseTargets:
    """What a teacher says of each token."""

    ids_NK: torch.Tensor
    """int32, global ids, distinct within a row; -1 where there is no entry."""
    probs_NK: torch.Tensor
    """fp32, weight of each entry, not negative; 0 where there is no entry. An entry of weight 0 is
    in the support all the same, but not in `square_logits`, since it has no logarithm."""
    tail_N: torch.Tensor
    """fp32, the teacher's mass off the support; read by `residual` and `uniform` alone."""

    def rows(self, part: slice) -> SparseTargets:
        """Those of some tokens; views."""
        return replace(
            self,
            ids_NK=self.ids_NK[part],
            probs_NK=self.probs_NK[part],
            tail_N=self.tail_N[part],
        )
