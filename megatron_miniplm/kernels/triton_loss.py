"""The Triton backend: the four functions of `kernels.reference`, and which kernel serves them.

Everything is asynchronous on the tensors' current stream: no host synchronisation, no state between
calls, so all of it can be captured in a CUDA graph. Kernels compile once for a loss, the types and
the widths; the number of tokens is free. Results are the same bits at every call.

Shapes: N tokens, v columns of this shard, R floats of a record.
"""

from __future__ import annotations

import torch
import triton

from megatron_miniplm.kernels.record import SIZE
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens
from megatron_miniplm.kernels.triton_grad import grad_kernel, inner_kernel
from megatron_miniplm.kernels.triton_rows import Matrix, TokenArrays
from megatron_miniplm.kernels.triton_stats import merge_kernel, stats_kernel
from megatron_miniplm.kernels.triton_two_pass import two_pass_kernel

TILE = 4096
SLICE = 8 * TILE
WARPS = 8
REGISTERS = 128


def stats(
    loss: TokenLoss, student_Nv: torch.Tensor, teacher_Nv: torch.Tensor | None, tokens: Tokens
) -> torch.Tensor:
    """The shard's record, [N, R] fp32; rows of tokens without weight are 0."""
    count = student_Nv.shape[0]
    slices = max(1, triton.cdiv(tokens.valid, SLICE))
    parts = student_Nv.new_empty((count, SIZE, slices), dtype=torch.float32)
    row = _row_arguments(loss, student_Nv, teacher_Nv, tokens)
    stats_kernel[(count * slices,)](
        *row, parts, slices, FORM=loss.form, TILE=TILE, SLICE=SLICE, num_warps=WARPS
    )
    if slices == 1:
        return parts[:, :, 0]
    record_NR = parts.new_empty((count, SIZE))
    width = triton.next_power_of_2(slices)
    merge_kernel[(count,)](*row, parts, record_NR, slices, FORM=loss.form, WIDTH=width, num_warps=1)
    return record_NR


def inner(
    loss: TokenLoss,
    student_Nv: torch.Tensor,
    teacher_Nv: torch.Tensor,
    tokens: Tokens,
    record_NR: torch.Tensor,
) -> torch.Tensor:
    """(the shard's part of the divergence, sum p_i h_i), [N, 2] fp32, of a loss that needs them."""
    count = student_Nv.shape[0]
    slices = max(1, triton.cdiv(tokens.valid, SLICE))
    parts = student_Nv.new_empty((count, 2, slices), dtype=torch.float32)
    inner_kernel[(count * slices,)](
        *_row_arguments(loss, student_Nv, teacher_Nv, tokens),
        record_NR.contiguous(), parts, slices, loss.beta,
        FORM=loss.form, TILE=TILE, SLICE=SLICE, num_warps=WARPS,
    )  # fmt: skip
    return parts.sum(-1)


def grad_(
    loss: TokenLoss,
    student_Nv: torch.Tensor,
    teacher_Nv: torch.Tensor | None,
    tokens: Tokens,
    record_NR: torch.Tensor,
    inner_N2: torch.Tensor | None,
) -> None:
    """Overwrite the student's logits by dL/ds, given the merged record (and inner sums)."""
    count, columns = student_Nv.shape
    slices = triton.cdiv(columns, SLICE)
    grad_kernel[(count * slices,)](
        *_row_arguments(loss, student_Nv, teacher_Nv, tokens),
        record_NR.contiguous(), None if inner_N2 is None else inner_N2.contiguous(),
        columns, slices, loss.beta, loss.z_loss,
        FORM=loss.form, TILE=TILE, SLICE=SLICE, num_warps=WARPS,
    )  # fmt: skip
    torch.autograd.graph.increment_version(student_Nv)


def fused_(
    loss: TokenLoss, student_Nv: torch.Tensor, teacher_Nv: torch.Tensor | None, tokens: Tokens
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All three where the shard is the whole vocabulary; the student is overwritten."""
    count, columns = student_Nv.shape
    record_NR = student_Nv.new_empty((count, SIZE), dtype=torch.float32)
    inner_N2 = record_NR.new_empty((count, 2)) if loss.needs_inner else None
    two_pass_kernel[(count,)](
        *_row_arguments(loss, student_Nv, teacher_Nv, tokens),
        record_NR, inner_N2, columns, loss.beta, loss.z_loss,
        FORM=loss.form, TILE=TILE, num_warps=WARPS,
    )  # fmt: skip
    torch.autograd.graph.increment_version(student_Nv)
    return record_NR, inner_N2


def _row_arguments(
    loss: TokenLoss, student_Nv: torch.Tensor, teacher_Nv: torch.Tensor | None, tokens: Tokens
) -> tuple[Matrix, Matrix, TokenArrays]:
    """What all kernels take first."""
    assert (teacher_Nv is None) == (loss.form is None), f"{loss.form}: teacher logits, or none"
    return (
        _matrix(student_Nv),
        Matrix(None, 0) if teacher_Nv is None else _matrix(teacher_Nv),
        TokenArrays(
            labels=tokens.labels_N,
            kd_weight=tokens.kd_weight_N,
            ce_weight=tokens.ce_weight_N,
            student_scale=tokens.student_scale_N,
            teacher_scale=tokens.teacher_scale_N,
            first=tokens.first,
            valid=tokens.valid,
        ),
    )


def _matrix(logits_Nv: torch.Tensor) -> Matrix:
    assert logits_Nv.stride(1) == 1, f"columns lie {logits_Nv.stride(1)} apart, not side by side"
    return Matrix(logits_Nv, logits_Nv.stride(0))
