"""Small problems for token losses, and the two ways every backend solves them.

`solve` uses a backend as one rank does that has the whole vocabulary, `solve_split` as ranks do
that have a shard each; `exact` is autograd of the definition in fp64 on the same inputs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from megatron_miniplm.kernels import Backend, record
from megatron_miniplm.kernels.definition import token_losses
from megatron_miniplm.kernels.token_loss import DIVERGENCES, TokenLoss, Tokens

LOSSES = [
    TokenLoss(),
    TokenLoss(z_loss=0.01),
    *(TokenLoss(divergence=divergence, z_loss=0.01) for divergence in DIVERGENCES),
    *(
        TokenLoss(divergence=divergence, beta=beta)
        for divergence in ("jsd", "skew_kl", "skew_rkl")
        for beta in (0.1, 0.9)
    ),
]


def name(loss: TokenLoss) -> str:
    return f"{loss.divergence or 'ce'}-{loss.beta}-z{loss.z_loss}"


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """A backend and the type of its logits."""

    backend: Backend
    dtype: torch.dtype

    def __str__(self) -> str:
        module = getattr(self.backend, "__name__", "").rpartition(".")[2]
        return f"{module or self.backend.variant}-{str(self.dtype)[6:]}"

    @property
    def tolerance(self) -> float:
        """Of values and of gradients that are not rounded to bf16; of a whole tensor's norm."""
        return 1e-12 if self.dtype == torch.float64 else 2e-6


@dataclass(frozen=True, kw_only=True)
class Problem:
    student_NV: torch.Tensor
    teacher_NV: torch.Tensor
    tokens: Tokens

    def to(self, dtype: torch.dtype) -> Problem:
        teacher_NV = self.teacher_NV.to(dtype)
        return replace(self, student_NV=self.student_NV.to(dtype), teacher_NV=teacher_NV)

    def with_tokens(self, **changes) -> Problem:
        return replace(self, tokens=replace(self.tokens, **changes))


@dataclass(frozen=True, kw_only=True)
class Solution:
    loss_N: torch.Tensor
    grad_NV: torch.Tensor
    values: record.TokenValues | None = None


def problem(
    rows: int, columns: int, valid: int | None = None, *, seed: int = 0, dtype=torch.float64
) -> Problem:
    """Logits like those of a trained pair; every token has its own weights and temperatures."""
    torch.manual_seed(seed)
    valid = columns if valid is None else valid
    student = torch.randn(rows, columns, dtype=torch.float64) * 2.5
    teacher = 0.7 * student + torch.randn(rows, columns, dtype=torch.float64)

    def between(low: float, high: float) -> torch.Tensor:
        return torch.rand(rows, dtype=torch.float32) * (high - low) + low

    scales = torch.tensor([1.0, 0.5, 0.25, 1 / 3, 1.5])  # temperatures 1, 2, 4: special to kernels
    student_scale = scales[torch.arange(rows) % 5]
    tokens = Tokens(
        labels_N=torch.randint(0, valid, (rows,)),
        kd_weight_N=between(0.2, 2.0),
        ce_weight_N=between(0.2, 2.0),
        student_scale_N=student_scale,
        teacher_scale_N=torch.where(torch.rand(rows) < 0.5, student_scale, between(0.4, 1.4)),
        first=0,
        valid=valid,
    )
    return Problem(student_NV=student, teacher_NV=teacher, tokens=tokens).to(dtype)


def exact(loss: TokenLoss, given: Problem) -> Solution:
    student = given.student_NV.double().clone().requires_grad_()
    loss_N = token_losses(loss, student, given.teacher_NV.double(), given.tokens)
    loss_N.sum().backward()
    return Solution(loss_N=loss_N.detach(), grad_NV=student.grad)


def solve(backend: Backend, loss: TokenLoss, given: Problem) -> Solution:
    return _finish(loss, given, given.student_NV.clone(), _fused, backend)


def solve_split(backend: Backend, loss: TokenLoss, given: Problem, cuts: list[int]) -> Solution:
    """`cuts` are the first columns of all shards but the first."""
    return _finish(loss, given, given.student_NV.clone(), _split, backend, cuts)


def _finish(loss, given, student, way, *arguments) -> Solution:
    teacher = None if loss.divergence is None else given.teacher_NV
    merged, inner = way(loss, student, teacher, given.tokens, *arguments)
    values = record.values(loss, merged, inner, given.tokens)
    return Solution(loss_N=values.weighted(loss, given.tokens), grad_NV=student, values=values)


def _fused(loss, student, teacher, tokens, backend):
    return backend.fused_(loss, student, teacher, tokens)


def _split(loss, student, teacher, tokens, backend, cuts):
    bounds = [0, *cuts, student.shape[1]]
    shards = []
    for low, high in itertools.pairwise(bounds):
        valid = max(0, min(high, tokens.valid) - low)
        part = None if teacher is None else teacher[:, low:high]
        shards.append((student[:, low:high], part, replace(tokens, first=low, valid=valid)))
    merged = record.merge(torch.stack([backend.stats(loss, *shard) for shard in shards]), tokens)
    inner = None
    if loss.needs_inner:
        parts = [backend.inner(loss, *shard, merged) for shard in shards]
        inner = record.merge_inner(torch.stack(parts))
    for shard in shards:
        backend.grad_(loss, *shard, merged, inner)
    return merged, inner


def assert_solves(
    arithmetic: Arithmetic, found: Solution, right: Solution, *, ill: float = 1.0
) -> None:
    """Values within the tolerance; gradients, too, or as near as rounding to bf16 allows.

    `ill` multiplies the tolerance. A small divergence is the difference of sums of about 1: its
    error cannot be less than 1e-7 nats a token in fp32.
    """
    fp64 = arithmetic.dtype == torch.float64
    loss_error = (found.loss_N.double() - right.loss_N).norm()
    nats = (1e-15 if fp64 else 1e-7) * len(right.loss_N)
    assert loss_error <= ill * (arithmetic.tolerance * right.loss_N.norm() + nats)
    grad_error = (found.grad_NV.double() - right.grad_NV).norm()
    rounding = (right.grad_NV.bfloat16().double() - right.grad_NV).norm()
    limit = ill * arithmetic.tolerance * right.grad_NV.norm()
    if arithmetic.dtype == torch.bfloat16:
        limit = 1.05 * rounding
    # Where there is one column, what is exact is 0 but for fp64's own rounding.
    assert grad_error <= limit + 1e-15


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    """Norm of the error over the norm of what is right; the former alone where that is 0."""
    error, size = (found.double() - right.double()).norm(), right.double().norm()
    return float(error / size if size > 0 else error)
