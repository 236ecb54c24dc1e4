"""Token losses on the CPU: the door to csrc/kd_cpu, which gets raw addresses.

The native code takes every row twice (three times for the losses with an inner sum) where torch
goes over the whole matrix a dozen times, needs no memory beside the logits, and picks scalar, AVX2
or AVX-512 code when it runs. What an address cannot tell (types, strides, sizes) is checked at the
door; that the tensors live as long as the call is seen to here.

Shapes: N tokens, v columns of this shard, R floats of a record; `kernels.reference` says the rest.
Logits fp32 or bf16, student and teacher each their own; columns contiguous, rows any stride apart.
Records, sums and arithmetic in fp32, sums over a row in fp64.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from megatron_miniplm import _C
from megatron_miniplm.kernels.door import checked
from megatron_miniplm.kernels.record import SIZE
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens

assert _C.KD_RECORD_FLOATS == SIZE, "csrc/kd_rows.h and kernels/record.py differ: build again"


@functools.cache
def variants() -> tuple[str, ...]:
    """Instruction sets that this machine can use, the best one first."""
    return tuple(_C.kd_variants())


@dataclass(frozen=True)
class CpuKernels:
    """The four functions of a backend (`kernels.reference`) for one instruction set."""

    variant: str

    def stats(
        self,
        loss: TokenLoss,
        student_Nv: torch.Tensor,
        teacher_Nv: torch.Tensor | None,
        tokens: Tokens,
    ) -> torch.Tensor:
        """The shard's record, [N, R]."""
        record_NR = _floats(student_Nv, SIZE)
        self._run("s", loss, student_Nv, teacher_Nv, tokens, record_NR, None)
        return record_NR

    def inner(
        self,
        loss: TokenLoss,
        student_Nv: torch.Tensor,
        teacher_Nv: torch.Tensor,
        tokens: Tokens,
        record_NR: torch.Tensor,
    ) -> torch.Tensor:
        """The shard's inner sums, [N, 2]."""
        inner_N2 = _floats(student_Nv, 2)
        self._run("i", loss, student_Nv, teacher_Nv, tokens, record_NR, inner_N2)
        return inner_N2

    def grad_(
        self,
        loss: TokenLoss,
        student_Nv: torch.Tensor,
        teacher_Nv: torch.Tensor | None,
        tokens: Tokens,
        record_NR: torch.Tensor,
        inner_N2: torch.Tensor | None,
    ) -> None:
        """The student's logits become dL/ds."""
        self._run("g", loss, student_Nv, teacher_Nv, tokens, record_NR, inner_N2)

    def fused_(
        self,
        loss: TokenLoss,
        student_Nv: torch.Tensor,
        teacher_Nv: torch.Tensor | None,
        tokens: Tokens,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All of it, row by row: the second pass over a row finds it in a cache."""
        record_NR = _floats(student_Nv, SIZE)
        inner_N2 = _floats(student_Nv, 2) if loss.needs_inner else None
        self._run("sig", loss, student_Nv, teacher_Nv, tokens, record_NR, inner_N2)
        return record_NR, inner_N2

    def _run(
        self,
        steps: str,
        loss: TokenLoss,
        student_Nv: torch.Tensor,
        teacher_Nv: torch.Tensor | None,
        tokens: Tokens,
        record_NR: torch.Tensor,
        inner_N2: torch.Tensor | None,
    ) -> None:
        tokens = checked(
            loss, student_Nv, teacher_Nv, tokens,
            device="cpu", dtypes=(torch.float32, torch.bfloat16), whole=steps == "sig",
        )  # fmt: skip
        rows, width = student_Nv.shape
        teacher = student_Nv if teacher_Nv is None else teacher_Nv
        record_NR = _matrix(record_NR, rows, SIZE)
        inner_N2 = None if inner_N2 is None else _matrix(inner_N2, rows, 2)
        _C.kd_run(
            steps=steps,
            variant=self.variant,
            form=loss.form or "",
            beta=loss.beta,
            z_loss=loss.z_loss,
            student=student_Nv.data_ptr(),
            student_stride=student_Nv.stride(0),
            student_bf16=student_Nv.dtype == torch.bfloat16,
            teacher=teacher.data_ptr(),
            teacher_stride=teacher.stride(0),
            teacher_bf16=teacher.dtype == torch.bfloat16,
            rows=rows,
            width=width,
            valid=tokens.valid,
            first=tokens.first,
            # Of `tokens`, which lives until the call returns.
            labels=tokens.labels_N.data_ptr(),
            kd_weight=tokens.kd_weight_N.data_ptr(),
            ce_weight=tokens.ce_weight_N.data_ptr(),
            student_scale=tokens.student_scale_N.data_ptr(),
            teacher_scale=tokens.teacher_scale_N.data_ptr(),
            records=record_NR.data_ptr(),
            inners=0 if inner_N2 is None else inner_N2.data_ptr(),
            threads=torch.get_num_threads(),
        )
        if "g" in steps:  # whoever saved the logits for a backward pass shall hear of it
            torch.autograd.graph.increment_version(student_Nv)


BEST = CpuKernels(variants()[0])
stats, inner, grad_, fused_ = BEST.stats, BEST.inner, BEST.grad_, BEST.fused_


def _floats(like_Nv: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.empty((like_Nv.shape[0], columns), dtype=torch.float32)


def _matrix(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    assert values.shape == (rows, columns), f"{tuple(values.shape)} is not [{rows}, {columns}]"
    assert values.dtype == torch.float32, f"{values.dtype} is not fp32"
    return values.contiguous()
