"""The sparse losses by records and analytic gradients, in plain torch: what every backend offers.

`stats` makes a record (`kernels.sparse_record`) of a shard of the vocabulary; once records are
merged, `grad_` writes the shard's gradient over the student's logits. `fused_` does both where the
shard is the whole vocabulary. Tested against `kernels.sparse_definition` in fp64; C++ and Triton
backends pass the same tests.

The columns off the support have a gradient that is one function of their logit. It is written over
all columns; those of the support and of the label are then replaced, computed from logits that were
gathered before: nothing is rounded twice.

Shapes: N tokens, K entries, v columns of this shard, R floats of a record. Logits of any float
type; computed in fp32, or in fp64 where the student's logits are fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_miniplm.kernels.record import NO_COLUMN
from megatron_miniplm.kernels.sparse_loss import SparseLoss, SparseTargets
from megatron_miniplm.kernels.sparse_record import SIZE, Coefficients, Field, coefficients, unpack
from megatron_miniplm.kernels.token_loss import Tokens


def stats(
    loss: SparseLoss, student_Nv: torch.Tensor, targets: SparseTargets, tokens: Tokens
) -> torch.Tensor:
    """The shard's record, [N, R]; rows of tokens without weight are 0."""
    s_Nv = _real(student_Nv, tokens)
    record_NR = s_Nv.new_zeros((s_Nv.shape[0], SIZE))
    record_NR[:, Field.OFF_MAX] = record_NR[:, Field.ON_MAX] = NO_COLUMN
    if tokens.valid > 0:
        support = Support.of(s_Nv, targets, tokens)
        owned_N, column_N = own(tokens.labels_N, tokens)
        fields = {Field.GOLD: torch.where(owned_N, s_Nv.gather(-1, column_N[:, None])[:, 0], 0)}
        fields |= _off_support(s_Nv, support, tokens) | on_support(support, tokens)
        for field, value_N in fields.items():
            record_NR[:, field] = value_N
    return torch.where(tokens.active[:, None], record_NR, 0)


def grad_(
    loss: SparseLoss,
    student_Nv: torch.Tensor,
    targets: SparseTargets,
    tokens: Tokens,
    record_NR: torch.Tensor,
) -> None:
    """Overwrite the student's logits by dL/ds, given the merged record."""
    s_Nv = _real(student_Nv, tokens)
    if tokens.valid > 0:
        part = unpack(record_NR)
        factors = coefficients(loss, record_NR, targets, tokens)
        support = Support.of(s_Nv, targets, tokens)
        on_NK = support_gradient(support, factors, part, tokens)
        grad_Nv = off_gradient(s_Nv, factors, part, tokens)
        # The spare column takes what other shards own.
        grad_Nv = torch.cat([grad_Nv, grad_Nv[:, :1]], -1)
        grad_Nv.scatter_(-1, torch.where(support.owned_NK, support.column_NK, tokens.valid), on_NK)
        owned_N, column_N = own(tokens.labels_N, tokens)
        gold_N = torch.where(owned_N, tokens.ce_weight_N, 0).to(grad_Nv.dtype)
        grad_Nv.scatter_add_(-1, column_N[:, None], -gold_N[:, None])
        student_Nv[:, : tokens.valid] = torch.where(tokens.active[:, None], grad_Nv[:, :-1], 0).to(
            student_Nv.dtype
        )
    student_Nv[:, tokens.valid :] = 0


def fused_(
    loss: SparseLoss, student_Nv: torch.Tensor, targets: SparseTargets, tokens: Tokens
) -> torch.Tensor:
    """Both where the shard is the whole vocabulary: (record); the student is overwritten."""
    record_NR = stats(loss, student_Nv, targets, tokens)
    grad_(loss, student_Nv, targets, tokens, record_NR)
    return record_NR


@dataclass(frozen=True, kw_only=True)
class Support:
    """The entries of which this shard has the column, and their logits; all [N, K]."""

    owned_NK: torch.Tensor
    column_NK: torch.Tensor
    """int64, 0 where another shard has it."""
    logits_NK: torch.Tensor
    """In the type of the arithmetic; where another shard has it, NO_COLUMN."""
    weights_NK: torch.Tensor
    """0 where another shard has it."""

    @classmethod
    def of(cls, s_Nv: torch.Tensor, targets: SparseTargets, tokens: Tokens) -> Support:
        """Gathered from the real columns."""
        owned_NK, column_NK = own(targets.ids_NK.long(), tokens)
        owned_NK &= targets.ids_NK >= 0
        return cls(
            owned_NK=owned_NK,
            column_NK=column_NK,
            logits_NK=torch.where(owned_NK, s_Nv.gather(-1, column_NK), NO_COLUMN),
            weights_NK=torch.where(owned_NK, targets.probs_NK, 0).to(s_Nv.dtype),
        )


def on_support(support: Support, tokens: Tokens) -> dict[Field, torch.Tensor]:
    """The fields of a record that its entries make."""
    x_NK, w_NK = support.logits_NK, support.weights_NK
    if x_NK.shape[1] == 0:
        return {}
    max_N = x_NK.amax(-1)
    raw_NK = x_NK - max_N[:, None]
    u_NK = raw_NK * tokens.student_scale_N[:, None]
    e_NK = torch.where(support.owned_NK, u_NK.exp(), 0)
    weighs_NK = w_NK > 0
    count_N = weighs_NK.sum(-1)
    d_NK = torch.where(weighs_NK, u_NK - w_NK.log(), 0)
    mean_N = d_NK.sum(-1) / count_N.clamp_min(1)
    away_NK = torch.where(weighs_NK, d_NK - mean_N[:, None], 0)
    top_NK = support.owned_NK & (raw_NK == 0)
    columns_NK = torch.where(top_NK, support.column_NK + tokens.first, torch.inf)
    return {
        Field.ON_MAX: max_N,
        Field.ON_SUM: e_NK.sum(-1),
        Field.ON_SUM1: torch.where(support.owned_NK, raw_NK.exp(), 0).sum(-1),
        Field.ON_ARG: torch.where(top_NK.any(-1), columns_NK.amin(-1), 0),
        Field.ON_SQUARE: e_NK.square().sum(-1),
        Field.ON_WEIGHT: w_NK.sum(-1),
        Field.ON_CROSS: torch.where(weighs_NK, w_NK * u_NK, 0).sum(-1),
        Field.ON_OVERLAP: (w_NK * e_NK).sum(-1),
        Field.ON_COUNT: count_N.to(x_NK.dtype),
        Field.ON_MEAN_D: mean_N,
        Field.ON_SQUARE_D: away_NK.square().sum(-1),
    }


def support_gradient(
    support: Support, factors: Coefficients, part: dict[Field, torch.Tensor], tokens: Tokens
) -> torch.Tensor:
    """dL/ds of the entries but for a label's -ce_weight, [N, K]; any number where not owned."""
    w_NK = support.weights_NK
    raw_NK = support.logits_NK - part[Field.ON_MAX][:, None]
    u_NK = raw_NK * tokens.student_scale_N[:, None]
    e_NK = u_NK.exp()
    each_NK = factors.on_exp[:, None] + factors.on_square[:, None] * e_NK
    each_NK = each_NK + factors.on_overlap[:, None] * w_NK
    d_NK = u_NK - w_NK.log() - part[Field.ON_MEAN_D][:, None]
    # What nearly cancels is added first: c p - w.
    of_kd_NK = each_NK * e_NK + factors.on_weight[:, None] * w_NK
    of_kd_NK = of_kd_NK + factors.on_error[:, None] * torch.where(w_NK > 0, d_NK, 0)
    return of_kd_NK + factors.on_raw[:, None] * raw_NK.exp()


def off_gradient(
    s_Nv: torch.Tensor, factors: Coefficients, part: dict[Field, torch.Tensor], tokens: Tokens
) -> torch.Tensor:
    """dL/ds as if no column were on the support, but for the label's -ce_weight; [N, v]."""
    raw_Nv = (s_Nv - part[Field.OFF_MAX][:, None]).clamp_max(0)
    e_Nv = (raw_Nv * tokens.student_scale_N[:, None]).exp()
    each_Nv = factors.off_exp[:, None] + factors.off_square[:, None] * e_Nv
    of_kd_Nv = each_Nv * e_Nv + factors.off_constant[:, None]
    return of_kd_Nv + factors.off_raw[:, None] * raw_Nv.exp()


def _off_support(s_Nv: torch.Tensor, support: Support, tokens: Tokens) -> dict[Field, torch.Tensor]:
    """The fields of a record that the columns off the support make."""
    off_Nv = torch.ones((s_Nv.shape[0], tokens.valid + 1), dtype=torch.bool, device=s_Nv.device)
    off_Nv.scatter_(-1, torch.where(support.owned_NK, support.column_NK, tokens.valid), False)
    off_Nv = off_Nv[:, :-1]
    max_N, arg_N = torch.where(off_Nv, s_Nv, NO_COLUMN).max(-1)
    raw_Nv = s_Nv - max_N[:, None]
    u_Nv = raw_Nv * tokens.student_scale_N[:, None]
    e_Nv = torch.where(off_Nv, u_Nv.exp(), 0)
    columns_N = off_Nv.sum(-1)
    return {
        Field.OFF_MAX: max_N,
        Field.OFF_SUM: e_Nv.sum(-1),
        Field.OFF_SUM1: torch.where(off_Nv, raw_Nv.exp(), 0).sum(-1),
        Field.OFF_ARG: (arg_N + tokens.first).to(s_Nv.dtype),
        Field.OFF_SQUARE: e_Nv.square().sum(-1),
        Field.OFF_COLUMNS: columns_N.to(s_Nv.dtype),
        Field.OFF_MEAN: torch.where(off_Nv, u_Nv, 0).sum(-1) / columns_N.clamp_min(1),
    }


def _real(logits_Nv: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """The real columns in the type of the arithmetic; -inf becomes a finite probability of 0."""
    dtype = torch.float64 if logits_Nv.dtype == torch.float64 else torch.float32
    return logits_Nv[:, : tokens.valid].to(dtype).clamp_min(NO_COLUMN)


def own(ids: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether this shard has the column of each id, the column or 0)."""
    local = ids - tokens.first
    owned = (local >= 0) & (local < tokens.valid)
    return owned, torch.where(owned, local, 0)
