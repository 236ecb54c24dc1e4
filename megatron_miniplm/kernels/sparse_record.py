"""The record of a sparse loss: a few floats a token that say all of a shard's logits, and its uses.

As `kernels.record`, for a teacher of whom some tokens are known. Columns on the support and off it
are kept apart, each relative to their own largest logit, so that 1 - p_S is a sum of probabilities
and never a difference: it has all its digits where the student is sure of the support, too.

With X the largest raw logit of a set of columns and u = student_scale * (s - X), per shard and set:

    sum = sum e^u    sum1 = sum e^(s - X)    square = sum e^2u
    off the support: columns (how many), mean (of u)
    on the support: weight = sum w, cross = sum w u, overlap = sum w e^u, and over the entries with
    a weight: count, mean_d and square_d (mean and squared deviations) of d = u - log w

Merged, they give the loss (`values`) and its gradient (`coefficients`), which is linear in a few
functions of a column: e^(s - X), e^u, e^2u and 1, and on the support w, w e^u and d.

Shapes: W shards, N tokens, K entries, R = SIZE. Floats fp32 (fp64 from the reference in fp64).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F

from megatron_miniplm.kernels.record import TokenValues, lowest_of_top
from megatron_miniplm.kernels.sparse_loss import SparseLoss, SparseTargets
from megatron_miniplm.kernels.token_loss import Tokens


class Field(IntEnum):
    """Column of a record. A field that the loss does not need may be 0.

    `square` and `overlap` are needed by the form `square`, `mean` by `uniform`, the last four but
    GOLD by `square_logits`, `cross` by all others.
    """

    OFF_MAX = 0  # NO_COLUMN where the shard has no such column, as ON_MAX
    OFF_SUM = 1
    OFF_SUM1 = 2
    OFF_ARG = 3  # global column of the maximum, the lowest of equals
    OFF_SQUARE = 4
    OFF_COLUMNS = 5
    OFF_MEAN = 6
    ON_MAX = 7
    ON_SUM = 8
    ON_SUM1 = 9
    ON_ARG = 10
    ON_SQUARE = 11
    ON_WEIGHT = 12
    ON_CROSS = 13
    ON_OVERLAP = 14
    ON_COUNT = 15
    ON_MEAN_D = 16
    ON_SQUARE_D = 17
    GOLD = 18  # raw logit of the label; 0 where another shard has it


SIZE = len(Field)


def merge(records_WNR: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """One record out of those of W disjoint shards; associative. [W, N, R] -> [N, R]."""
    if records_WNR.shape[0] == 1:
        return records_WNR[0]
    part = unpack(records_WNR)
    scale_N = tokens.student_scale_N
    merged = {}
    fall = {}  # of u, from a shard's maximum to that of all
    for side in ("OFF", "ON"):
        top, sum_, sum1, arg, square = (
            Field[f"{side}_{name}"] for name in ("MAX", "SUM", "SUM1", "ARG", "SQUARE")
        )
        raw = part[top] - part[top].amax(0)
        u = fall[side] = raw * scale_N
        merged[top] = part[top].amax(0)
        merged[sum_] = (part[sum_] * u.exp()).sum(0)
        merged[sum1] = (part[sum1] * raw.exp()).sum(0)
        merged[arg] = lowest_of_top(part[arg], raw)
        merged[square] = (part[square] * (2 * u).exp()).sum(0)
    counts, columns = part[Field.ON_COUNT], part[Field.OFF_COLUMNS]
    off_mean = _mean(columns, part[Field.OFF_MEAN] + fall["OFF"])
    means_d = torch.where(counts > 0, part[Field.ON_MEAN_D] + fall["ON"], 0)
    mean_d = _mean(counts, means_d)
    away = counts * (means_d - mean_d).square()
    merged |= {
        Field.OFF_COLUMNS: columns.sum(0),
        Field.OFF_MEAN: off_mean,
        Field.ON_WEIGHT: part[Field.ON_WEIGHT].sum(0),
        Field.ON_CROSS: (part[Field.ON_CROSS] + part[Field.ON_WEIGHT] * fall["ON"]).sum(0),
        Field.ON_OVERLAP: (part[Field.ON_OVERLAP] * fall["ON"].exp()).sum(0),
        Field.ON_COUNT: counts.sum(0),
        Field.ON_MEAN_D: mean_d,
        Field.ON_SQUARE_D: (part[Field.ON_SQUARE_D] + away).sum(0),
        Field.GOLD: part[Field.GOLD].sum(0),
    }
    return torch.stack([merged[field] for field in Field], dim=-1)


def values(
    loss: SparseLoss, record_NR: torch.Tensor, targets: SparseTargets, tokens: Tokens
) -> TokenValues:
    """The loss of every token out of the merged record; computed in fp64, given as the record's.

    Agreement: whether the student's largest logit is that of the entry of the largest weight.
    """
    row = _Row(record_NR, targets, tokens)

    def given(value_N: torch.Tensor) -> torch.Tensor:
        return torch.where(tokens.active, value_N, 0).to(record_NR.dtype)

    # A row of no entries, be it that K is 0, has none of the largest weight: -1.
    ids_NK, probs_NK = (
        F.pad(each, (0, 1), value=-1) for each in (targets.ids_NK, targets.probs_NK)
    )
    best_N = ids_NK.gather(-1, probs_NK.argmax(-1, keepdim=True))[:, 0]
    return TokenValues(
        kd=given(_divergence(loss, row)),
        ce=given(row.log_sum1 - (row.part[Field.GOLD] - row.top)),
        lse=given(row.log_sum1 + row.top),
        teacher_entropy=None,
        teacher_nll=None,
        agreement=given((row.argmax == best_N).double()),
    )


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """dL/ds of each token's columns but for the label's -ce_weight; all [N].

    off the support  raw e^r + exp e^u + square e^2u + constant             (r = s - X)
    on the support   raw e^r + exp e^u + square e^2u + weight w + overlap w e^u + error (d - mean d)
    """

    off_raw: torch.Tensor
    off_exp: torch.Tensor
    off_square: torch.Tensor
    off_constant: torch.Tensor
    on_raw: torch.Tensor
    on_exp: torch.Tensor
    on_square: torch.Tensor
    on_weight: torch.Tensor
    on_overlap: torch.Tensor
    on_error: torch.Tensor


def coefficients(
    loss: SparseLoss, record_NR: torch.Tensor, targets: SparseTargets, tokens: Tokens
) -> Coefficients:
    """The gradient in terms of the merged record; computed in fp64, given as the record's."""
    row = _Row(record_NR, targets, tokens)
    part, tail_N = row.part, row.tail
    kd_N = tokens.kd_weight_N.double() * tokens.student_scale_N
    lse_N = row.log_sum1 + row.top
    ce_N = tokens.ce_weight_N * (1 + 2 * loss.z_loss * lse_N) / row.sum1
    none_N = torch.zeros_like(kd_N)
    found = {
        "off_raw": ce_N * row.raw_off.exp(), "off_exp": none_N, "off_square": none_N,
        "off_constant": none_N, "on_raw": ce_N * row.raw_on.exp(), "on_exp": none_N,
        "on_square": none_N, "on_weight": none_N, "on_overlap": none_N, "on_error": none_N,
    }  # fmt: skip
    p_off, p_on = row.u_off.exp() / row.sum, row.u_on.exp() / row.sum  # of the largest logits
    if loss.form in ("support", "residual", "uniform"):
        mass_N = part[Field.ON_WEIGHT] + (0 if loss.form == "support" else tail_N)
        found |= {"off_exp": kd_N * mass_N * p_off, "on_exp": kd_N * mass_N * p_on}
        found["on_weight"] = -kd_N
        if loss.form == "residual":
            found["off_exp"] -= kd_N * tail_N / row.off_sum
        if loss.form == "uniform":
            found["off_constant"] = -kd_N * tail_N / row.off_columns
    elif loss.form == "on_support":
        found |= {"on_exp": kd_N * part[Field.ON_WEIGHT] / row.on_sum, "on_weight": -kd_N}
    elif loss.form == "square":
        mean_N = row.squares - row.overlap
        found |= {
            "off_exp": -2 * kd_N * mean_N * p_off, "off_square": 2 * kd_N * p_off.square(),
            "on_exp": -2 * kd_N * mean_N * p_on, "on_square": 2 * kd_N * p_on.square(),
            "on_overlap": -2 * kd_N * p_on,
        }  # fmt: skip
    else:
        found["on_error"] = 2 * kd_N / part[Field.ON_COUNT].clamp_min(1)
    return Coefficients(**{name: value.to(record_NR.dtype) for name, value in found.items()})


def unpack(record_NR: torch.Tensor) -> dict[Field, torch.Tensor]:
    """The columns of a record (or of several) by name; views."""
    return dict(zip(Field, record_NR.unbind(-1), strict=True))


class _Row:
    """What value and gradient have in common, in fp64; all [N]."""

    def __init__(self, record_NR: torch.Tensor, targets: SparseTargets, tokens: Tokens) -> None:
        self.part = part = unpack(record_NR.double())
        self.weights_NK = targets.probs_NK.double()
        there = part[Field.OFF_COLUMNS] > 0
        self.tail = torch.where(there, targets.tail_N.double(), 0)
        # Where a set is empty, its factor is 0 and must not meet an infinity.
        self.off_sum = torch.where(there, part[Field.OFF_SUM], 1)
        self.off_columns = torch.where(there, part[Field.OFF_COLUMNS], 1)
        self.on_sum = torch.where(part[Field.ON_SUM] > 0, part[Field.ON_SUM], 1)
        self.top = torch.maximum(part[Field.OFF_MAX], part[Field.ON_MAX])
        self.raw_off, self.raw_on = part[Field.OFF_MAX] - self.top, part[Field.ON_MAX] - self.top
        scale_N = tokens.student_scale_N
        self.u_off, self.u_on = self.raw_off * scale_N, self.raw_on * scale_N
        on, off = self.u_on.exp(), self.u_off.exp()
        self.sum = part[Field.OFF_SUM] * off + part[Field.ON_SUM] * on
        self.sum1 = (
            part[Field.OFF_SUM1] * self.raw_off.exp() + part[Field.ON_SUM1] * self.raw_on.exp()
        )
        self.log_sum, self.log_sum1 = self.sum.log(), self.sum1.log()
        squares = part[Field.OFF_SQUARE] * off.square() + part[Field.ON_SQUARE] * on.square()
        self.squares = squares / self.sum.square()  # sum p^2
        self.overlap = part[Field.ON_OVERLAP] * on / self.sum  # sum p w

    @property
    def argmax(self) -> torch.Tensor:
        """Global column of the student's largest logit."""
        args = torch.stack([self.part[Field.OFF_ARG], self.part[Field.ON_ARG]])
        return lowest_of_top(args, torch.stack([self.raw_off, self.raw_on]))


def _divergence(loss: SparseLoss, row: _Row) -> torch.Tensor:
    """The formulas of `kernels.sparse_loss` in terms of the record, [N]."""
    part, weight_N, tail_N = row.part, row.part[Field.ON_WEIGHT], row.tail
    if loss.form == "square":
        return row.squares - 2 * row.overlap + row.weights_NK.square().sum(-1)
    if loss.form == "square_logits":
        return part[Field.ON_SQUARE_D] / part[Field.ON_COUNT].clamp_min(1)
    known_N = 0 if loss.soft else torch.xlogy(row.weights_NK, row.weights_NK).sum(-1)
    if loss.form == "on_support":
        return known_N - part[Field.ON_CROSS] + weight_N * row.on_sum.log()
    kl_N = known_N - part[Field.ON_CROSS] - weight_N * (row.u_on - row.log_sum)
    if loss.form == "support":
        return kl_N
    if loss.form == "residual":
        said_N = 0 if loss.soft else torch.xlogy(tail_N, tail_N)
        return kl_N + said_N - tail_N * (row.off_sum.log() + row.u_off - row.log_sum)
    said_N = 0 if loss.soft else torch.xlogy(tail_N, tail_N / row.off_columns)
    return kl_N + said_N - tail_N * (part[Field.OFF_MEAN] + row.u_off - row.log_sum)


def _mean(counts_WN: torch.Tensor, means_WN: torch.Tensor) -> torch.Tensor:
    """Of all shards, [N]; 0 of nothing."""
    total_WN = torch.where(counts_WN > 0, counts_WN * means_WN, 0)
    return total_WN.sum(0) / counts_WN.sum(0).clamp_min(1)
