"""Logits to gradient with one read: the programs of a row keep their slices and exchange records.

    1. G programs share a row. Each loads its slice and reduces it to a record in scratch.
    2. They meet: each counts itself in and waits until all G of its row are there.
    3. Each merges the G records, and writes the gradient from the exponentials it has kept.

A loss with inner sums meets once more. 6 bytes of bf16 traffic a logit pair, where `triton_two_pass`
has 10 (spec/kernels 3.2).

Nobody waits in vain: rows are dealt out by a ticket that is drawn when a program starts. So if a
program of a row has not started, all programs that run belong to this row or an older, complete
one; they are fewer than G, and where G programs fit the device at once (`fits`), the missing one
is next to start. Ticket and counters are zeroed by the launch that uses them: no call leaves state
behind, two streams share none, and a captured graph zeroes its own.

The interpreter runs one program after another and would wait for ever: there, STEP runs the parts
between the meetings as launches of their own.

Shapes: N tokens, v columns, G slices of a row, F fields of a record.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_miniplm.kernels.record import Field
from megatron_miniplm.kernels.triton_grad import finish_label, store_gradient
from megatron_miniplm.kernels.triton_losses import (
    frame_of,
    divergence_gradient,
    plus_cross_entropy,
    gradient,
    inner_terms,
    needs_inner,
    with_mean,
)
from megatron_miniplm.kernels.triton_record import (
    FIELDS,
    exponentials,
    first_column,
    load_record,
    merged_parts,
    no_record,
    store_record,
    sums_forward,
    tile_record,
)
from megatron_miniplm.kernels.triton_rows import (
    Matrix,
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


@triton.constexpr_function
def keeps_exponentials(form):  # noqa: ANN001, ANN201
    """Whether the gradient is made of exponentials alone, and the logits need not stay."""
    return form is None or form in ("forward_kl", "soft_nll")


@triton.jit
def meet(arrived, count) -> None:
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
    record,  # noqa: ANN001  [N, F] fp32, out
    inner,  # noqa: ANN001  [N, 2] fp32, out; None where no loss needs it
    parts,  # noqa: ANN001  [N, F, G] fp32, scratch
    inner_parts,  # noqa: ANN001  [N, 2, G] fp32, scratch; None where no loss needs it
    turns,  # noqa: ANN001  [1 + N] int32, scratch, in: zeros; the next ticket, arrivals at each row
    columns,  # noqa: ANN001  int, in: v
    slices,  # noqa: ANN001  int, in: G, of v columns
    beta,  # noqa: ANN001  fp32, in
    z_loss,  # noqa: ANN001  fp32, in
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
    row = open_row(student, teacher, tokens, n, FORM)
    own_record = record + n * FIELDS
    own_inner = inner
    if needs_inner(FORM):
        own_inner = inner + n * 2
    if counts(row) & (start < row.valid):
        own_parts = parts + n * (FIELDS * slices)
        own_inner_parts = inner_parts
        if needs_inner(FORM):
            own_inner_parts = inner_parts + n * (2 * slices)
        _slice(
            row, part, start, tl.minimum(start + SLICE, columns), own_record, own_inner,
            own_parts, own_inner_parts, turns + 1 + n, slices, beta, z_loss,
            FORM, SLICE, WIDTH, STEP,
        )  # fmt: skip
    else:
        if STEP == WHOLE or STEP == GRADIENT:  # noqa: PLR1714
            write_zeros(row, start, tl.minimum(start + SLICE, columns), SLICE)
        if part == 0:
            store_record(no_record(0.0), own_record, 1)
            if needs_inner(FORM):
                tl.store(own_inner, 0.0)
                tl.store(own_inner + 1, 0.0)


@triton.jit
def _slice(  # noqa: PLR0913, C901, PLR0912
    row, part, start, stop, own_record, own_inner, own_parts, own_inner_parts, arrived, slices,
    beta, z_loss,
    FORM: tl.constexpr, SLICE: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """A slice with a real column, of a token that counts."""
    real_stop = tl.minimum(stop, row.valid)
    waited_for = tl.cdiv(row.valid, SLICE)
    columns = start + tl.arange(0, SLICE)
    x, y = load_logits(row, columns, real_stop, FORM)
    found, e_s, e_t = tile_record(x, y, start, real_stop, row, FORM)
    max_s = found.max_s
    max_t = found.max_t
    if STEP == WHOLE or STEP == RECORD:  # noqa: PLR1714
        store_record(found, own_parts + part, slices)
    if STEP == WHOLE:
        meet(arrived, waited_for)
    if STEP != RECORD:
        others = tl.arange(0, WIDTH)
        there = others < waited_for
        merged = merged_parts(load_record(own_parts + others, slices, there, FORM), row, FORM)
        if not keeps_exponentials(FORM):
            x, y = load_logits(row, columns, real_stop, FORM)
            max_s = merged.max_s
            max_t = merged.max_t
            e_s, e_t = exponentials(x, y, max_s, max_t, row, FORM)
        frame = frame_of(merged, row, max_s, max_t, z_loss, FORM)
        if needs_inner(FORM):
            if STEP == WHOLE or STEP == INNER:  # noqa: PLR1714
                value, mean = inner_terms(x, y, e_s, e_t, frame, row, beta, FORM)
                real = columns < real_stop
                tl.store(own_inner_parts + part, tl.sum(tl.where(real, value, 0.0), 0))
                tl.store(own_inner_parts + slices + part, tl.sum(tl.where(real, mean, 0.0), 0))
            if STEP == WHOLE:
                meet(arrived, 2 * waited_for)
            if STEP != INNER:
                value = _total(own_inner_parts + others, there)
                mean = _total(own_inner_parts + slices + others, there)
                frame = with_mean(frame, mean)
                if part == 0:
                    tl.store(own_inner, value)
                    tl.store(own_inner + 1, mean)
        if STEP != INNER:
            _store_merged(merged, row, part, start, real_stop, own_record, FORM, SLICE)
            if keeps_exponentials(FORM):
                g = divergence_gradient(e_s, e_s, e_s, e_t, frame, row, beta, FORM)
                if FORM is not None:
                    if row.student_scale == 1.0:
                        g = tl.fma(e_s, frame.k_ce, g)
                    else:
                        x, y = load_logits(row, columns, real_stop, None)
                        g = plus_cross_entropy(g, x, e_s, frame, row)
            else:
                if needs_inner(FORM):
                    x, y = load_logits(row, columns, real_stop, FORM)
                    e_s, e_t = exponentials(x, y, max_s, max_t, row, FORM)
                g = gradient(x, y, e_s, e_t, frame, row, beta, FORM)
            store_gradient(row, columns, stop, g)
            finish_label(row, frame, merged, start, stop, beta, FORM)


@triton.jit
def _total(pointers, there) -> tl.tensor:
    return tl.sum(tl.load(pointers, mask=there, other=0.0, volatile=True), 0)


@triton.jit
def _store_merged(
    merged, row, part, start, stop, own_record, FORM: tl.constexpr, SLICE: tl.constexpr
) -> None:
    """The first program stores the record; a program that has a maximum, where it is."""
    if part == 0:
        for i in tl.static_range(FIELDS):
            if i != _ARG_S and i != _ARG_T:  # noqa: PLR1714
                tl.store(own_record + i, merged[i])
        if FORM is None:
            tl.store(own_record + _ARG_T, 0.0)
    if merged.arg_s == start:
        column = first_column(row.student, merged.max_s, merged.arg_s, stop, SLICE)
        tl.store(own_record + _ARG_S, (column + row.first).to(tl.float32))
    if FORM is not None:
        if merged.arg_t == start:
            column = first_column(row.teacher, merged.max_t, merged.arg_t, stop, SLICE)
            tl.store(own_record + _ARG_T, (column + row.first).to(tl.float32))
