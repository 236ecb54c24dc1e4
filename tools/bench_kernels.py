"""Cases of the token losses, on the CPU and on a GPU if there is one: the suite `kernels`.

From logits that exist, here; ``linear-...`` from hidden states (`bench_linear`), ``...-sparse-...``
of a teacher of whom some tokens are known (`bench_sparse`). Every contestant gets the same logits
(like those of a trained pair: never zeros) and does the same work: the loss and its gradient for
the student's logits. Ours overwrites the student's logits; whoever differentiates gets a leaf made
before the clock starts.

The limit is to move every byte once: ``student += teacher``, 6 bytes a column in bf16 (for cross
entropy alone ``student *= 2``, 4 bytes).
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from bench_core import Bench, CaseFunction, Suite
from bench_linear import CASES as LINEAR_CASES
from bench_loss_forms import Form, Shape, torch_forms
from bench_loss_peers import LOGIT_PEERS, peer_forms
from bench_loss_race import OURS, Entrant, race_losses
from bench_sparse import CASES as SPARSE_CASES

from megatron_miniplm.kernels import backend_for
from megatron_miniplm.kernels.definition import token_losses
from megatron_miniplm.kernels.record import values

_CHECKED_ROWS = 8  # against fp64: all rows of all sizes would need tens of gigabytes
_EVERY_BYTE = "every byte moved once"


class Problem:
    """The logits of a shape, and what has to come out for some of the rows."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        generator = torch.Generator(shape.device).manual_seed(1)
        size = (shape.rows, shape.vocabulary)
        random = functools.partial(torch.randn, size, generator=generator, device=shape.device)
        self.student = random().mul_(2.5)
        self.teacher = random().add_(self.student, alpha=0.7).to(shape.dtype)
        self.student = self.student.to(shape.dtype)
        self.labels = shape.labels(generator)
        self.loss, self.tokens = shape.loss, shape.tokens(self.labels)
        self.overwritten = self.student.clone()
        self.leaf = self.student

    def restore(self) -> None:
        """The logits that ours, or the limit, has overwritten."""
        self.overwritten.copy_(self.student)

    def new_leaf(self) -> None:
        """Student logits without a gradient; a copy, since some peers overwrite them."""
        self.leaf = self.student
        self.leaf = self.student.clone().requires_grad_()

    @functools.cached_property
    def exact(self) -> torch.Tensor:
        """Gradient of the first rows in fp64, by the definition."""
        some = slice(0, _CHECKED_ROWS)
        student = self.student[some].double().requires_grad_()
        losses = token_losses(
            self.loss, student, self.teacher[some].double(), self.tokens.rows(some)
        )
        (gradient,) = torch.autograd.grad(losses.sum(), student)
        return gradient

    def error(self, gradient: torch.Tensor) -> float:
        """Norm of the error over the norm of the gradient, of the first rows."""
        wrong = gradient[:_CHECKED_ROWS].double() - self.exact
        return float(wrong.norm() / self.exact.norm())


def _ours(problem: Problem) -> torch.Tensor:
    teacher = problem.teacher if problem.loss.divergence else None
    record, inner = backend_for(problem.overwritten).fused_(
        problem.loss, problem.overwritten, teacher, problem.tokens
    )
    found = values(problem.loss, record, inner, problem.tokens)
    found.weighted(problem.loss, problem.tokens).sum()  # the peers' clocks run over theirs, too
    return problem.overwritten


def _every_byte(problem: Problem) -> torch.Tensor:
    if problem.loss.divergence is None:
        return problem.overwritten.mul_(2)
    return problem.overwritten.add_(problem.teacher)


def _differentiated(problem: Problem, form: Form) -> torch.Tensor:
    result: Any = form(problem.leaf, problem.teacher, problem.labels)
    if isinstance(result, tuple):  # of a peer that gives the gradient itself
        return result[1]
    result.backward()
    assert problem.leaf.grad is not None, "the loss does not depend on the student"
    return problem.leaf.grad


def _race(bench: Bench, shape: Shape) -> None:
    problem = Problem(shape)
    entrants = {
        OURS: Entrant(run=functools.partial(_ours, problem), prepare=problem.restore),
        _EVERY_BYTE: Entrant(run=functools.partial(_every_byte, problem), prepare=problem.restore),
    }
    forms = torch_forms(shape, bench) | peer_forms(LOGIT_PEERS, shape, bench)
    for name, form in forms.items():
        run = functools.partial(_differentiated, problem, form)
        entrants[name] = Entrant(run=run, prepare=problem.new_leaf)
    race_losses(
        bench, shape.device, entrants, limit=_EVERY_BYTE, error=problem.error,
        work=f"loss and gradient of {shape.rows} tokens", memory="memory beside the logits",
    )  # fmt: skip


def _case(shape: Shape) -> CaseFunction:
    def run(bench: Bench) -> None:
        if shape.device == "cuda" and not torch.cuda.is_available():
            bench.skip("there is no GPU")
            return
        _race(bench, replace(shape, rows=9, vocabulary=1031) if bench.sizes.quick else shape)

    return run


def _shapes() -> list[Shape]:
    """The table of benchmarks/README.md, the other losses at one size, and the same on a GPU."""
    float32, bf16 = torch.float32, torch.bfloat16
    mixes: list[dict[str, Any]] = [{}, {"temperature": 2.0, "alpha": 0.5}]
    others: list[dict[str, Any]] = [
        {"divergence": each} for each in ("reverse_kl", "jsd", "mse_logits", None)
    ]
    cpu = [
        Shape(device="cpu", rows=512, vocabulary=vocabulary, dtype=dtype, **mix)
        for vocabulary in (49152, 151936)
        for dtype in (float32, bf16)
        for mix in mixes
    ]
    cpu += [
        Shape(device="cpu", rows=512, vocabulary=49152, dtype=float32, **each) for each in others
    ]
    gpu = [
        Shape(device="cuda", rows=8192, vocabulary=vocabulary, dtype=bf16, **mix)
        for vocabulary in (32768, 151936)
        for mix in mixes
    ]
    gpu += [
        Shape(device="cuda", rows=8192, vocabulary=151936, dtype=bf16, **each) for each in others
    ]
    return cpu + gpu


SUITE = Suite(
    "kernels", {shape.name: _case(shape) for shape in _shapes()} | LINEAR_CASES | SPARSE_CASES
)
