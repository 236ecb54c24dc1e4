"""The losses of `kernels.reference` on the device: inner sums and gradients of a block of logits.

With p = e_s k_s and q = e_t k_t (`Frame` has the factors), r = log p - log q, w = kd_weight *
student_scale:

    forward_kl, soft_nll                 g = w (p - q)
    reverse_kl, jsd, skew, tvd, brier    g = w f p (h - sum p h)          (`_bracket`: f, h)
    mse                                  g = w 2 / V (d - c), d = u - v   (`_squares_gradient`)
    cross entropy                        g = ce_weight (1 + 2 z_loss lse) softmax(s)

The label's -ce_weight is not here: `finish_label` of `triton_grad` writes that one column.
FORM is `TokenLoss.form`, None for cross entropy alone. Formulas: `kernels.reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from megatron_miniplm.kernels.triton_record import (
    Record,
    difference,
    sums_forward,
    sums_squares,
)
from megatron_miniplm.kernels.triton_rows import LN2, LOG2E, Row

_INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


class Frame(NamedTuple):
    """What a merged record says of all columns of its row; scalars."""

    at_s: tl.tensor
    """What the student's exponentials are relative to: its maximum, of the row or of a part."""
    at_t: tl.tensor
    k_s: tl.tensor
    """Factor from its exponentials to probabilities."""
    k_t: tl.tensor
    k_ce: tl.tensor
    """Factor from exponentials at scale 1 to the gradient of cross entropy and z-loss."""
    log_ratio: tl.tensor
    """log sum_s - log sum_t: r = u - v - log_ratio."""
    mean: tl.tensor
    """sum p h over the vocabulary; of an mse, see `_squares_gradient`."""
    columns: tl.tensor
    """V."""


class Bracket(NamedTuple):
    """Of a loss that is not linear in p and q, column by column."""

    value: tl.tensor
    """The column's part of the divergence."""
    factor: tl.tensor
    h: tl.tensor


@triton.constexpr_function
def needs_inner(form: str | None) -> bool:
    """`TokenLoss.needs_inner`."""
    return form in ("jsd", "skew_kl", "skew_rkl", "tvd", "brier")


@triton.jit
def frame_of(
    record: Record,
    row: Row,
    at_s: tl.tensor,
    at_t: tl.tensor,
    z_loss: tl.tensor,
    FORM: tl.constexpr,
) -> Frame:
    """The frame for exponentials relative to `at_s`, `at_t`; not yet the mean of inner sums."""
    lse = tl.log(record.sum_s1) + record.max_s
    to_max = tl.exp2((at_s - record.max_s) * LOG2E)
    k_ce = row.ce_weight * tl.fma(2 * z_loss, lse, 1.0) * (to_max / record.sum_s1)
    k_s = tl.exp2((at_s - record.max_s) * (row.student_scale * LOG2E)) / record.sum_s
    k_t = k_s
    log_ratio = lse
    mean = lse
    if FORM is not None:
        k_t = tl.exp2((at_t - record.max_t) * (row.teacher_scale * LOG2E)) / record.sum_t
        log_ratio = tl.log(record.sum_s) - tl.log(record.sum_t)
        mean = record.reverse / record.sum_s - log_ratio
    if FORM == "mse_logits":
        mean = record.max_t * row.teacher_scale - record.max_s * row.student_scale
    if FORM == "mse_centered":
        mean = record.mean_d
    if FORM == "mse_log_probs":
        mean = record.mean_d - log_ratio
    return Frame(
        at_s=at_s,
        at_t=at_t,
        k_s=k_s,
        k_t=k_t,
        k_ce=k_ce,
        log_ratio=log_ratio,
        mean=mean,
        columns=record.columns,
    )


@triton.jit
def with_mean(frame: Frame, mean: tl.tensor) -> Frame:
    """The frame, now that sum p h is known."""
    return Frame(
        at_s=frame.at_s,
        at_t=frame.at_t,
        k_s=frame.k_s,
        k_t=frame.k_t,
        k_ce=frame.k_ce,
        log_ratio=frame.log_ratio,
        mean=mean,
        columns=frame.columns,
    )


@triton.jit
def gradient(
    x: tl.tensor,
    y: tl.tensor,
    e_s: tl.tensor,
    e_t: tl.tensor,
    frame: Frame,
    row: Row,
    beta: tl.tensor,
    FORM: tl.constexpr,
) -> tl.tensor:
    """dL/ds of some columns but for the label's; a block, or a number for one column."""
    g = divergence_gradient(x, y, e_s, e_t, frame, row, beta, FORM)
    if FORM is not None:
        g = plus_cross_entropy(g, x, e_s, frame, row)
    return g


@triton.jit
def inner_terms(
    x: tl.tensor,
    y: tl.tensor,
    e_s: tl.tensor,
    e_t: tl.tensor,
    frame: Frame,
    row: Row,
    beta: tl.tensor,
    FORM: tl.constexpr,
) -> tuple:
    """(part of the divergence, p h) of some columns."""
    p = e_s * frame.k_s
    bracket = _bracket(p, e_t * frame.k_t, _log_ratio(x, y, frame, row), beta, FORM)
    return bracket.value, p * bracket.h


@triton.jit
def divergence_gradient(
    x: tl.tensor,
    y: tl.tensor,
    e_s: tl.tensor,
    e_t: tl.tensor,
    frame: Frame,
    row: Row,
    beta: tl.tensor,
    FORM: tl.constexpr,
) -> tl.tensor:
    """Without cross entropy, unless the loss is that; linear forms look at e_s and e_t alone."""
    w = row.kd_weight * row.student_scale
    if FORM is None:
        g = e_s * frame.k_ce
    elif sums_forward(FORM):
        g = tl.fma(e_s, w * frame.k_s, -(e_t * (w * frame.k_t)))
    elif sums_squares(FORM):
        g = (w * 2.0 / frame.columns) * _squares_gradient(x, y, e_s, frame, row, FORM)
    else:
        p = e_s * frame.k_s
        bracket = _bracket(p, e_t * frame.k_t, _log_ratio(x, y, frame, row), beta, FORM)
        g = (w * bracket.factor) * p * (bracket.h - frame.mean)
    return g


@triton.jit
def plus_cross_entropy(
    g: tl.tensor, x: tl.tensor, e_s: tl.tensor, frame: Frame, row: Row
) -> tl.tensor:
    """The branches are the same for all of a row; at temperature 1 the exponential is there."""
    if frame.k_ce != 0.0:
        if row.student_scale == 1.0:
            g = tl.fma(e_s, frame.k_ce, g)
        else:
            g = tl.fma(tl.exp2((x - frame.at_s) * LOG2E), frame.k_ce, g)
    return g


@triton.jit
def _log_ratio(x: tl.tensor, y: tl.tensor, frame: Frame, row: Row) -> tl.tensor:
    return difference(x, y, frame.at_s, frame.at_t, row) - frame.log_ratio


@triton.jit
def _squares_gradient(
    x: tl.tensor, y: tl.tensor, e_s: tl.tensor, frame: Frame, row: Row, FORM: tl.constexpr
) -> tl.tensor:
    """Of logits a - b, of centred logits less its mean, of log-probs r - p sum r.

    `frame.mean` is what d = u - v has to lose for the first two, the mean of r for the third.
    """
    if FORM == "mse_log_probs":
        g = _log_ratio(x, y, frame, row) - e_s * (frame.k_s * frame.columns * frame.mean)
    else:
        g = difference(x, y, frame.at_s, frame.at_t, row) - frame.mean
    return g


@triton.jit
def _bracket(
    p: tl.tensor, q: tl.tensor, r: tl.tensor, beta: tl.tensor, FORM: tl.constexpr
) -> Bracket:
    """`_BRACKETS` and `_PARTS` of `kernels.reference`; what is not used is not compiled."""
    if FORM == "reverse_kl":
        return Bracket(value=p * r, factor=1.0, h=r)
    elif FORM == "jsd":
        log_m = _log_mixture(-r, beta)
        value = beta * q * (-r - log_m) - (1 - beta) * p * log_m
        return Bracket(value=value, factor=1 - beta, h=-log_m)
    elif FORM == "skew_kl":
        log_q_over_m = -r - _log_mixture(-r, beta)
        h = -tl.exp2(log_q_over_m * LOG2E)
        return Bracket(value=q * log_q_over_m, factor=1 - beta, h=h)
    elif FORM == "skew_rkl":
        log_p_over_m = -_log_mixture(-r, 1 - beta)
        h = log_p_over_m - beta * tl.exp2(log_p_over_m * LOG2E)
        return Bracket(value=p * log_p_over_m, factor=1.0, h=h)
    elif FORM == "tvd":
        # Not the sign of r: fused multiplication leaves a rounding error where p is q.
        h = tl.where(p > q, 1.0, tl.where(p < q, -1.0, 0.0))
        return Bracket(value=0.5 * tl.abs(p - q), factor=0.5, h=h)
    else:
        tl.static_assert(FORM == "brier")
        return Bracket(value=(p - q) * (p - q), factor=2.0, h=p - q)


@triton.jit
def _log_mixture(delta: tl.tensor, beta: tl.tensor) -> tl.tensor:
    """log(m / p) of m = beta q + (1 - beta) p, delta = log q - log p; the larger of p, q is 1."""
    smaller = tl.exp2(-tl.abs(delta) * LOG2E)
    share = tl.where(delta > 0, 1 - beta, beta)
    return tl.maximum(delta, 0.0) + _log(tl.fma(share, smaller - 1.0, 1.0))


@triton.jit
def _log(x: tl.tensor) -> tl.tensor:
    """Within 1.7e-7 for x in [0.5, 2]: one instruction, where `tl.log` is twenty for any x."""
    if _INTERPRETED:
        return tl.log(x)
    return LN2 * tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
