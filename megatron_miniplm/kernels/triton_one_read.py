"""Logits to gradient with one read: a row's programs keep their slices and exchange records.

    1. G programs share a row. Each loads its slice and reduces it to a record in scratch.
    2. They meet: each counts itself in and waits until all G of its row are there.
    3. Each merges the G records, and writes the gradient from the exponentials it has kept.

A loss with inner sums meets once more. 6 bytes of bf16 traffic a logit pair, where
`triton_two_pass` has 10; what is read again comes from the second-level cache.

Nobody waits in vain: rows are dealt out by a ticket that is drawn when a program starts. So if a
program of a row has not started, all programs that run belong to this row or an older, complete
one; they are fewer than G, and where G programs fit the device at once (`fits`), the missing one
is next to start. Ticket and counters are zeroed by the launch that uses them: no call leaves state
behind, two streams share none, and a captured graph zeroes its own.

The interpreter runs one program after another and would wait for ever: there, STEP runs the parts
between the meetings as launches of their own.

Shapes: N tokens, v columns, G slices of a row, F fields of a record.
"""

# ruff: noqa: PLR0913, PLR0917, PLR1714 - Triton's functions take every array, and know no `in`

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from megatron_miniplm.kernels.record import Field
from megatron_miniplm.kernels.triton_grad import finish_label, store_gradient
from megatron_miniplm.kernels.triton_losses import (
    Frame,
    divergence_gradient,
    frame_of,
    gradient,
    inner_terms,
    needs_inner,
    plus_cross_entropy,
    with_mean,
)
from megatron_miniplm.kernels.triton_record import (
    FIELDS,
    Record,
    exponentials,
    first_column,
    load_record,
    merged_parts,
    no_record,
    store_record,
    tile_record,
)
from megatron_miniplm.kernels.triton_rows import (
    Matrix,
    Row,
    TokenArrays,
    counts,
    load_logits,
    open_row,
    write_zeros,
)

WHOLE: tl.constexpr = tl.constexpr(0)
RECORD: tl.constexpr = tl.constexpr(1)
INNER: tl.constexpr = tl.constexpr(2)
GRADIENT: tl.constexpr = tl.constexpr(3)

_ARG_S: tl.constexpr = tl.constexpr(Field.ARG_S.value)
_ARG_T: tl.constexpr = tl.constexpr(Field.ARG_T.value)


class Slice(NamedTuple):
    """A program's part of a row, and where the row's programs meet."""

    part: tl.tensor
    """Which of the row's slices."""
    start: tl.tensor
    stop: tl.tensor
    records: tl.tensor
    """Pointer to the row's [F, G] in `parts`."""
    inner: tl.tensor
    """Pointer to the row's [2, G] in `inner_parts`."""
    arrived: tl.tensor
    """Pointer to the row's counter."""
    slices: tl.tensor
    """G."""
    others: tl.tensor
    """How many programs meet: those with a real column, this one among them."""


@triton.constexpr_function
def includes(step: int, what: int) -> bool:
    """Whether a launch does what belongs to step `what`."""
    return step in (WHOLE.value, what)


@triton.constexpr_function
def keeps_exponentials(form: str | None) -> bool:
    """Whether the gradient is made of exponentials alone, and the logits need not stay."""
    return form is None or form in ("forward_kl", "soft_nll")


@triton.jit
def meet(arrived: tl.tensor, count: tl.tensor) -> None:
    """Wait for the row's other programs; what they stored before is then visible here.

    Barriers around, because one thread counts for all: the program's stores come before its
    release, and its loads after its acquire.
    """
    tl.debug_barrier()
    seen = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") + 1
    while seen < count:
        seen = tl.atomic_add(arrived, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def one_read_kernel(
    student: Matrix,  # [N, v], in and out
    teacher: Matrix,  # [N, v], in
    tokens: TokenArrays,  # [N] each, in
    record: tl.tensor,  # [N, F] fp32, out
    inner: tl.tensor,  # [N, 2] fp32, out; None where no loss needs it
    parts: tl.tensor,  # [N, F, G] fp32, scratch
    inner_parts: tl.tensor,  # [N, 2, G] fp32, scratch; None where no loss needs it
    turns: tl.tensor,  # [1 + N] int32, scratch, in: zeros; the next ticket, arrivals at each row
    columns: tl.tensor,  # int, in: v
    slices: tl.tensor,  # int, in: G, of v columns
    beta: tl.tensor,  # fp32, in
    z_loss: tl.tensor,  # fp32, in
    FORM: tl.constexpr,
    SLICE: tl.constexpr,  # columns of a program
    WIDTH: tl.constexpr,  # power of two, at least G
    STEP: tl.constexpr,
) -> None:
    """One slice of one row. Grid: N * G."""
    ticket = tl.atomic_add(turns, 1, sem="relaxed")
    n = (ticket // slices).to(tl.int64)
    part = ticket % slices
    start = part * SLICE
    stop = tl.minimum(start + SLICE, columns)
    row = open_row(student, teacher, tokens, n, FORM)
    own_record = record + n * FIELDS
    own_inner = own_record
    own_inner_parts = parts
    if needs_inner(FORM):
        own_inner = inner + n * 2
        own_inner_parts = inner_parts + n * (2 * slices)
    if counts(row) & (start < row.valid):
        slice_ = Slice(
            part=part,
            start=start,
            stop=stop,
            records=parts + n * (FIELDS * slices),
            inner=own_inner_parts,
            arrived=turns + 1 + n,
            slices=slices,
            others=tl.cdiv(row.valid, SLICE),
        )
        _slice(row, slice_, own_record, own_inner, beta, z_loss, FORM, SLICE, WIDTH, STEP)
    else:
        if includes(STEP, GRADIENT):
            write_zeros(row, start, stop, SLICE)
        if (part == 0) & includes(STEP, GRADIENT):
            store_record(no_record(0.0), own_record, 1)
            if needs_inner(FORM):
                tl.store(own_inner, 0.0)
                tl.store(own_inner + 1, 0.0)


@triton.jit
def _slice(
    row: Row,
    slice_: Slice,
    own_record: tl.tensor,
    own_inner: tl.tensor,
    beta: tl.tensor,
    z_loss: tl.tensor,
    FORM: tl.constexpr,
    SLICE: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """A slice with a real column, of a token that counts."""
    real_stop = tl.minimum(slice_.stop, row.valid)
    columns = slice_.start + tl.arange(0, SLICE)
    x, y = load_logits(row, columns, real_stop, FORM)
    found, e_s, e_t = tile_record(x, y, slice_.start, real_stop, row, FORM)
    if includes(STEP, RECORD):
        store_record(found, slice_.records + slice_.part, slice_.slices)
    if STEP == WHOLE:
        meet(slice_.arrived, slice_.others)
    if STEP != RECORD:
        part = tl.arange(0, WIDTH)
        records = load_record(slice_.records + part, slice_.slices, part < slice_.others, FORM)
        merged = merged_parts(records, row, FORM)
        if keeps_exponentials(FORM):
            frame = frame_of(merged, row, found.max_s, found.max_t, z_loss, FORM)
        else:
            x, y = load_logits(row, columns, real_stop, FORM)
            frame = frame_of(merged, row, merged.max_s, merged.max_t, z_loss, FORM)
            e_s, e_t = exponentials(x, y, frame.at_s, frame.at_t, row, FORM)
        if needs_inner(FORM):
            frame = _exchanged(
                x, y, e_s, e_t, frame, row, slice_, own_inner, beta, FORM, WIDTH, STEP
            )
        if includes(STEP, GRADIENT):
            _store_merged(merged, row, slice_, real_stop, own_record, FORM, SLICE)
            g = _gradient(x, y, e_s, e_t, columns, real_stop, frame, row, beta, FORM)
            store_gradient(row, columns, slice_.stop, g)
            finish_label(row, frame, merged, slice_.start, slice_.stop, beta, FORM)


@triton.jit
def _exchanged(
    x: tl.tensor,
    y: tl.tensor,
    e_s: tl.tensor,
    e_t: tl.tensor,
    frame: Frame,
    row: Row,
    slice_: Slice,
    own_inner: tl.tensor,
    beta: tl.tensor,
    FORM: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
) -> Frame:
    """The frame with its mean, after a second meeting over the inner sums."""
    values = slice_.inner
    means = slice_.inner + slice_.slices
    if includes(STEP, INNER):
        value, mean = inner_terms(x, y, e_s, e_t, frame, row, beta, FORM)
        real = slice_.start + tl.arange(0, x.shape[0]) < tl.minimum(slice_.stop, row.valid)
        tl.store(values + slice_.part, tl.sum(tl.where(real, value, 0.0), 0))
        tl.store(means + slice_.part, tl.sum(tl.where(real, mean, 0.0), 0))
    if STEP == WHOLE:
        meet(slice_.arrived, 2 * slice_.others)
    if includes(STEP, GRADIENT):
        part = tl.arange(0, WIDTH)
        frame = with_mean(frame, _total(means + part, part < slice_.others))
        if slice_.part == 0:
            tl.store(own_inner, _total(values + part, part < slice_.others))
            tl.store(own_inner + 1, frame.mean)
    return frame


@triton.jit
def _gradient(
    x: tl.tensor,
    y: tl.tensor,
    e_s: tl.tensor,
    e_t: tl.tensor,
    columns: tl.tensor,
    stop: tl.tensor,
    frame: Frame,
    row: Row,
    beta: tl.tensor,
    FORM: tl.constexpr,
) -> tl.tensor:
    """Of the slice: from what registers keep, or from the slice again, which is in a cache.

    Kept are exponentials, all that forward KL at temperature 1 needs. More would not fit.
    """
    if needs_inner(FORM):
        x, y = load_logits(row, columns, stop, FORM)
        e_s, e_t = exponentials(x, y, frame.at_s, frame.at_t, row, FORM)
    if keeps_exponentials(FORM):
        g = divergence_gradient(e_s, e_s, e_s, e_t, frame, row, beta, FORM)
        if FORM is not None:
            if row.student_scale == 1.0:
                g = tl.fma(e_s, frame.k_ce, g)
            else:
                x, y = load_logits(row, columns, stop, None)
                g = plus_cross_entropy(g, x, e_s, frame, row)
    else:
        g = gradient(x, y, e_s, e_t, frame, row, beta, FORM)
    return g


@triton.jit
def _total(pointers: tl.tensor, there: tl.tensor) -> tl.tensor:
    return tl.sum(tl.load(pointers, mask=there, other=0.0, volatile=True), 0)


@triton.jit
def _store_merged(
    merged: Record,
    row: Row,
    slice_: Slice,
    stop: tl.tensor,
    own_record: tl.tensor,
    FORM: tl.constexpr,
    SLICE: tl.constexpr,
) -> None:
    """The first program stores the record; a program that has a maximum, where it is."""
    if slice_.part == 0:
        for i in tl.static_range(FIELDS):
            if i != _ARG_S and i != _ARG_T:
                tl.store(own_record + i, merged[i])
        if FORM is None:
            tl.store(own_record + _ARG_T, 0.0)
    if merged.arg_s == slice_.start:
        column = first_column(row.student, merged.max_s, merged.arg_s, stop, SLICE)
        tl.store(own_record + _ARG_S, (column + row.first).to(tl.float32))
    if FORM is not None:  # noqa: SIM102 - of the compiler; the next one is of the device
        if merged.arg_t == slice_.start:
            column = first_column(row.teacher, merged.max_t, merged.arg_t, stop, SLICE)
            tl.store(own_record + _ARG_T, (column + row.first).to(tl.float32))
