"""The token losses as they are written in papers, on whole logits, differentiated by autograd.

What everything else in this room is tested against, value and gradient, in fp64: short, no
maximum handled by hand, no case for speed. `kernels.token_loss` names the losses and their sources.

Shapes: N tokens, V columns (all of the vocabulary); a, b scaled logits of student and teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from megatron_miniplm.kernels.record import NO_COLUMN
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens


def token_losses(
    loss: TokenLoss, student_NV: torch.Tensor, teacher_NV: torch.Tensor | None, tokens: Tokens
) -> torch.Tensor:
    """L_n of every token, [N], differentiable in the student's logits: the definition."""
    s_NV = student_NV[:, : tokens.valid]
    total_N = tokens.ce_weight_N * cross_entropies(loss.z_loss, s_NV, tokens)
    if loss.form is not None:
        assert teacher_NV is not None, f"{loss.form} needs a teacher"
        t_NV = teacher_NV[:, : tokens.valid].clamp_min(NO_COLUMN)
        a_NV = s_NV * tokens.student_scale_N[:, None]
        b_NV = t_NV * tokens.teacher_scale_N[:, None]
        total_N = total_N + tokens.kd_weight_N * _DEFINITIONS[loss.form](a_NV, b_NV, loss.beta)
    return torch.where(tokens.active, total_N, 0)


def cross_entropies(z_loss: float, s_NV: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Cross entropy of the labels and z-loss, without weights, [N]; of real columns only."""
    lse_N = s_NV.logsumexp(-1)
    gold_N = s_NV.gather(-1, tokens.labels_N[:, None].clamp(0, tokens.valid - 1))[:, 0]
    return lse_N - gold_N + z_loss * lse_N.square()


def _mixture(a_NV: torch.Tensor, b_NV: torch.Tensor, beta: float) -> tuple[torch.Tensor, ...]:
    """(log p, log q, log(beta q + (1 - beta) p))."""
    log_p, log_q = a_NV.log_softmax(-1), b_NV.log_softmax(-1)
    return log_p, log_q, torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))


def _kl(log_x_NV: torch.Tensor, log_y_NV: torch.Tensor) -> torch.Tensor:
    return (log_x_NV.exp() * (log_x_NV - log_y_NV)).sum(-1)


def _forward_kl(a_NV: torch.Tensor, b_NV: torch.Tensor, beta: float) -> torch.Tensor:
    return _kl(b_NV.log_softmax(-1), a_NV.log_softmax(-1))


def _soft_nll(a_NV: torch.Tensor, b_NV: torch.Tensor, beta: float) -> torch.Tensor:
    return -(b_NV.softmax(-1) * a_NV.log_softmax(-1)).sum(-1)


def _reverse_kl(a_NV: torch.Tensor, b_NV: torch.Tensor, beta: float) -> torch.Tensor:
    return _kl(a_NV.log_softmax(-1), b_NV.log_softmax(-1))


def _jsd(a_NV: torch.Tensor, b_NV: torch.Tensor, beta: float) -> torch.Tensor:
    log_p, log_q, log_m = _mixture(a_NV, b_NV, beta)
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def _skew_kl(a_NV: torch.Tensor, b_NV: torch.Tensor, beta: float) -> torch.Tensor:
    _, log_q, log_m = _mixture(a_NV, b_NV, beta)
    return _kl(log_q, log_m)


def _skew_rkl(a_NV: torch.Tensor, b_NV: torch.Tensor, beta: float) -> torch.Tensor:
    log_p, _, log_m = _mixture(a_NV, b_NV, 1 - beta)
    return _kl(log_p, log_m)


def _tvd(a_NV: torch.Tensor, b_NV: torch.Tensor, beta: float) -> torch.Tensor:
    return 0.5 * (a_NV.softmax(-1) - b_NV.softmax(-1)).abs().sum(-1)


def _mse_logits(a_NV: torch.Tensor, b_NV: torch.Tensor, beta: float) -> torch.Tensor:
    return (a_NV - b_NV).square().mean(-1)


def _mse_centered(a_NV: torch.Tensor, b_NV: torch.Tensor, beta: float) -> torch.Tensor:
    return _mse_logits(a_NV - a_NV.mean(-1, keepdim=True), b_NV - b_NV.mean(-1, keepdim=True), beta)


def _mse_log_probs(a_NV: torch.Tensor, b_NV: torch.Tensor, beta: float) -> torch.Tensor:
    return _mse_logits(a_NV.log_softmax(-1), b_NV.log_softmax(-1), beta)


def _brier(a_NV: torch.Tensor, b_NV: torch.Tensor, beta: float) -> torch.Tensor:
    return (a_NV.softmax(-1) - b_NV.softmax(-1)).square().sum(-1)


_DEFINITIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "forward_kl": _forward_kl,
    "soft_nll": _soft_nll,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_rkl": _skew_rkl,
    "tvd": _tvd,
    "mse_logits": _mse_logits,
    "mse_centered": _mse_centered,
    "mse_log_probs": _mse_log_probs,
    "brier": _brier,
}
