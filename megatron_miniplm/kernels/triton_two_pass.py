"""Logits to gradient where one shard is the whole vocabulary: one program a row, logits read twice.

The baseline of `triton_one_read`: 10 bytes of bf16 traffic a logit pair instead of 6 (14 for a loss
that needs inner sums), but no program waits for another.

Shapes: N tokens, v columns, F fields of a record.
"""

# ruff: noqa: PLR0913, PLR0917 - Triton's functions know no Python types, sequences

from __future__ import annotations

import triton
import triton.language as tl

from megatron_miniplm.kernels.triton_grad import finish_label, inner_sums, write_gradient
from megatron_miniplm.kernels.triton_losses import frame_of, needs_inner, with_mean
from megatron_miniplm.kernels.triton_record import FIELDS, no_record, scan, store_record
from megatron_miniplm.kernels.triton_rows import (
    Matrix,
    TokenArrays,
    counts,
    open_row,
    write_zeros,
)


@triton.jit
def two_pass_kernel(
    student: Matrix,  # [N, v], in and out
    teacher: Matrix,  # [N, v], in
    tokens: TokenArrays,  # [N] each, in
    record: tl.tensor,  # [N, F] fp32, out
    inner: tl.tensor,  # [N, 2] fp32, out; None where no loss needs it
    columns: tl.tensor,  # int, in: v
    beta: tl.tensor,  # fp32, in
    z_loss: tl.tensor,  # fp32, in
    FORM: tl.constexpr,
    TILE: tl.constexpr,  # columns at a time
) -> None:
    """One row. Grid: N."""
    n = tl.program_id(0).to(tl.int64)
    row = open_row(student, teacher, tokens, n, FORM)
    value = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    found = no_record(0.0)
    if counts(row):
        found = scan(row, 0, row.valid, FORM, TILE)
        frame = frame_of(found, row, found.max_s, found.max_t, z_loss, FORM)
        if needs_inner(FORM):
            value, mean = inner_sums(row, frame, 0, row.valid, beta, FORM, TILE)
            frame = with_mean(frame, mean)
        write_gradient(row, frame, 0, columns, beta, FORM, TILE)
        finish_label(row, frame, found, 0, columns, beta, FORM)
    else:
        write_zeros(row, 0, columns, TILE)
    store_record(found, record + n * FIELDS, 1)
    if needs_inner(FORM):
        tl.store(inner + n * 2, value)
        tl.store(inner + n * 2 + 1, mean)
