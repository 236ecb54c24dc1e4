"""What becomes of a chunk of logits: the loss of each token, and the gradient in their place.

Three ways to say a loss, with one signature:

`KernelLoss`    one of `kernels.token_loss`: analytic gradient, and under TP one all-gather of a few
                floats a token (two for the mixtures).
`SparseKernelLoss`  one of `kernels.sparse_loss`, of a teacher of whom some tokens are known:
                analytic gradient, one all-gather of a few floats a token.
`FunctionLoss`  any torch function of the logits: gradient by autograd, and under TP the chunk's
                columns are gathered. Slower, for a loss of which one only knows its formula.

Shapes: C tokens of the chunk (or of a part of it), v columns of this rank, V real columns over all
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from megatron_miniplm.kernels import backend_for, sparse_backend_for, sparse_record
from megatron_miniplm.kernels.record import TokenValues, merge, merge_inner, values
from megatron_miniplm.kernels.sparse_loss import SparseLoss, SparseTargets
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens
from megatron_miniplm.parallel.vocab import VocabShard, gather_shards

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1280 << 20}
"""Memory of the logits of one chunk, student's and teacher's (`models.head` cuts the chunks), and
as much again for what a function of logits makes of them."""

_COPIES = 12
"""Matrices [C, V] in fp32 that are alive at once where a function is differentiated: the scaled
logits of both, what autograd keeps, and gradients. KL as one writes it in torch has 8, Jeffreys'
divergence 9 (`tests/unit/test_logit_loss.py` measures them); the rest is for longer formulas."""

Adapt = Callable[[torch.Tensor, Tokens, VocabShard], Tokens]
"""(teacher's logits [C, v], tokens, shard) -> the tokens with other weights and scales."""

Signal = torch.Tensor | SparseTargets | None
"""What a loss knows of the teacher: its logits [C, v], some of its probabilities, or nothing."""

LogitFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(student [C, V], teacher [C, V], labels [C]) -> loss of each token [C], differentiable in the
student. Both are scaled by 1 / temperature, in fp32 or fp64, and have real columns only."""


class LogitLoss(Protocol):
    """A loss on a chunk of logits."""

    @property
    def loss(self) -> TokenLoss | SparseLoss:
        """The part that the kernels compute (cross entropy, z-loss, maybe a divergence)."""

    def __call__(
        self,
        student_Cv: torch.Tensor,
        signal: Signal,
        tokens: Tokens,
        shard: VocabShard,
        *,
        with_grad: bool,
    ) -> TokenValues:
        """Values of every token; with a gradient, the student's logits are overwritten by it."""


@dataclass(frozen=True)
class KernelLoss:
    """A loss that the kernels know."""

    loss: TokenLoss = field(default_factory=TokenLoss)

    def __call__(
        self,
        student_Cv: torch.Tensor,
        signal: Signal,
        tokens: Tokens,
        shard: VocabShard,
        *,
        with_grad: bool,
    ) -> TokenValues:
        """One rank with a gradient: all in one pass. Else statistics, merged, then the gradient."""
        teacher_Cv = _dense(signal)
        loss, kernel = self.loss, backend_for(student_Cv)
        if with_grad and shard.group is None:
            record_CR, inner_C2 = kernel.fused_(loss, student_Cv, teacher_Cv, tokens)
            return values(loss, record_CR, inner_C2, tokens)
        record_CR = kernel.stats(loss, student_Cv, teacher_Cv, tokens)
        record_CR = merge(gather_shards(record_CR, shard), tokens)
        inner_C2 = None
        if loss.needs_inner:
            assert teacher_Cv is not None, f"{loss.divergence} needs a teacher"
            inner_C2 = kernel.inner(loss, student_Cv, teacher_Cv, tokens, record_CR)
            inner_C2 = merge_inner(gather_shards(inner_C2, shard))
        if with_grad:
            kernel.grad_(loss, student_Cv, teacher_Cv, tokens, record_CR, inner_C2)
        return values(loss, record_CR, inner_C2, tokens)


@dataclass(frozen=True)
class SparseKernelLoss:
    """A loss that the sparse kernels know."""

    loss: SparseLoss

    def __call__(
        self,
        student_Cv: torch.Tensor,
        signal: Signal,
        tokens: Tokens,
        shard: VocabShard,
        *,
        with_grad: bool,
    ) -> TokenValues:
        """As `KernelLoss`; no loss needs a second collective."""
        assert isinstance(signal, SparseTargets), f"{self.loss.form} needs a teacher's targets"
        loss, kernel = self.loss, sparse_backend_for(student_Cv)
        if with_grad and shard.group is None:
            record_CR = kernel.fused_(loss, student_Cv, signal, tokens)
            return sparse_record.values(loss, record_CR, signal, tokens)
        record_CR = kernel.stats(loss, student_Cv, signal, tokens)
        record_CR = sparse_record.merge(gather_shards(record_CR, shard), tokens)
        if with_grad:
            kernel.grad_(loss, student_Cv, signal, tokens, record_CR)
        return sparse_record.values(loss, record_CR, signal, tokens)


@dataclass(frozen=True)
class FunctionLoss:
    """A divergence that is only known as a torch function; cross entropy stays the kernels'."""

    function: LogitFunction
    z_loss: float = 0.0

    @property
    def loss(self) -> TokenLoss:
        """Cross entropy, and a divergence that only gives the metrics of the teacher."""
        return TokenLoss(divergence="soft_nll", z_loss=self.z_loss)

    def __call__(
        self,
        student_Cv: torch.Tensor,
        signal: Signal,
        tokens: Tokens,
        shard: VocabShard,
        *,
        with_grad: bool,
    ) -> TokenValues:
        """Some tokens at a time: autograd's copies of their logits are many times the logits."""
        teacher_Cv = _dense(signal)
        assert teacher_Cv is not None, "a divergence needs a teacher"
        count, step = student_Cv.shape[0], rows_at_once(student_Cv, shard)
        parts = []
        for start in range(0, count, step):
            part = slice(start, start + step)
            parts.append(
                self._some(
                    student_Cv[part], teacher_Cv[part], tokens.rows(part), shard,
                    with_grad=with_grad,
                )
            )  # fmt: skip
        return TokenValues.joined(parts)

    def _some(
        self,
        student_Cv: torch.Tensor,
        teacher_Cv: torch.Tensor,
        tokens: Tokens,
        shard: VocabShard,
        *,
        with_grad: bool,
    ) -> TokenValues:
        """The function on gathered columns; cross entropy and metrics on this rank's."""
        loss, kernel = self.loss, backend_for(student_Cv)
        kd_C, grad_Cv = self._divergence(student_Cv, teacher_Cv, tokens, shard, with_grad=with_grad)
        record_CR = kernel.stats(loss, student_Cv, teacher_Cv, tokens)
        record_CR = merge(gather_shards(record_CR, shard), tokens)
        if with_grad:
            rest = replace(tokens, kd_weight_N=torch.zeros_like(tokens.kd_weight_N))
            # Added before the one rounding to the logits' type.
            exact_Cv = student_Cv.to(grad_Cv.dtype)
            kernel.grad_(loss, exact_Cv, teacher_Cv, rest, record_CR, None)
            exact_Cv[:, : shard.local_valid] += grad_Cv
            if exact_Cv is not student_Cv:
                student_Cv.copy_(exact_Cv)
        return replace(values(loss, record_CR, None, tokens), kd=kd_C.to(record_CR.dtype))

    def _divergence(
        self,
        student_Cv: torch.Tensor,
        teacher_Cv: torch.Tensor,
        tokens: Tokens,
        shard: VocabShard,
        *,
        with_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(values [C], their weighted gradient in this rank's real columns)."""
        active_C1 = tokens.active[:, None]
        # Logits of tokens that do not count may be anything; their place is taken by zeros.
        student_CV = torch.where(active_C1, _whole(student_Cv, shard), 0)
        teacher_CV = torch.where(active_C1, _whole(teacher_Cv, shard), 0).to(student_CV.dtype)
        teacher_CV *= tokens.teacher_scale_N[:, None]
        with torch.set_grad_enabled(with_grad):
            student_CV.requires_grad_(with_grad)
            scaled_CV = student_CV * tokens.student_scale_N[:, None]
            kd_C = torch.where(
                tokens.active, self.function(scaled_CV, teacher_CV, tokens.labels_N), 0
            )
            grad_CV = student_CV
            if with_grad:
                (grad_CV,) = torch.autograd.grad((kd_C * tokens.kd_weight_N).sum(), student_CV)
                # Where the function has no derivative (two equal distributions), 0 times it is NaN.
                grad_CV = torch.where(active_C1, grad_CV, 0)
        return kd_C.detach(), grad_CV[:, shard.first : shard.first + shard.local_valid]


def _dense(signal: Signal) -> torch.Tensor | None:
    assert not isinstance(signal, SparseTargets), "this loss needs all of a teacher's logits"
    return signal


def rows_at_once(logits_Cv: torch.Tensor, shard: VocabShard) -> int:
    """Tokens of which a function's copies fill the memory of a chunk; the same on all ranks."""
    width = 8 if logits_Cv.dtype == torch.float64 else 4
    return max(1, CHUNK_BYTES[logits_Cv.device.type] // (_COPIES * shard.valid * width))


def _whole(logits_Cv: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """All real columns [C, V] in fp32 or fp64; a copy."""
    columns = gather_shards(logits_Cv, shard).transpose(0, 1).flatten(1)[:, : shard.valid]
    dtype = torch.float64 if logits_Cv.dtype == torch.float64 else torch.float32
    return columns.to(dtype, copy=True)
