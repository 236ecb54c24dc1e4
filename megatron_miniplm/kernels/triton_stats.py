"""Records of a vocabulary shard: one program for every slice of a row, then one to merge a row.

Slices are cut by columns alone, so a token's record is the same bits whatever the batch. The first
kernel reads the logits once; its scratch is `FIELDS` floats a slice.

Shapes: N tokens, G slices of a row, F fields of a record.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_miniplm.kernels.triton_record import (
    FIELDS,
    load_record,
    merged_parts,
    no_record,
    scan,
    store_record,
)
from megatron_miniplm.kernels.triton_rows import Matrix, TokenArrays, counts, open_row


@triton.jit
def stats_kernel(
    student: Matrix,  # [N, v], in
    teacher: Matrix,  # [N, v], in
    tokens: TokenArrays,  # [N] each, in
    parts: tl.tensor,  # [N, F, G] fp32, out
    slices: tl.tensor,  # int, in: G
    FORM: tl.constexpr,
    TILE: tl.constexpr,  # columns at a time
    SLICE: tl.constexpr,  # columns of a program
) -> None:
    """The record of one slice of one row. Grid: N * G."""
    program = tl.program_id(0)
    n = program // slices
    part = program % slices
    row = open_row(student, teacher, tokens, n, FORM)
    own_part = parts + n.to(tl.int64) * (FIELDS * slices) + part
    if counts(row):
        start = part * SLICE
        stop = tl.minimum(start + SLICE, row.valid)
        store_record(scan(row, start, stop, FORM, TILE), own_part, slices)
    else:
        store_record(no_record(0.0), own_part, slices)


@triton.jit
def merge_kernel(
    student: Matrix,  # [N, v], not read
    teacher: Matrix,  # [N, v], not read
    tokens: TokenArrays,  # [N] each, in
    parts: tl.tensor,  # [N, F, G] fp32, in
    record: tl.tensor,  # [N, F] fp32, out
    slices: tl.tensor,  # int, in: G
    FORM: tl.constexpr,
    WIDTH: tl.constexpr,  # power of two, at least G
) -> None:
    """The record of one row. Grid: N."""
    n = tl.program_id(0)
    row = open_row(student, teacher, tokens, n, FORM)
    part = tl.arange(0, WIDTH)
    first_part = parts + n.to(tl.int64) * (FIELDS * slices)
    found = load_record(first_part + part, slices, part < slices, FORM)
    store_record(merged_parts(found, row, FORM), record + n.to(tl.int64) * FIELDS, 1)
