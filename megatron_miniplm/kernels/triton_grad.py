"""Inner sums and gradients of a vocabulary shard, given the merged record: one read each.

One program for every slice of a row, as in `triton_stats`. The gradient is written over the
student's logits; padding columns and tokens that do not count become 0.

Shapes: N tokens, v columns, G slices of a row, F fields of a record.
"""

# ruff: noqa: PLR0913, PLR0917 - Triton's functions know no Python types, sequences

from __future__ import annotations

import triton
import triton.language as tl

from megatron_miniplm.kernels.triton_losses import (
    Frame,
    frame_of,
    gradient,
    inner_terms,
    needs_inner,
    with_mean,
)
from megatron_miniplm.kernels.triton_record import FIELDS, Record, exponentials, load_record
from megatron_miniplm.kernels.triton_rows import (
    STAGES,
    Matrix,
    Row,
    TokenArrays,
    counts,
    load_logits,
    open_row,
    owns_label,
    write_zeros,
)


@triton.jit
def inner_sums(
    row: Row,
    frame: Frame,
    start: tl.tensor,
    stop: tl.tensor,
    beta: tl.tensor,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple:
    """(part of the divergence, sum p h) over the columns start .. stop; fp64 across tiles."""
    value = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    for tile in tl.range(start, stop, TILE, num_stages=STAGES):
        columns = tile + tl.arange(0, TILE)
        x, y = load_logits(row, columns, stop, FORM)
        e_s, e_t = exponentials(x, y, frame.at_s, frame.at_t, row, FORM)
        tile_value, tile_mean = inner_terms(x, y, e_s, e_t, frame, row, beta, FORM)
        value += tl.sum(tl.where(columns < stop, tile_value, 0.0), 0)
        mean += tl.sum(tl.where(columns < stop, tile_mean, 0.0), 0)
    return value.to(tl.float32), mean.to(tl.float32)


@triton.jit
def write_gradient(
    row: Row,
    frame: Frame,
    start: tl.tensor,
    stop: tl.tensor,
    beta: tl.tensor,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """dL/ds over the logits of the columns start .. stop, padding among them."""
    for tile in tl.range(start, stop, TILE, num_stages=STAGES):
        columns = tile + tl.arange(0, TILE)
        x, y = load_logits(row, columns, row.valid, FORM)
        e_s, e_t = exponentials(x, y, frame.at_s, frame.at_t, row, FORM)
        g = gradient(x, y, e_s, e_t, frame, row, beta, FORM)
        store_gradient(row, columns, stop, g)


@triton.jit
def store_gradient(row: Row, columns: tl.tensor, stop: tl.tensor, g: tl.tensor) -> None:
    """A tile of the gradient; 0 in padding columns."""
    g = tl.where(columns < row.valid, g, 0.0).to(row.student.dtype.element_ty)
    tl.store(row.student + columns, g, mask=columns < stop)


@triton.jit
def finish_label(
    row: Row,
    frame: Frame,
    record: Record,
    start: tl.tensor,
    stop: tl.tensor,
    beta: tl.tensor,
    FORM: tl.constexpr,
) -> None:
    """The label's column again, with its -ce_weight, if it is one of start .. stop.

    From its logits in the record, in fp32: a comparison in every column would cost two
    instructions of some thirty, and adding to what is stored would round twice.
    """
    tl.debug_barrier()  # the column's first value came from another thread
    if owns_label(row, start, tl.minimum(stop, row.valid)):
        x = record.gold_s
        y = record.gold_t
        e_s, e_t = exponentials(x, y, frame.at_s, frame.at_t, row, FORM)
        g = gradient(x, y, e_s, e_t, frame, row, beta, FORM) - row.ce_weight
        tl.store(row.student + row.label, g.to(row.student.dtype.element_ty))


@triton.jit
def inner_kernel(
    student: Matrix,  # [N, v], in
    teacher: Matrix,  # [N, v], in
    tokens: TokenArrays,  # [N] each, in
    record: tl.tensor,  # [N, F] fp32, in: merged over all shards
    parts: tl.tensor,  # [N, 2, G] fp32, out
    slices: tl.tensor,  # int, in: G
    beta: tl.tensor,  # fp32, in
    FORM: tl.constexpr,
    TILE: tl.constexpr,  # columns at a time
    SLICE: tl.constexpr,  # columns of a program
) -> None:
    """Inner sums of one slice of one row. Grid: N * G."""
    program = tl.program_id(0)
    n = (program // slices).to(tl.int64)
    part = program % slices
    row = open_row(student, teacher, tokens, n, FORM)
    value = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    if counts(row):
        merged = load_record(record + n * FIELDS, 1, True, FORM)
        frame = frame_of(merged, row, merged.max_s, merged.max_t, 0.0, FORM)
        start = part * SLICE
        stop = tl.minimum(start + SLICE, row.valid)
        value, mean = inner_sums(row, frame, start, stop, beta, FORM, TILE)
    own_part = parts + n * (2 * slices) + part
    tl.store(own_part, value)
    tl.store(own_part + slices, mean)


@triton.jit
def grad_kernel(
    student: Matrix,  # [N, v], in and out
    teacher: Matrix,  # [N, v], in
    tokens: TokenArrays,  # [N] each, in
    record: tl.tensor,  # [N, F] fp32, in: merged over all shards
    inner: tl.tensor,  # [N, 2] fp32, in: merged over all shards; None where no loss needs it
    columns: tl.tensor,  # int, in: v
    slices: tl.tensor,  # int, in: G
    beta: tl.tensor,  # fp32, in
    z_loss: tl.tensor,  # fp32, in
    FORM: tl.constexpr,
    TILE: tl.constexpr,  # columns at a time
    SLICE: tl.constexpr,  # columns of a program
) -> None:
    """The gradient of one slice of one row. Grid: N * G."""
    program = tl.program_id(0)
    n = (program // slices).to(tl.int64)
    start = (program % slices) * SLICE
    stop = tl.minimum(start + SLICE, columns)
    row = open_row(student, teacher, tokens, n, FORM)
    if counts(row):
        merged = load_record(record + n * FIELDS, 1, True, FORM)
        frame = frame_of(merged, row, merged.max_s, merged.max_t, z_loss, FORM)
        if needs_inner(FORM):
            frame = with_mean(frame, tl.load(inner + n * 2 + 1))
        write_gradient(row, frame, start, stop, beta, FORM, TILE)
        finish_label(row, frame, merged, start, stop, beta, FORM)
    else:
        write_zeros(row, start, stop, TILE)
