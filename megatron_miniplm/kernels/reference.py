"""The token losses by records and analytic gradients, in plain torch: what every backend offers.

`stats` makes a record (`kernels.record`) of a shard of the vocabulary; once records are merged,
`grad_` writes the shard's gradient over the student's logits. Losses that are not linear in
normalised probabilities have a pass between, `inner`, with two floats to merge. `fused_` does all
where the shard is the whole vocabulary. Tested against `kernels.definition` in fp64; C++ and Triton
backends pass the same tests.

With p = softmax(a), q = softmax(b), delta = log q - log p, w = kd_weight * student_scale:

    forward_kl, soft_nll             g_i = w (p_i - q_i)
    reverse_kl, jsd, skew, tvd, brier    g_i = w f p_i (h_i - sum_j p_j h_j)     (`_BRACKETS`: f, h)
    mse                              g_i = w 2 / V (d_i - c)                  (`_square_grad`: d, c)
    cross entropy                    g_i = ce_weight ((1 + 2 z_loss lse) softmax(s)_i - 1[i = y])

Shapes: N tokens, V the whole vocabulary, v columns of this shard, R floats of a record. Logits of
any float type; computed in fp32, or in fp64 where the student's logits are fp64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_miniplm.kernels.record import (
    NO_COLUMN,
    SIZE,
    Field,
    square_center,
    unpack,
)
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens

_OF_STUDENT = (Field.MAX_S, Field.SUM_S, Field.SUM_S1, Field.GOLD_S, Field.ARG_S)
_OF_TEACHER = (Field.MAX_T, Field.SUM_T, Field.SUM_T1, Field.GOLD_T, Field.ARG_T)


def stats(
    loss: TokenLoss, student_Nv: torch.Tensor, teacher_Nv: torch.Tensor | None, tokens: Tokens
) -> torch.Tensor:
    """The shard's record, [N, R]; rows of tokens without weight are 0."""
    s_Nv = _real(student_Nv, tokens)
    record_NR = s_Nv.new_zeros((s_Nv.shape[0], SIZE))
    for logits_Nv, maximum in ((student_Nv, Field.MAX_S), (teacher_Nv, Field.MAX_T)):
        if logits_Nv is not None and tokens.valid == 0:
            record_NR[:, maximum] = NO_COLUMN
    if tokens.valid > 0:
        u_Nv, of_student = _one_softmax(s_Nv, tokens, tokens.student_scale_N)
        fields = dict(zip(_OF_STUDENT, of_student, strict=True))
        if teacher_Nv is not None:
            t_Nv = _real(teacher_Nv, tokens, like=s_Nv)
            v_Nv, of_teacher = _one_softmax(t_Nv, tokens, tokens.teacher_scale_N)
            fields |= dict(zip(_OF_TEACHER, of_teacher, strict=True))
            fields |= _crossed(u_Nv, v_Nv)
        for field, value_N in fields.items():
            record_NR[:, field] = value_N
    return torch.where(tokens.active[:, None], record_NR, 0)


def inner(
    loss: TokenLoss,
    student_Nv: torch.Tensor,
    teacher_Nv: torch.Tensor,
    tokens: Tokens,
    record_NR: torch.Tensor,
) -> torch.Tensor:
    """(the shard's part of the divergence, sum p_i h_i), [N, 2], of a loss that needs them."""
    s_Nv = _real(student_Nv, tokens)
    t_Nv = _real(teacher_Nv, tokens, like=s_Nv)
    log_p_Nv, log_q_Nv = _log_probs(s_Nv, t_Nv, tokens, record_NR)
    assert loss.form is not None, "cross entropy has no inner sums"
    _, h_Nv = _BRACKETS[loss.form](log_p_Nv, log_q_Nv, loss.beta)
    value_N = _PARTS[loss.form](log_p_Nv, log_q_Nv, loss.beta).sum(-1)
    inner_N2 = torch.stack([value_N, (log_p_Nv.exp() * h_Nv).sum(-1)], dim=-1)
    return torch.where(tokens.active[:, None], inner_N2, 0)


def grad_(
    loss: TokenLoss,
    student_Nv: torch.Tensor,
    teacher_Nv: torch.Tensor | None,
    tokens: Tokens,
    record_NR: torch.Tensor,
    inner_N2: torch.Tensor | None,
) -> None:
    """Overwrite the student's logits by dL/ds, given the merged record (and inner sums)."""
    s_Nv = _real(student_Nv, tokens)
    grad_Nv = _cross_entropy_grad(loss, s_Nv, tokens, record_NR)
    if loss.form is not None:
        assert teacher_Nv is not None, f"{loss.form} needs a teacher"
        t_Nv = _real(teacher_Nv, tokens, like=s_Nv)
        weight_N = tokens.kd_weight_N.to(s_Nv.dtype) * tokens.student_scale_N
        grad_Nv += weight_N[:, None] * _divergence_grad(
            loss, s_Nv, t_Nv, tokens, record_NR, inner_N2
        )
    student_Nv[:, : tokens.valid] = torch.where(tokens.active[:, None], grad_Nv, 0).to(
        student_Nv.dtype
    )
    student_Nv[:, tokens.valid :] = 0


def fused_(
    loss: TokenLoss, student_Nv: torch.Tensor, teacher_Nv: torch.Tensor | None, tokens: Tokens
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All three where the shard is the whole vocabulary; the student is overwritten."""
    record_NR = stats(loss, student_Nv, teacher_Nv, tokens)
    inner_N2 = None
    if loss.needs_inner:
        assert teacher_Nv is not None, f"{loss.form} needs a teacher"
        inner_N2 = inner(loss, student_Nv, teacher_Nv, tokens, record_NR)
    grad_(loss, student_Nv, teacher_Nv, tokens, record_NR, inner_N2)
    return record_NR, inner_N2


# --- records ------------------------------------------------------------------------------------


def _real(
    logits_Nv: torch.Tensor, tokens: Tokens, like: torch.Tensor | None = None
) -> torch.Tensor:
    """The real columns in the type of the arithmetic; -inf becomes a finite probability of 0."""
    dtype = torch.float64 if logits_Nv.dtype == torch.float64 else torch.float32
    real_Nv = logits_Nv[:, : tokens.valid].to(dtype if like is None else like.dtype)
    return real_Nv.clamp_min(NO_COLUMN)


def _one_softmax(
    x_Nv: torch.Tensor, tokens: Tokens, scale_N: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Scaled logits less their maximum; (max, sum of exp, the same at scale 1, gold, argmax)."""
    max_N, arg_N = x_Nv.max(-1)
    raw_Nv = x_Nv - max_N[:, None]
    u_Nv = raw_Nv * scale_N[:, None]
    owned_N, column_N = _own_column(tokens.labels_N, tokens.first, tokens.valid)
    gold_N = torch.where(owned_N, x_Nv.gather(-1, column_N[:, None])[:, 0], 0)
    arg_N = (arg_N + tokens.first).to(x_Nv.dtype)
    return u_Nv, (max_N, u_Nv.exp().sum(-1), raw_Nv.exp().sum(-1), gold_N, arg_N)


def _crossed(u_Nv: torch.Tensor, v_Nv: torch.Tensor) -> dict[Field, torch.Tensor]:
    """What student and teacher say together."""
    d_Nv = u_Nv - v_Nv
    mean_N = d_Nv.mean(-1)
    return {
        Field.FORWARD: -(v_Nv.exp() * d_Nv).sum(-1),
        Field.REVERSE: (u_Nv.exp() * d_Nv).sum(-1),
        Field.ENTROPY: (v_Nv.exp() * v_Nv).sum(-1),
        Field.COLUMNS: torch.full_like(mean_N, d_Nv.shape[-1]),
        Field.MEAN_D: mean_N,
        Field.SQUARE_D: (d_Nv - mean_N[:, None]).square().sum(-1),
    }


def _relative(
    s_Nv: torch.Tensor, t_Nv: torch.Tensor, tokens: Tokens, record_NR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(u, v): scaled logits less their maxima over the whole vocabulary."""
    part = unpack(record_NR)
    u_Nv = (s_Nv - part[Field.MAX_S][:, None]) * tokens.student_scale_N[:, None]
    return u_Nv, (t_Nv - part[Field.MAX_T][:, None]) * tokens.teacher_scale_N[:, None]


def _log_probs(
    s_Nv: torch.Tensor, t_Nv: torch.Tensor, tokens: Tokens, record_NR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p, log q) of the shard's columns."""
    part = unpack(record_NR)
    u_Nv, v_Nv = _relative(s_Nv, t_Nv, tokens, record_NR)
    return u_Nv - part[Field.SUM_S].log()[:, None], v_Nv - part[Field.SUM_T].log()[:, None]


# --- gradients ----------------------------------------------------------------------------------


def _cross_entropy_grad(
    loss: TokenLoss, s_Nv: torch.Tensor, tokens: Tokens, record_NR: torch.Tensor
) -> torch.Tensor:
    part = unpack(record_NR)
    log_sum_N = part[Field.SUM_S1].log()
    factor_N = 1 + 2 * loss.z_loss * (log_sum_N + part[Field.MAX_S])
    grad_Nv = (s_Nv - part[Field.MAX_S][:, None] - log_sum_N[:, None]).exp()
    grad_Nv *= factor_N[:, None]
    if tokens.valid > 0:
        owned_N, column_N = _own_column(tokens.labels_N, tokens.first, tokens.valid)
        grad_Nv.scatter_add_(-1, column_N[:, None], -owned_N[:, None].to(grad_Nv.dtype))
    return grad_Nv.mul_(tokens.ce_weight_N[:, None])


def _divergence_grad(
    loss: TokenLoss,
    s_Nv: torch.Tensor,
    t_Nv: torch.Tensor,
    tokens: Tokens,
    record_NR: torch.Tensor,
    inner_N2: torch.Tensor | None,
) -> torch.Tensor:
    """dD/da of the shard's columns."""
    assert loss.form is not None, "no divergence, no gradient"
    log_p_Nv, log_q_Nv = _log_probs(s_Nv, t_Nv, tokens, record_NR)
    p_Nv = log_p_Nv.exp()
    if loss.form in ("forward_kl", "soft_nll"):
        return p_Nv - log_q_Nv.exp()
    if loss.form in _BRACKETS:
        factor, h_Nv = _BRACKETS[loss.form](log_p_Nv, log_q_Nv, loss.beta)
        mean_N = _reverse_value(record_NR) if inner_N2 is None else inner_N2[:, 1]
        return factor * p_Nv * (h_Nv - mean_N[:, None])
    return _square_grad(loss, s_Nv, t_Nv, tokens, record_NR, p_Nv)


def _square_grad(
    loss: TokenLoss,
    s_Nv: torch.Tensor,
    t_Nv: torch.Tensor,
    tokens: Tokens,
    record_NR: torch.Tensor,
    p_Nv: torch.Tensor,
) -> torch.Tensor:
    """2 / V (d - c), and for log-probs less p times the sum of d - c over the vocabulary."""
    part = unpack(record_NR)
    u_Nv, v_Nv = _relative(s_Nv, t_Nv, tokens, record_NR)
    center_N, columns_N = square_center(loss, record_NR, tokens), part[Field.COLUMNS]
    error_Nv = u_Nv - v_Nv - center_N[:, None]
    if loss.form == "mse_log_probs":
        error_Nv -= p_Nv * (columns_N * (part[Field.MEAN_D] - center_N))[:, None]
    return error_Nv * (2 / columns_N)[:, None]


def _reverse_value(record_NR: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum p (log p - log q), which is reverse KL's sum p h, too; [N]."""
    part = unpack(record_NR)
    log_ratio = part[Field.SUM_S].log() - part[Field.SUM_T].log()
    return part[Field.REVERSE] / part[Field.SUM_S] - log_ratio


def _log_mixture(delta_Nv: torch.Tensor, beta: float) -> torch.Tensor:
    """log(m / p) of m = beta q + (1 - beta) p, delta = log q - log p; exact near delta = 0.

    max(delta, 0) + log1p(c expm1(-|delta|)) with c the weight of the smaller of p and q.
    """
    smaller = torch.where(delta_Nv > 0, delta_Nv.new_tensor(1 - beta), beta)
    return delta_Nv.clamp_min(0) + (smaller * (-delta_Nv.abs()).expm1()).log1p()


def _jsd_bracket(
    log_p: torch.Tensor, log_q: torch.Tensor, beta: float
) -> tuple[float, torch.Tensor]:
    return 1 - beta, -_log_mixture(log_q - log_p, beta)


def _reverse_bracket(
    log_p: torch.Tensor, log_q: torch.Tensor, beta: float
) -> tuple[float, torch.Tensor]:
    return 1.0, log_p - log_q


def _skew_kl_bracket(
    log_p: torch.Tensor, log_q: torch.Tensor, beta: float
) -> tuple[float, torch.Tensor]:
    # -q / m; the 1 that is added cancels, and leaves the digits where p is near q.
    return 1 - beta, -(-_log_mixture(log_p - log_q, 1 - beta)).expm1()


def _skew_rkl_bracket(
    log_p: torch.Tensor, log_q: torch.Tensor, beta: float
) -> tuple[float, torch.Tensor]:
    log_ratio = -_log_mixture(log_q - log_p, 1 - beta)
    return 1.0, log_ratio - beta * log_ratio.expm1()  # log(p / m) - beta p / m, as above


def _tvd_bracket(
    log_p: torch.Tensor, log_q: torch.Tensor, beta: float
) -> tuple[float, torch.Tensor]:
    return 0.5, (log_p - log_q).sign()


def _brier_bracket(
    log_p: torch.Tensor, log_q: torch.Tensor, beta: float
) -> tuple[float, torch.Tensor]:
    return 2.0, log_p.exp() - log_q.exp()


_BRACKETS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], tuple[float, torch.Tensor]]] = {
    "reverse_kl": _reverse_bracket,
    "jsd": _jsd_bracket,
    "skew_kl": _skew_kl_bracket,
    "skew_rkl": _skew_rkl_bracket,
    "tvd": _tvd_bracket,
    "brier": _brier_bracket,
}


def _jsd_part(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    from_q = log_q.exp() * _log_mixture(log_p - log_q, 1 - beta)
    from_p = log_p.exp() * _log_mixture(log_q - log_p, beta)
    return -(beta * from_q + (1 - beta) * from_p)


def _skew_kl_part(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    return -log_q.exp() * _log_mixture(log_p - log_q, 1 - beta)


def _skew_rkl_part(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    return -log_p.exp() * _log_mixture(log_q - log_p, 1 - beta)


def _tvd_part(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    return 0.5 * (log_p.exp() - log_q.exp()).abs()


def _brier_part(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    return (log_p.exp() - log_q.exp()).square()


_PARTS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "jsd": _jsd_part,
    "skew_kl": _skew_kl_part,
    "skew_rkl": _skew_rkl_part,
    "tvd": _tvd_part,
    "brier": _brier_part,
}


def _own_column(
    labels_N: torch.Tensor, first: int, valid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    local = labels_N - first
    owned = (local >= 0) & (local < valid)
    return owned, torch.where(owned, local, 0)
