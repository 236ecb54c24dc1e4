"""The record: a few floats a token that say all of a shard's logits, and how records merge.

Every shard of the vocabulary (a TP rank, a tile, a GPU's program) reduces its real columns to one
record; merged, they give the loss of the whole vocabulary and what its gradient needs. So one
all-gather of `SIZE` floats a token is all the communication of a loss; the
losses that are not linear in normalised probabilities need two floats more (`merge_inner`).

With S, T the largest raw logits of student and teacher in the shard, u = student_scale * (s - S)
and v = teacher_scale * (t - T), sums over the shard's real columns:

    sum_s = sum e^u          sum_t = sum e^v          sum_s1, sum_t1: the same at scale 1
    forward = sum e^v (v - u)    reverse = sum e^u (u - v)    entropy = sum e^v v
    mean_d, square_d: mean and sum of squared deviations of d = u - v over `columns` columns

Everything is relative to the maxima, so that adding a number to all logits of a token changes
nothing, not even rounding: log p = u - log sum_s, without a large log-sum-exp to cancel.

Shapes: W shards, N tokens, R = SIZE. Floats fp32 (fp64 from the reference in fp64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import torch

from megatron_miniplm.kernels.sparse_loss import SparseLoss
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens

NO_COLUMN = -1e30  # maximum where there is no real column: finite, so that no NaN arises


class Field(IntEnum):
    """Column of a record. Without a teacher, or where a loss does not need one, 0."""

    MAX_S = 0
    SUM_S = 1
    SUM_S1 = 2
    GOLD_S = 3  # raw logit of the label; 0 where another shard has it
    ARG_S = 4  # global column of the maximum, the lowest of equals; exact below 2^24
    MAX_T = 5
    SUM_T = 6
    SUM_T1 = 7
    GOLD_T = 8
    ARG_T = 9
    FORWARD = 10
    REVERSE = 11
    ENTROPY = 12
    COLUMNS = 13
    MEAN_D = 14
    SQUARE_D = 15


SIZE = len(Field)


@dataclass(frozen=True, kw_only=True)
class TokenValues:
    """Values of every token, without weights, in nats; 0 for tokens of weight 0.

    All [N] from the kernels, all [b, s] from `models.head`.
    """

    kd: torch.Tensor
    """The divergence (0 without a teacher)."""
    ce: torch.Tensor
    """Cross entropy of the label at temperature 1."""
    lse: torch.Tensor
    """Log-sum-exp of the raw student logits."""
    teacher_entropy: torch.Tensor | None
    """Of the teacher at its temperature; None without a teacher, as the next two, and these two
    where the teacher is known on some tokens."""
    teacher_nll: torch.Tensor | None
    """Cross entropy of the label under the teacher at temperature 1."""
    agreement: torch.Tensor | None
    """1 where both have their maximum at the same column."""

    @classmethod
    def joined(cls, parts: Sequence[TokenValues]) -> TokenValues:
        """Of the tokens of several parts, one after another."""

        def join(name: str) -> Any:
            found = [getattr(part, name) for part in parts]
            return None if found[0] is None else torch.cat(found)

        return cls(**{item.name: join(item.name) for item in fields(cls)})

    def weighted(self, loss: TokenLoss | SparseLoss, tokens: Tokens) -> torch.Tensor:
        """L_n, the loss of every token with its weights."""
        ce_N = self.ce + loss.z_loss * self.lse.square()
        return tokens.kd_weight_N * self.kd + tokens.ce_weight_N * ce_N


def merge(records_WNR: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """One record out of those of W disjoint shards; associative. [W, N, R] -> [N, R]."""
    if records_WNR.shape[0] == 1:
        return records_WNR[0]
    part = unpack(records_WNR)
    max_s, max_t = part[Field.MAX_S].amax(0), part[Field.MAX_T].amax(0)
    raw_s, raw_t = part[Field.MAX_S] - max_s, part[Field.MAX_T] - max_t
    u, v = raw_s * tokens.student_scale_N, raw_t * tokens.teacher_scale_N
    e_s, e_t = u.exp(), v.exp()
    sum_s, sum_t = part[Field.SUM_S], part[Field.SUM_T]
    counts, columns = part[Field.COLUMNS], part[Field.COLUMNS].sum(0)
    means = part[Field.MEAN_D] + torch.where(counts > 0, u - v, 0)
    mean = (counts * means).sum(0) / columns.clamp_min(1)
    merged = {
        Field.MAX_S: max_s,
        Field.SUM_S: (sum_s * e_s).sum(0),
        Field.SUM_S1: (part[Field.SUM_S1] * raw_s.exp()).sum(0),
        Field.GOLD_S: part[Field.GOLD_S].sum(0),
        Field.ARG_S: lowest_of_top(part[Field.ARG_S], raw_s),
        Field.MAX_T: max_t,
        Field.SUM_T: (sum_t * e_t).sum(0),
        Field.SUM_T1: (part[Field.SUM_T1] * raw_t.exp()).sum(0),
        Field.GOLD_T: part[Field.GOLD_T].sum(0),
        Field.ARG_T: lowest_of_top(part[Field.ARG_T], raw_t),
        # e^v (v - u) with both relative to the new maxima.
        Field.FORWARD: (e_t * (part[Field.FORWARD] + sum_t * (v - u))).sum(0),
        Field.REVERSE: (e_s * (part[Field.REVERSE] + sum_s * (u - v))).sum(0),
        Field.ENTROPY: (e_t * (part[Field.ENTROPY] + sum_t * v)).sum(0),
        Field.COLUMNS: columns,
        Field.MEAN_D: mean,
        Field.SQUARE_D: (part[Field.SQUARE_D] + counts * (means - mean).square()).sum(0),
    }
    return torch.stack([merged[field] for field in Field], dim=-1)


def merge_inner(inner_WN2: torch.Tensor) -> torch.Tensor:
    """[W, N, 2] -> [N, 2]: value part and sum of p * bracket of disjoint shards."""
    return inner_WN2.sum(0)


def values(
    loss: TokenLoss, record_NR: torch.Tensor, inner_N2: torch.Tensor | None, tokens: Tokens
) -> TokenValues:
    """The loss of every token out of the merged record; computed in fp64, given as the record's."""
    exact_NR = record_NR.double()
    part, active = unpack(exact_NR), tokens.active

    def given(value_N: torch.Tensor) -> torch.Tensor:
        return torch.where(active, value_N, 0).to(record_NR.dtype)

    log_s1 = part[Field.SUM_S1].log()
    ce_N = given(log_s1 - (part[Field.GOLD_S] - part[Field.MAX_S]))
    lse_N = given(log_s1 + part[Field.MAX_S])
    if loss.divergence is None:
        return TokenValues(
            kd=torch.zeros_like(ce_N), ce=ce_N, lse=lse_N,
            teacher_entropy=None, teacher_nll=None, agreement=None,
        )  # fmt: skip
    nll_N = part[Field.SUM_T1].log() - (part[Field.GOLD_T] - part[Field.MAX_T])
    return TokenValues(
        kd=given(_divergence(loss, exact_NR, inner_N2, tokens)),
        ce=ce_N,
        lse=lse_N,
        teacher_entropy=given(_teacher_entropy(part)),
        teacher_nll=given(nll_N),
        agreement=given((part[Field.ARG_S] == part[Field.ARG_T]).double()),
    )


def square_center(loss: TokenLoss, record_NR: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """What a squared error subtracts from d = u - v before it squares, [N].

    a - b is d plus the difference of the scaled maxima; log p - log q is d less that of the logs
    of the sums.
    """
    part = unpack(record_NR)
    if loss.form == "mse_centered":
        return part[Field.MEAN_D]
    if loss.form == "mse_log_probs":
        return part[Field.SUM_S].log() - part[Field.SUM_T].log()
    max_a = part[Field.MAX_S] * tokens.student_scale_N
    return part[Field.MAX_T] * tokens.teacher_scale_N - max_a


def unpack(record_NR: torch.Tensor) -> dict[Field, torch.Tensor]:
    """The columns of a record (or of several) by name; views."""
    return dict(zip(Field, record_NR.unbind(-1), strict=True))


def _divergence(
    loss: TokenLoss, record_NR: torch.Tensor, inner_N2: torch.Tensor | None, tokens: Tokens
) -> torch.Tensor:
    """The divergences of `kernels.definition` in terms of the record, [N]."""
    if inner_N2 is not None:
        return inner_N2[:, 0].double()
    assert loss.form is not None, "without a teacher, there is no divergence"
    part = unpack(record_NR)
    log_ratio = part[Field.SUM_S].log() - part[Field.SUM_T].log()
    if loss.form == "reverse_kl":
        return part[Field.REVERSE] / part[Field.SUM_S] - log_ratio
    if loss.form in ("forward_kl", "soft_nll"):
        forward = part[Field.FORWARD] / part[Field.SUM_T] + log_ratio
        return forward if loss.form == "forward_kl" else forward + _teacher_entropy(part)
    mean_N = part[Field.MEAN_D] - square_center(loss, record_NR, tokens)
    return part[Field.SQUARE_D] / part[Field.COLUMNS] + mean_N.square()


def _teacher_entropy(part: dict[Field, torch.Tensor]) -> torch.Tensor:
    return part[Field.SUM_T].log() - part[Field.ENTROPY] / part[Field.SUM_T]


def lowest_of_top(arg_WN: torch.Tensor, below_WN: torch.Tensor) -> torch.Tensor:
    """Column of the highest maximum; the lowest column of several that are equal."""
    return torch.where(below_WN == 0, arg_WN, torch.inf).amin(0)
