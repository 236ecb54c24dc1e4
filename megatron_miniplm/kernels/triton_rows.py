"""What a Triton program knows of its row of logits, and how it reads and clears that row.

The arguments that all kernels share are two named tuples, `Matrix` and `TokenArrays`; `open_row`
makes of them the pointers and numbers of one token. All arithmetic is fp32; a row starts at a
64-bit offset, because N * V passes 2^31 at 16,384 tokens of Qwen's vocabulary.

Shapes: N tokens, v columns of this shard, of which `valid` are real.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

from megatron_miniplm.kernels.record import NO_COLUMN

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2))
FLOOR: tl.constexpr = tl.constexpr(NO_COLUMN)
# Tiles on their way or in work: two programs on a multiprocessor then always wait for 32 KB, and
# 4.3 TB/s at 600 ns need 20 KB of each of an H200's 132.
STAGES: tl.constexpr = tl.constexpr(2)


class Matrix(NamedTuple):
    """Logits of the shard; both None where there is no teacher."""

    data: tl.tensor
    """[N, v] fp32, bf16 or fp16; columns are contiguous. In; the student's also out."""
    stride: tl.tensor
    """int, in: elements from one row to the next."""


class TokenArrays(NamedTuple):
    """`kernels.token_loss.Tokens` as kernels take it; all in."""

    labels: tl.tensor
    """[N] int64, global ids."""
    kd_weight: tl.tensor
    """[N] fp32."""
    ce_weight: tl.tensor
    """[N] fp32."""
    student_scale: tl.tensor
    """[N] fp32, 1 / temperature."""
    teacher_scale: tl.tensor
    """[N] fp32."""
    first: tl.tensor
    """int: global id of the shard's column 0."""
    valid: tl.tensor
    """int: how many of the shard's columns are real."""


class Row(NamedTuple):
    """One token."""

    student: tl.tensor
    """Pointer to its first logit."""
    teacher: tl.tensor
    label: tl.tensor
    """int64 column of the label in this shard; any number where another shard has it."""
    kd_weight: tl.tensor
    ce_weight: tl.tensor
    student_scale: tl.tensor
    teacher_scale: tl.tensor
    first: tl.tensor
    valid: tl.tensor


@triton.jit
def open_row(
    student: Matrix, teacher: Matrix, tokens: TokenArrays, n: tl.tensor, FORM: tl.constexpr
) -> Row:
    """The row of token `n`. Cross entropy alone knows no temperature: its scales are 1."""
    n = n.to(tl.int64)
    student_scale = 1.0
    teacher_scale = 1.0
    teacher_row = student.data
    if FORM is not None:
        student_scale = tl.load(tokens.student_scale + n)
        teacher_scale = tl.load(tokens.teacher_scale + n)
        teacher_row = teacher.data + n * teacher.stride
    return Row(
        student=student.data + n * student.stride,
        teacher=teacher_row,
        label=tl.load(tokens.labels + n) - tokens.first,
        kd_weight=tl.load(tokens.kd_weight + n),
        ce_weight=tl.load(tokens.ce_weight + n),
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        first=tokens.first,
        valid=tokens.valid,
    )


@triton.jit
def counts(row: Row) -> tl.tensor:
    """Whether the token has a weight; one without is neither read nor waited for."""
    return (row.kd_weight != 0.0) | (row.ce_weight != 0.0)


@triton.jit
def owns_label(row: Row, start: tl.tensor, stop: tl.tensor) -> tl.tensor:
    """Whether the label is one of the columns start .. stop."""
    return (row.label >= start) & (row.label < stop)


@triton.jit
def load_logits(row: Row, columns: tl.tensor, stop: tl.tensor, FORM: tl.constexpr) -> tuple:
    """(student, teacher) in fp32; columns from `stop` on are not read and have probability 0."""
    real = columns < stop
    x = tl.load(row.student + columns, mask=real, other=-float("inf")).to(tl.float32)
    y = x
    if FORM is not None:
        y = tl.load(row.teacher + columns, mask=real, other=-float("inf")).to(tl.float32)
    return x, y


@triton.jit
def write_zeros(row: Row, start: tl.tensor, stop: tl.tensor, TILE: tl.constexpr) -> None:
    """Gradient of columns that are padding, or of a token that does not count."""
    for tile in range(start, stop, TILE):
        columns = tile + tl.arange(0, TILE)
        zeros = tl.zeros([TILE], row.student.dtype.element_ty)
        tl.store(row.student + columns, zeros, mask=columns < stop)
