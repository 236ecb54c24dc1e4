"""Small problems for sparse losses; the same ways to solve them as `tests.token_losses`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from megatron_miniplm.kernels import SparseBackend, sparse_record
from megatron_miniplm.kernels.sparse_definition import sparse_losses
from megatron_miniplm.kernels.sparse_loss import SPARSE_FORMS, SparseLoss, SparseTargets
from megatron_miniplm.kernels.token_loss import Tokens
from tests.token_losses import Problem, Solution
from tests.token_losses import problem as dense_problem

LOSSES = [SparseLoss(form=form, z_loss=0.01) for form in SPARSE_FORMS]


@dataclass(frozen=True, kw_only=True)
class SparseProblem:
    student_NV: torch.Tensor
    targets: SparseTargets
    tokens: Tokens

    def with_tokens(self, **changes) -> SparseProblem:
        return replace(self, tokens=replace(self.tokens, **changes))

    def with_targets(self, **changes) -> SparseProblem:
        return replace(self, targets=replace(self.targets, **changes))


def sparse(given: Problem, entries: int, *, seed: int = 0) -> SparseProblem:
    """Its teacher's largest probabilities, at its temperature; in each row some fewer.

    The label is in the support of some rows and not of others.
    """
    torch.manual_seed(seed)
    tokens = given.tokens
    teacher = given.teacher_NV[:, : tokens.valid].double() * tokens.teacher_scale_N[:, None]
    probs_NK, ids_NK = teacher.softmax(-1).topk(min(entries, tokens.valid))
    rows, count = ids_NK.shape
    if count > 1:  # not in the order of their weights, and without the last 0, 1, 2, 3 of a row
        order = torch.rand(rows, count).argsort(-1)
        probs_NK, ids_NK = probs_NK.gather(-1, order), ids_NK.gather(-1, order)
        left_out = torch.arange(count) >= count - torch.arange(rows)[:, None] % 4
        left_out &= count > 4
        probs_NK, ids_NK = probs_NK.masked_fill(left_out, 0), ids_NK.masked_fill(left_out, -1)
    targets = SparseTargets(
        ids_NK=ids_NK.int(),
        probs_NK=probs_NK.float(),
        tail_N=(1 - probs_NK.sum(-1)).clamp_min(0).float(),
    )
    return SparseProblem(student_NV=given.student_NV, targets=targets, tokens=tokens)


def problem(
    rows: int, columns: int, valid: int | None = None, *, entries: int = 8, dtype=torch.float64
) -> SparseProblem:
    return sparse(dense_problem(rows, columns, valid, dtype=dtype), entries)


def exact(loss: SparseLoss, given: SparseProblem) -> Solution:
    student = given.student_NV.double().clone().requires_grad_()
    loss_N = sparse_losses(loss, student, given.targets, given.tokens)
    loss_N.sum().backward()
    return Solution(loss_N=loss_N.detach(), grad_NV=student.grad)


def solve(backend: SparseBackend, loss: SparseLoss, given: SparseProblem) -> Solution:
    student = given.student_NV.clone()
    return _solution(
        loss, given, backend.fused_(loss, student, given.targets, given.tokens), student
    )


def solve_split(
    backend: SparseBackend, loss: SparseLoss, given: SparseProblem, cuts: list[int]
) -> Solution:
    """`cuts` are the first columns of all shards but the first."""
    student, tokens = given.student_NV.clone(), given.tokens
    shards = []
    for low, high in itertools.pairwise([0, *cuts, student.shape[1]]):
        valid = max(0, min(high, tokens.valid) - low)
        shard = student[:, low:high], given.targets, replace(tokens, first=low, valid=valid)
        shards.append(shard)
    records = torch.stack([backend.stats(loss, *shard) for shard in shards])
    assert torch.equal(student.nan_to_num(7), given.student_NV.nan_to_num(7)), "logits only read"
    record = sparse_record.merge(records, tokens)
    for shard in shards:
        backend.grad_(loss, *shard, record)
    return _solution(loss, given, record, student)


def _solution(loss, given, record, student) -> Solution:
    values = sparse_record.values(loss, record, given.targets, given.tokens)
    return Solution(loss_N=values.weighted(loss, given.tokens), grad_NV=student, values=values)
