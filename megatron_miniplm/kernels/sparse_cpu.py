"""Sparse losses on the CPU: the door to csrc/kd_sparse.h, which gets raw addresses.

As `kernels.cpu`: rows are taken twice, the second time from a cache, in scalar, AVX2 or AVX-512
code; types, strides and sizes are checked here. The logits of the support are hidden in their place
while the others are summed, and put back.

Shapes: N tokens, K entries, v columns of this shard, R floats of a record. Logits fp32 or bf16;
columns contiguous, rows any stride apart. Records and arithmetic in fp32, sums over a row in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_miniplm import _C
from megatron_miniplm.kernels.cpu import variants
from megatron_miniplm.kernels.door import checked, checked_targets
from megatron_miniplm.kernels.sparse_loss import SparseLoss, SparseTargets
from megatron_miniplm.kernels.sparse_record import SIZE
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens

assert _C.SPARSE_KD_RECORD_FLOATS == SIZE, (
    "csrc/kd_rows.h and kernels/sparse_record.py differ: build again"
)


@dataclass(frozen=True)
class SparseCpuKernels:
    """The three functions of a backend (`kernels.sparse_reference`) for one instruction set."""

    variant: str

    def stats(
        self, loss: SparseLoss, student_Nv: torch.Tensor, targets: SparseTargets, tokens: Tokens
    ) -> torch.Tensor:
        """The shard's record, [N, R]."""
        record_NR = torch.empty((student_Nv.shape[0], SIZE), dtype=torch.float32)
        self._run("s", loss, student_Nv, targets, tokens, record_NR)
        return record_NR

    def grad_(
        self,
        loss: SparseLoss,
        student_Nv: torch.Tensor,
        targets: SparseTargets,
        tokens: Tokens,
        record_NR: torch.Tensor,
    ) -> None:
        """The student's logits become dL/ds."""
        shape = (student_Nv.shape[0], SIZE)
        assert record_NR.shape == shape, f"{tuple(record_NR.shape)} is not {shape}"
        self._run("g", loss, student_Nv, targets, tokens, record_NR.float().contiguous())

    def fused_(
        self, loss: SparseLoss, student_Nv: torch.Tensor, targets: SparseTargets, tokens: Tokens
    ) -> torch.Tensor:
        """Both, row by row."""
        record_NR = torch.empty((student_Nv.shape[0], SIZE), dtype=torch.float32)
        self._run("sg", loss, student_Nv, targets, tokens, record_NR)
        return record_NR

    def _run(
        self,
        steps: str,
        loss: SparseLoss,
        student_Nv: torch.Tensor,
        targets: SparseTargets,
        tokens: Tokens,
        record_NR: torch.Tensor,
    ) -> None:
        whole = steps == "sg"
        tokens = checked(
            TokenLoss(), student_Nv, None, tokens,
            device="cpu", dtypes=(torch.float32, torch.bfloat16), whole=whole,
        )  # fmt: skip
        targets = checked_targets(targets, student_Nv, tokens, whole=whole)
        rows, width = student_Nv.shape
        _C.sparse_kd_run(
            steps=steps,
            variant=self.variant,
            form=loss.form,
            z_loss=loss.z_loss,
            student=student_Nv.data_ptr(),
            student_stride=student_Nv.stride(0),
            student_bf16=student_Nv.dtype == torch.bfloat16,
            rows=rows,
            width=width,
            valid=tokens.valid,
            first=tokens.first,
            # Of `tokens` and `targets`, which live until the call returns.
            labels=tokens.labels_N.data_ptr(),
            kd_weight=tokens.kd_weight_N.data_ptr(),
            ce_weight=tokens.ce_weight_N.data_ptr(),
            student_scale=tokens.student_scale_N.data_ptr(),
            entries=targets.ids_NK.shape[1],
            ids=targets.ids_NK.data_ptr(),
            weights=targets.probs_NK.data_ptr(),
            tail=targets.tail_N.data_ptr(),
            records=record_NR.data_ptr(),
            threads=torch.get_num_threads(),
        )
        if "g" in steps:  # whoever saved the logits for a backward pass shall hear of it
            torch.autograd.graph.increment_version(student_Nv)


BEST = SparseCpuKernels(variants()[0])
stats, grad_, fused_ = BEST.stats, BEST.grad_, BEST.fused_
