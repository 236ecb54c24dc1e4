"""The Triton backend: the four functions of `kernels.reference`, and which kernel serves them.

Everything is asynchronous on the tensors' current stream: no host synchronisation and no state
between calls, so all of it can be captured in a CUDA graph. Kernels compile once for a loss, the
types and the widths; the number of tokens is free. The same input gives the same bits.

Shapes: N tokens, v columns of this shard, R floats of a record.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.kernels.choice import VARIABLE, chosen
from megatron_miniplm.kernels.door import checked
from megatron_miniplm.kernels.record import SIZE
from megatron_miniplm.kernels.token_loss import Divergence, TokenLoss, Tokens
from megatron_miniplm.kernels.triton_grad import grad_kernel, inner_kernel
from megatron_miniplm.kernels.triton_one_read import WHOLE, one_read_kernel
from megatron_miniplm.kernels.triton_rows import Matrix, TokenArrays
from megatron_miniplm.kernels.triton_stats import merge_kernel, stats_kernel
from megatron_miniplm.kernels.triton_two_pass import two_pass_kernel

# Columns at a time, of a program where rows are cut, and of a program that keeps its slice. With
# these, no loss spills on sm_90 and two programs fit a multiprocessor (tools/inspect_triton.py).
TILE = 4096
SLICE = 8 * TILE
ONE_READ_SLICE = 4096
LAUNCH = {"num_warps": 8, "maxnreg": 128}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter's tensors are on the CPU.
_DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
# (GPU, form) -> median ms of (one-read, two-pass) at N = 8,192, V = 151,936, bf16, T = 1, as
# `pytest tests/gpu -m gpu -k faster -s` prints them. Where nothing was measured: two-pass, which
# waits for nobody.
MEASURED_MS: dict[tuple[str, Divergence | None], tuple[float, float]] = {}


def stats(
    loss: TokenLoss, student_Nv: torch.Tensor, teacher_Nv: torch.Tensor | None, tokens: Tokens
) -> torch.Tensor:
    """The shard's record, [N, R] fp32; rows of tokens without weight are 0."""
    row = row_arguments(loss, student_Nv, teacher_Nv, tokens)
    count = student_Nv.shape[0]
    slices = max(1, triton.cdiv(tokens.valid, SLICE))
    parts = student_Nv.new_empty((count, SIZE, slices), dtype=torch.float32)
    launch(
        stats_kernel, count * slices, *row, parts, slices, FORM=loss.form, TILE=TILE, SLICE=SLICE
    )
    if slices == 1:
        return parts.view(count, SIZE)
    record_NR = parts.new_empty((count, SIZE))
    width = triton.next_power_of_2(slices)
    launch(
        merge_kernel, count, *row, parts, record_NR, slices,
        FORM=loss.form, WIDTH=width, num_warps=1,
    )  # fmt: skip
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
    launch(
        inner_kernel, count * slices,
        *row_arguments(loss, student_Nv, teacher_Nv, tokens),
        record_NR.contiguous(), parts, slices, loss.beta,
        FORM=loss.form, TILE=TILE, SLICE=SLICE,
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
    row = row_arguments(loss, student_Nv, teacher_Nv, tokens)
    count, columns = student_Nv.shape
    slices = triton.cdiv(columns, SLICE)
    launch(
        grad_kernel, count * slices,
        *row, record_NR.contiguous(), None if inner_N2 is None else inner_N2.contiguous(),
        columns, slices, loss.beta, loss.z_loss,
        FORM=loss.form, TILE=TILE, SLICE=SLICE,
    )  # fmt: skip
    torch.autograd.graph.increment_version(student_Nv)


def fused_(
    loss: TokenLoss, student_Nv: torch.Tensor, teacher_Nv: torch.Tensor | None, tokens: Tokens
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All three where the shard is the whole vocabulary; the student is overwritten."""
    kernel = one_read_ if _reads_once(loss, student_Nv, tokens) else two_pass_
    return kernel(loss, student_Nv, teacher_Nv, tokens)


def two_pass_(
    loss: TokenLoss, student_Nv: torch.Tensor, teacher_Nv: torch.Tensor | None, tokens: Tokens
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`fused_` by the kernel that reads the logits twice."""
    row = row_arguments(loss, student_Nv, teacher_Nv, tokens, whole=True)
    count, columns = student_Nv.shape
    record_NR, inner_N2 = _outputs(loss, student_Nv)
    launch(
        two_pass_kernel, count,
        *row, record_NR, inner_N2, columns, loss.beta, loss.z_loss,
        FORM=loss.form, TILE=TILE,
    )  # fmt: skip
    torch.autograd.graph.increment_version(student_Nv)
    return record_NR, inner_N2


def one_read_(
    loss: TokenLoss,
    student_Nv: torch.Tensor,
    teacher_Nv: torch.Tensor | None,
    tokens: Tokens,
    *,
    steps: tuple[int, ...] = (WHOLE.value,),
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`fused_` by the kernel whose programs wait for each other; see `why_not_one_read`.

    `steps`: one launch for each; only `WHOLE` needs programs that run at the same time.
    """
    row = row_arguments(loss, student_Nv, teacher_Nv, tokens, whole=True)
    count, columns = student_Nv.shape
    record_NR, inner_N2 = _outputs(loss, student_Nv)
    slices = triton.cdiv(columns, ONE_READ_SLICE)
    parts = record_NR.new_empty((count, SIZE, slices))
    inner_parts = None if inner_N2 is None else record_NR.new_empty((count, 2, slices))
    for step in steps:
        turns = torch.zeros(1 + count, dtype=torch.int32, device=student_Nv.device)
        launch(
            one_read_kernel, count * slices,
            *row, record_NR, inner_N2, parts, inner_parts, turns, columns, slices,
            loss.beta, loss.z_loss,
            FORM=loss.form, SLICE=ONE_READ_SLICE, WIDTH=triton.next_power_of_2(slices), STEP=step,
        )  # fmt: skip
    torch.autograd.graph.increment_version(student_Nv)
    return record_NR, inner_N2


def why_not_one_read(student_Nv: torch.Tensor, tokens: Tokens) -> str | None:
    """What keeps the programs of a row from running at once, as they must; None where nothing does.

    One program for a multiprocessor is certain.
    """
    if not student_Nv.is_cuda:
        return "its programs wait for each other, and the interpreter runs one after another"
    if tokens.valid == 0:
        return "there is no real column"
    programs = triton.cdiv(student_Nv.shape[1], ONE_READ_SLICE)
    device = torch.cuda.get_device_properties(student_Nv.device)
    if programs <= device.multi_processor_count:
        return None
    return (
        f"a row of {student_Nv.shape[1]} columns takes {programs} programs at once, and "
        f"{device.name} is certain to run {device.multi_processor_count}"
    )


def _reads_once(loss: TokenLoss, student_Nv: torch.Tensor, tokens: Tokens) -> bool:
    """Whether the one-read kernel is asked for, or known to be the faster one."""
    choice, why_not = chosen(), why_not_one_read(student_Nv, tokens)
    if choice == "triton-one-read" and why_not is not None:
        raise ConfigError(f"{VARIABLE}={choice} cannot be: {why_not}; use triton-two-pass or auto")
    if choice != "auto" or why_not is not None:
        return choice == "triton-one-read"
    device = torch.cuda.get_device_name(student_Nv.device)
    one_read_ms, two_pass_ms = MEASURED_MS.get((device, loss.form), (0.0, 0.0))
    return one_read_ms < two_pass_ms


def _outputs(loss: TokenLoss, student_Nv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(record [N, R], inner sums [N, 2] or None), fp32, not filled."""
    count = student_Nv.shape[0]
    record_NR = student_Nv.new_empty((count, SIZE), dtype=torch.float32)
    return record_NR, record_NR.new_empty((count, 2)) if loss.needs_inner else None


def row_arguments(
    loss: TokenLoss,
    student_Nv: torch.Tensor,
    teacher_Nv: torch.Tensor | None,
    tokens: Tokens,
    *,
    whole: bool = False,
) -> tuple[Matrix, Matrix, TokenArrays]:
    """What all kernels take first, checked."""
    tokens = checked(
        loss, student_Nv, teacher_Nv, tokens, device=_DEVICE, dtypes=_DTYPES, whole=whole
    )
    teacher = Matrix(None, 0)
    if loss.form is not None and teacher_Nv is not None:
        teacher = Matrix(teacher_Nv, teacher_Nv.stride(0))
    return (
        Matrix(student_Nv, student_Nv.stride(0)),
        teacher,
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


def launch(kernel: Any, programs: int, student: Matrix, *arguments: Any, **options: Any) -> None:
    """On the student's device; a launch of no programs is an error in CUDA, and nothing here."""
    if programs == 0:
        return
    with torch.cuda.device_of(student.data):
        kernel[(programs,)](student, *arguments, **(LAUNCH | options))
