"""The selective scan of Mamba (arXiv:2312.00752, Algorithm 2): a linear recurrence over the tokens.

Of each channel d and state n, with h before the first token 0:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t            y_t = sum_n C_t h_t + D u_t
    dt_t = softplus(step_t + bias)

In plain torch, so that it runs and is differentiated anywhere; where `mamba_ssm` and a GPU are
there, its fused kernel is used. States are fp32 at least. They exist for `SEGMENT` tokens at a
time, and again in the backward pass: memory does not grow with the sequence times the states.

Shapes: s tokens, b sequences, d channels of this rank, n states.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SEGMENT = 128
"""Tokens whose states [SEGMENT, b, d, n] are held at a time."""


def selective_scan(
    u_sbd: torch.Tensor,
    step_sbd: torch.Tensor,
    bias_d: torch.Tensor,
    A_dn: torch.Tensor,
    B_sbn: torch.Tensor,
    C_sbn: torch.Tensor,
    D_d: torch.Tensor,
) -> torch.Tensor:
    """Output [s, b, d], in the type of `u`; `A` is below 0, fp32 or fp64 as `bias` and `D`."""
    if u_sbd.is_cuda and u_sbd.dtype != torch.float64 and has_package("mamba_ssm"):
        return _fused_kernel(u_sbd, step_sbd, bias_d, A_dn, B_sbn, C_sbn, D_d)
    exact = torch.promote_types(u_sbd.dtype, torch.float32)
    u, step, B, C = (each.to(exact) for each in (u_sbd, step_sbd, B_sbn, C_sbn))
    dt = F.softplus(step + bias_d)
    state_bdn = u.new_zeros((*u.shape[1:], A_dn.shape[1]))
    parts = []
    for start in range(0, len(u), SEGMENT):
        part = slice(start, start + SEGMENT)
        # No random numbers are drawn, so none have to be drawn again.
        y, state_bdn = checkpoint(
            _segment, u[part], dt[part], A_dn, B[part], C[part], state_bdn,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        parts.append(y)
    return (torch.cat(parts) + D_d * u).to(u_sbd.dtype)


def linear_scan(
    factor_s: torch.Tensor, term_s: torch.Tensor, initial: torch.Tensor
) -> torch.Tensor:
    """h_t = factor_t h_{t-1} + term_t along the first axis, h_{-1} = `initial`; differentiable."""
    scanned: torch.Tensor = _LinearScan.apply(factor_s, term_s, initial)
    return scanned


def _segment(
    u_sbd: torch.Tensor,
    dt_sbd: torch.Tensor,
    A_dn: torch.Tensor,
    B_sbn: torch.Tensor,
    C_sbn: torch.Tensor,
    state_bdn: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y without D u, state after the last token)."""
    factor_sbdn = (dt_sbd[..., None] * A_dn).exp_()
    term_sbdn = (dt_sbd * u_sbd)[..., None] * B_sbn[:, :, None, :]
    h_sbdn = linear_scan(factor_sbdn, term_sbdn, state_bdn)
    return torch.einsum("sbdn,sbn->sbd", h_sbdn, C_sbn), h_sbdn[-1]


class _LinearScan(torch.autograd.Function):
    """The recurrence; its adjoint is one too, from the last token to the first."""

    @staticmethod
    def forward(
        ctx: Any, factor_s: torch.Tensor, term_s: torch.Tensor, initial: torch.Tensor
    ) -> torch.Tensor:
        """All states, in place of a copy of the terms."""
        h_s = _scan(factor_s, term_s, initial)
        ctx.save_for_backward(factor_s, h_s, initial)
        return h_s

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """g_t = upstream_t + factor_{t+1} g_{t+1} is the gradient of term_t."""
        factor_s, h_s, initial = ctx.saved_tensors
        (grad_h_s,) = upstream
        following_s = torch.cat([factor_s[1:], torch.zeros_like(factor_s[:1])]).flip(0)
        grad_term_s = _scan(following_s, grad_h_s.flip(0), torch.zeros_like(initial)).flip(0)
        before_s = torch.cat([initial[None], h_s[:-1]])
        return grad_term_s * before_s, grad_term_s, factor_s[0] * grad_term_s[0]


def _scan(factor_s: torch.Tensor, term_s: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """Token by token where a step costs what its arithmetic costs; else in few, wide steps."""
    if term_s.is_cuda:
        return scan_in_blocks(factor_s, term_s, initial)
    h_s, carried = term_s.clone(), initial
    for h, factor in zip(h_s, factor_s, strict=True):
        carried = h.addcmul_(factor, carried)
    return h_s


def scan_in_blocks(
    factor_s: torch.Tensor, term_s: torch.Tensor, initial: torch.Tensor
) -> torch.Tensor:
    """The recurrence in about 2 sqrt(s) vectorised steps: within blocks, then from block to block.

    Of a block, all first tokens are done at once, then all second ones, ...; beside them runs the
    product of the factors since the block's beginning, which carries in what was before the block.
    """
    count = len(factor_s)
    length = max(1, math.isqrt(count))
    whole = count - count % length
    shape = (whole // length, length, *factor_s.shape[1:])
    factor, h_s = factor_s[:whole].view(shape), term_s.clone()
    h = h_s[:whole].view(shape)
    product = factor.clone()
    for at in range(1, length):
        h[:, at].addcmul_(factor[:, at], h[:, at - 1])
        product[:, at].mul_(product[:, at - 1])
    carried = initial
    for block in range(shape[0]):
        h[block].addcmul_(product[block], carried)
        carried = h[block, -1]
    for at in range(whole, count):
        carried = h_s[at].addcmul_(factor_s[at], carried)
    return h_s


@functools.cache
def has_package(name: str) -> bool:
    """Whether an optional package of kernels is installed."""
    return importlib.util.find_spec(name) is not None


def _fused_kernel(
    u_sbd: torch.Tensor,
    step_sbd: torch.Tensor,
    bias_d: torch.Tensor,
    A_dn: torch.Tensor,
    B_sbn: torch.Tensor,
    C_sbn: torch.Tensor,
    D_d: torch.Tensor,
) -> torch.Tensor:
    """The same by mamba_ssm's kernel, which has the tokens last."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    last = [each.permute(1, 2, 0).contiguous() for each in (u_sbd, step_sbd, B_sbn, C_sbn)]
    u_bds, step_bds, B_bns, C_bns = (each.to(u_sbd.dtype) for each in last)
    y_bds: torch.Tensor = selective_scan_fn(
        u_bds, step_bds, A_dn, B_bns, C_bns, D_d, delta_bias=bias_d, delta_softplus=True
    )
    return y_bds.permute(2, 0, 1)
