"""The sparse losses as they are written in papers, on whole logits, differentiated by autograd.

What every backend is tested against, value and gradient, in fp64: short, token by token, no case
for speed. `kernels.sparse_loss` names the losses.

Shapes: N tokens, V columns (all of the vocabulary); a scaled logits of one token, on which of its
columns are in the support, weights those of the support.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_miniplm.kernels.definition import cross_entropies
from megatron_miniplm.kernels.sparse_loss import SparseLoss, SparseTargets
from megatron_miniplm.kernels.token_loss import Tokens


def sparse_losses(
    loss: SparseLoss, student_NV: torch.Tensor, targets: SparseTargets, tokens: Tokens
) -> torch.Tensor:
    """L_n of every token, [N], differentiable in the student's logits: the definition."""
    s_NV = student_NV[:, : tokens.valid]
    total_N = tokens.ce_weight_N * cross_entropies(loss.z_loss, s_NV, tokens)
    kd = []
    for n in range(s_NV.shape[0]):
        entries = targets.ids_NK[n] >= 0
        ids_K, weights_K = targets.ids_NK[n, entries].long(), targets.probs_NK[n, entries]
        tail = targets.tail_N[n].to(s_NV.dtype)
        a_V = s_NV[n] * tokens.student_scale_N[n]
        kd.append(_DEFINITIONS[loss.form](a_V, ids_K, weights_K.to(s_NV.dtype), tail, loss.soft))
    total_N = total_N + tokens.kd_weight_N * torch.stack(kd)
    return torch.where(tokens.active, total_N, 0)


def _known(weights: torch.Tensor, *, soft: bool) -> torch.Tensor:
    """Sum w log w, which a soft loss leaves out."""
    return torch.xlogy(weights, weights).sum() * (not soft)


def _off(a_V: torch.Tensor, ids_K: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of the columns off the support."""
    off_V = torch.ones_like(a_V, dtype=torch.bool)
    off_V[ids_K] = False
    return a_V.log_softmax(-1)[off_V]


def _support(
    a_V: torch.Tensor, ids_K: torch.Tensor, weights_K: torch.Tensor, tail: torch.Tensor, soft: bool
) -> torch.Tensor:
    return _known(weights_K, soft=soft) - (weights_K * a_V.log_softmax(-1)[ids_K]).sum()


def _residual(
    a_V: torch.Tensor, ids_K: torch.Tensor, weights_K: torch.Tensor, tail: torch.Tensor, soft: bool
) -> torch.Tensor:
    total, off = _support(a_V, ids_K, weights_K, tail, soft), _off(a_V, ids_K)
    if off.numel() > 0 and tail > 0:
        total = total + _known(tail, soft=soft) - tail * off.exp().sum().log()
    return total


def _uniform(
    a_V: torch.Tensor, ids_K: torch.Tensor, weights_K: torch.Tensor, tail: torch.Tensor, soft: bool
) -> torch.Tensor:
    total, off = _support(a_V, ids_K, weights_K, tail, soft), _off(a_V, ids_K)
    if off.numel() > 0:
        each = (tail / off.numel()).expand_as(off)
        total = total + _known(each, soft=soft) - (each * off).sum()
    return total


def _on_support(
    a_V: torch.Tensor, ids_K: torch.Tensor, weights_K: torch.Tensor, tail: torch.Tensor, soft: bool
) -> torch.Tensor:
    return _known(weights_K, soft=soft) - (weights_K * a_V[ids_K].log_softmax(-1)).sum()


def _square(
    a_V: torch.Tensor, ids_K: torch.Tensor, weights_K: torch.Tensor, tail: torch.Tensor, soft: bool
) -> torch.Tensor:
    return (a_V.softmax(-1) - torch.zeros_like(a_V).scatter(0, ids_K, weights_K)).square().sum()


def _square_logits(
    a_V: torch.Tensor, ids_K: torch.Tensor, weights_K: torch.Tensor, tail: torch.Tensor, soft: bool
) -> torch.Tensor:
    weighs_K = weights_K > 0
    if not weighs_K.any():
        return a_V.sum() * 0
    d = a_V[ids_K[weighs_K]] - weights_K[weighs_K].log()
    return (d - d.mean()).square().mean()


_Definition = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]
_DEFINITIONS: dict[str, _Definition] = {
    "support": _support,
    "residual": _residual,
    "uniform": _uniform,
    "on_support": _on_support,
    "square": _square,
    "square_logits": _square_logits,
}
