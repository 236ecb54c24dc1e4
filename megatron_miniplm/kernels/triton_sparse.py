"""Sparse losses on a GPU: the three functions of `kernels.sparse_reference`, logits read twice.

The kernels here see the columns off the support alone: the support's are gathered, hidden in their
place (a logit of -inf counts for nothing) while the others are summed, put back, and replaced by
their gradient once the others' is written. What is [N, K] or smaller is plain torch, the code of
the reference, and slices of a row merge as shards of the vocabulary do.

Everything is asynchronous on the tensors' current stream. Not run on a GPU yet: interpreted
(`tests/unit/test_triton_loss.py`), and waiting in `tests/gpu`.

Shapes: N tokens, K entries, v columns of this shard, G slices of a row, R floats of a record.
"""

# ruff: noqa: PLR0913, PLR0917 - Triton's functions know no Python types, sequences

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_miniplm.kernels import sparse_record, triton_loss
from megatron_miniplm.kernels.door import checked_targets
from megatron_miniplm.kernels.record import NO_COLUMN
from megatron_miniplm.kernels.sparse_loss import SparseLoss, SparseTargets
from megatron_miniplm.kernels.sparse_record import SIZE, Coefficients, Field
from megatron_miniplm.kernels.sparse_reference import (
    Support,
    off_gradient,
    on_support,
    own,
    support_gradient,
)
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens
from megatron_miniplm.kernels.triton_record import scan
from megatron_miniplm.kernels.triton_rows import (
    LOG2E,
    Matrix,
    Row,
    TokenArrays,
    counts,
    open_row,
    write_zeros,
)

# Sums of a slice, and what a column's gradient is made of.
_SUMS = (Field.OFF_MAX, Field.OFF_SUM, Field.OFF_SUM1, Field.OFF_ARG, Field.OFF_SQUARE)
_FACTORS = ("off_raw", "off_exp", "off_square", "off_constant")
_ENTRIES: tl.constexpr = tl.constexpr(128)  # at a time


def stats(
    loss: SparseLoss, student_Nv: torch.Tensor, targets: SparseTargets, tokens: Tokens
) -> torch.Tensor:
    """The shard's record, [N, R] fp32; rows of tokens without weight are 0."""
    return _stats(loss, student_Nv, targets, tokens, whole=False)


def grad_(
    loss: SparseLoss,
    student_Nv: torch.Tensor,
    targets: SparseTargets,
    tokens: Tokens,
    record_NR: torch.Tensor,
) -> None:
    """Overwrite the student's logits by dL/ds, given the merged record."""
    targets, row = _checked(student_Nv, targets, tokens, whole=False)
    support, gold_N = _gathered(student_Nv, targets, tokens, row)
    part = sparse_record.unpack(record_NR)
    factors = sparse_record.coefficients(loss, record_NR, targets, tokens)
    columns = student_Nv.shape[1]
    slices = triton.cdiv(columns, triton_loss.SLICE)
    triton_loss.launch(
        _grad_kernel, student_Nv.shape[0] * slices,
        *row, _stacked(factors), part[Field.OFF_MAX].contiguous(), columns, slices,
        TILE=triton_loss.TILE, SLICE=triton_loss.SLICE,
    )  # fmt: skip
    # The label as one more entry, where it is not one.
    labels_N1 = tokens.labels_N[:, None]
    is_label_NK = targets.ids_NK == labels_N1
    ce_N1 = tokens.ce_weight_N[:, None]
    on_NK = support_gradient(support, factors, part, tokens) - torch.where(is_label_NK, ce_N1, 0)
    label_N1 = off_gradient(gold_N[:, None], factors, part, tokens) - ce_N1
    extra_N1 = torch.where(is_label_NK.any(-1, keepdim=True), -1, labels_N1)
    ids = torch.cat([targets.ids_NK, extra_N1.int()], -1)
    _put(ids, torch.cat([on_NK, label_N1], -1), row)
    torch.autograd.graph.increment_version(student_Nv)


def fused_(
    loss: SparseLoss, student_Nv: torch.Tensor, targets: SparseTargets, tokens: Tokens
) -> torch.Tensor:
    """Both where the shard is the whole vocabulary: (record); the student is overwritten."""
    record_NR = _stats(loss, student_Nv, targets, tokens, whole=True)
    grad_(loss, student_Nv, targets, tokens, record_NR)
    return record_NR


def _stats(
    loss: SparseLoss,
    student_Nv: torch.Tensor,
    targets: SparseTargets,
    tokens: Tokens,
    *,
    whole: bool,
) -> torch.Tensor:
    targets, row = _checked(student_Nv, targets, tokens, whole=whole)
    support, gold_N = _gathered(student_Nv, targets, tokens, row)
    _put(targets.ids_NK, torch.full_like(support.logits_NK, -torch.inf), row)
    count, size = student_Nv.shape[0], triton_loss.SLICE
    slices = max(1, triton.cdiv(tokens.valid, size))
    # Sums of a slice, and the sum of its columns less their maximum.
    parts = support.logits_NK.new_zeros((slices, count, len(_SUMS) + 1))
    triton_loss.launch(
        _sums_kernel, count * slices, *row, parts, count, slices,
        FORM=loss.form, TILE=triton_loss.TILE, SLICE=size,
    )  # fmt: skip
    _put(targets.ids_NK, support.logits_NK, row)
    slice_G11 = torch.arange(slices, device=student_Nv.device)[:, None, None]
    hidden_GNK = support.owned_NK & (support.column_NK // size == slice_G11)
    columns_GN = (tokens.valid - slice_G11[..., 0] * size).clamp(0, size) - hidden_GNK.sum(-1)
    records = parts.new_zeros((slices, count, SIZE))
    for at, field in enumerate(_SUMS):
        records[..., field] = parts[..., at]
    records[..., Field.OFF_COLUMNS] = columns_GN
    mean_GN = parts[..., -1] / columns_GN.clamp_min(1)
    records[..., Field.OFF_MEAN] = mean_GN * tokens.student_scale_N
    record_NR = sparse_record.merge(records, tokens)
    for field, value_N in ({Field.GOLD: gold_N} | on_support(support, tokens)).items():
        record_NR[:, field] = value_N
    return torch.where(tokens.active[:, None], record_NR, 0)


def _checked(
    student_Nv: torch.Tensor, targets: SparseTargets, tokens: Tokens, *, whole: bool
) -> tuple[SparseTargets, tuple[Matrix, Matrix, TokenArrays]]:
    """The targets, and what all kernels take first."""
    row = triton_loss.row_arguments(TokenLoss(), student_Nv, None, tokens, whole=whole)
    return checked_targets(targets, student_Nv, tokens, whole=whole), row


def _gathered(
    student_Nv: torch.Tensor,
    targets: SparseTargets,
    tokens: Tokens,
    row: tuple[Matrix, Matrix, TokenArrays],
) -> tuple[Support, torch.Tensor]:
    """(the entries, logits of the labels or 0), of tokens that count."""
    ids = torch.cat([targets.ids_NK, tokens.labels_N[:, None].int()], -1)
    found = student_Nv.new_full(ids.shape, NO_COLUMN, dtype=torch.float32)
    triton_loss.launch(_gather_kernel, ids.shape[0], *row, ids, found, ids.shape[1])
    owned_NK, column_NK = own(ids.long(), tokens)
    owned_NK &= (ids >= 0) & tokens.active[:, None]
    support = Support(
        owned_NK=owned_NK[:, :-1],
        column_NK=column_NK[:, :-1],
        logits_NK=found[:, :-1],
        weights_NK=torch.where(owned_NK[:, :-1], targets.probs_NK, 0),
    )
    return support, torch.where(owned_NK[:, -1], found[:, -1], 0)


def _put(
    ids_NK: torch.Tensor, values_NK: torch.Tensor, row: tuple[Matrix, Matrix, TokenArrays]
) -> None:
    """Write over the logits of these columns, rounded once."""
    count, entries = ids_NK.shape
    triton_loss.launch(_put_kernel, count, *row, ids_NK, values_NK.contiguous(), entries)


def _stacked(factors: Coefficients) -> torch.Tensor:
    return torch.stack([getattr(factors, name) for name in _FACTORS], -1)


@triton.jit
def _owned(row: Row, ids: tl.tensor, entry: tl.tensor, entries: tl.tensor) -> tuple:
    """(column of each entry, whether it is one of this shard)."""
    found = tl.load(ids + entry, mask=entry < entries, other=-1)
    column = found.to(tl.int64) - row.first
    return column, (found >= 0) & (column >= 0) & (column < row.valid)


@triton.jit
def _gather_kernel(
    student: Matrix,  # [N, v], in
    teacher: Matrix,  # none
    tokens: TokenArrays,  # [N] each, in
    ids: tl.tensor,  # [N, K] int32, in
    logits: tl.tensor,  # [N, K] fp32, out: where this shard has the column
    entries: tl.tensor,  # int, in: K
) -> None:
    """The logits of the entries of one row. Grid: N."""
    n = tl.program_id(0).to(tl.int64)
    row = open_row(student, teacher, tokens, n, None)
    if counts(row):
        for start in range(0, entries, _ENTRIES):
            entry = start + tl.arange(0, _ENTRIES)
            column, owned = _owned(row, ids + n * entries, entry, entries)
            x = tl.load(row.student + column, mask=owned, other=0.0).to(tl.float32)
            tl.store(logits + n * entries + entry, x, mask=owned)


@triton.jit
def _put_kernel(
    student: Matrix,  # [N, v], out
    teacher: Matrix,  # none
    tokens: TokenArrays,  # [N] each, in
    ids: tl.tensor,  # [N, K] int32, in
    values: tl.tensor,  # [N, K] fp32, in
    entries: tl.tensor,  # int, in: K
) -> None:
    """Values over the logits of the entries of one row. Grid: N."""
    n = tl.program_id(0).to(tl.int64)
    row = open_row(student, teacher, tokens, n, None)
    if counts(row):
        for start in range(0, entries, _ENTRIES):
            entry = start + tl.arange(0, _ENTRIES)
            column, owned = _owned(row, ids + n * entries, entry, entries)
            value = tl.load(values + n * entries + entry, mask=owned, other=0.0)
            tl.store(row.student + column, value.to(row.student.dtype.element_ty), mask=owned)


@triton.jit
def _open_scaled(student: Matrix, teacher: Matrix, tokens: TokenArrays, n: tl.tensor) -> Row:
    """A row without a teacher, that has a temperature all the same."""
    row = open_row(student, teacher, tokens, n, None)
    return Row(
        student=row.student, teacher=row.teacher, label=row.label, kd_weight=row.kd_weight,
        ce_weight=row.ce_weight, student_scale=tl.load(tokens.student_scale + n),
        teacher_scale=row.teacher_scale, first=row.first, valid=row.valid,
    )  # fmt: skip


@triton.jit
def _sums_kernel(
    student: Matrix,  # [N, v], in: the support is hidden
    teacher: Matrix,  # none
    tokens: TokenArrays,  # [N] each, in
    parts: tl.tensor,  # [G, N, 6] fp32, out
    count: tl.tensor,  # int, in: N
    slices: tl.tensor,  # int, in: G
    FORM: tl.constexpr,
    TILE: tl.constexpr,  # columns at a time
    SLICE: tl.constexpr,  # columns of a program
) -> None:
    """Maximum, sums, place of the maximum, sum of squares and of columns. Grid: N * G."""
    program = tl.program_id(0)
    n = (program // slices).to(tl.int64)
    part = program % slices
    row = _open_scaled(student, teacher, tokens, n)
    if counts(row):
        start = part * SLICE
        stop = tl.minimum(start + SLICE, row.valid)
        found = scan(row, start, stop, None, TILE)
        square = tl.full((), 0.0, tl.float64)
        total = tl.full((), 0.0, tl.float64)
        if (FORM == "square") | (FORM == "uniform"):
            for tile in tl.range(start, stop, TILE):
                columns = tile + tl.arange(0, TILE)
                x = tl.load(row.student + columns, mask=columns < stop, other=-float("inf"))
                x = x.to(tl.float32)
                e = tl.exp2((x - found.max_s) * (row.student_scale * LOG2E))
                square += tl.sum(e * e, 0)
                total += tl.sum(tl.where(x > -float("inf"), x - found.max_s, 0.0), 0)
        own_part = parts + (part.to(tl.int64) * count + n) * 6
        tl.store(own_part, found.max_s)
        tl.store(own_part + 1, found.sum_s)
        tl.store(own_part + 2, found.sum_s1)
        tl.store(own_part + 3, found.arg_s)
        tl.store(own_part + 4, square.to(tl.float32))
        tl.store(own_part + 5, total.to(tl.float32))


@triton.jit
def _grad_kernel(
    student: Matrix,  # [N, v], in and out
    teacher: Matrix,  # none
    tokens: TokenArrays,  # [N] each, in
    factors: tl.tensor,  # [N, 4] fp32, in: of e^(x - max), e^u, e^2u and 1
    maximum: tl.tensor,  # [N] fp32, in
    columns: tl.tensor,  # int, in: v
    slices: tl.tensor,  # int, in: G
    TILE: tl.constexpr,  # columns at a time
    SLICE: tl.constexpr,  # columns of a program
) -> None:
    """The gradient of one slice of one row as if it were off the support. Grid: N * G."""
    program = tl.program_id(0)
    n = (program // slices).to(tl.int64)
    start = (program % slices) * SLICE
    stop = tl.minimum(start + SLICE, columns)
    row = _open_scaled(student, teacher, tokens, n)
    if counts(row):
        raw = tl.load(factors + n * 4)
        linear = tl.load(factors + n * 4 + 1)
        square = tl.load(factors + n * 4 + 2)
        constant = tl.load(factors + n * 4 + 3)
        top = tl.load(maximum + n)
        for tile in tl.range(start, stop, TILE):
            column = tile + tl.arange(0, TILE)
            x = tl.load(row.student + column, mask=column < row.valid, other=-float("inf"))
            # The support's are above the maximum, and are replaced. NaN stays.
            away = tl.minimum(x.to(tl.float32) - top, 0.0, propagate_nan=tl.PropagateNan.ALL)
            e = tl.exp2(away * (row.student_scale * LOG2E))
            g = tl.fma(tl.fma(e, square, linear), e, constant)
            g += raw * tl.exp2(away * LOG2E)
            g = tl.where(column < row.valid, g, 0.0).to(row.student.dtype.element_ty)
            tl.store(row.student + column, g, mask=column < stop)
    else:
        write_zeros(row, start, stop, TILE)
