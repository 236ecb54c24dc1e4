"""Cases of a teacher of whom 100 tokens are known, for the suite `kernels`: ``...-sparse-...``.

As `bench_kernels`: logits that exist, the loss and its gradient, half of it cross entropy. The
peers are what one writes in torch: log-probabilities of the whole row, gathered, and autograd. For
the residual it takes the logarithm of 1 - p_S as that difference, bounded; ours is a sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from bench_core import Bench, CaseFunction
from bench_loss_forms import UPSTREAM
from bench_loss_race import OURS, Entrant, race_losses

from megatron_miniplm.kernels import sparse_backend_for
from megatron_miniplm.kernels.sparse_definition import sparse_losses
from megatron_miniplm.kernels.sparse_loss import SparseForm, SparseLoss, SparseTargets
from megatron_miniplm.kernels.sparse_record import values
from megatron_miniplm.kernels.token_loss import Tokens

_CHECKED_ROWS = 8
_EVERY_BYTE = "every byte moved once"
_ALPHA = 0.5


@dataclass(frozen=True, kw_only=True)
class SparseShape:
    """One problem."""

    device: str
    rows: int
    vocabulary: int
    dtype: torch.dtype
    form: SparseForm
    entries: int = 100

    @property
    def name(self) -> str:
        """As ``--case`` takes it."""
        bits = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        form = self.form.replace("_", "-")
        return f"{self.device}-sparse-{self.vocabulary}-{bits}-{form}-k{self.entries}"


class Problem:
    """Logits, a teacher's largest probabilities, and the gradient of some rows in fp64."""

    def __init__(self, shape: SparseShape) -> None:
        generator = torch.Generator(shape.device).manual_seed(1)
        size = (shape.rows, shape.vocabulary)
        random = functools.partial(torch.randn, size, generator=generator, device=shape.device)
        self.student = random().mul_(2.5)
        teacher = random().add_(self.student, alpha=0.7)
        probs, ids = teacher.softmax(-1).topk(shape.entries)
        self.student = self.student.to(shape.dtype)
        self.ids = ids
        self.targets = SparseTargets(ids_NK=ids.int(), probs_NK=probs, tail_N=1 - probs.sum(-1))
        self.labels = torch.randint(
            0, shape.vocabulary, (shape.rows,), generator=generator, device=shape.device
        )
        each = UPSTREAM / shape.rows
        self.tokens = Tokens.of(
            self.labels, kd_weight=_ALPHA * each, ce_weight=(1 - _ALPHA) * each,
            valid=shape.vocabulary,
        )  # fmt: skip
        self.loss = SparseLoss(form=shape.form)
        self.overwritten = self.student.clone()
        self.leaf = self.student

    def restore(self) -> None:
        """The logits that ours, or the limit, has overwritten."""
        self.overwritten.copy_(self.student)

    def new_leaf(self) -> None:
        """Student logits without a gradient."""
        self.leaf = self.student.clone().requires_grad_()

    def error(self, gradient: torch.Tensor) -> float:
        """Norm of the error over the norm of the gradient, of the first rows."""
        some = slice(0, _CHECKED_ROWS)
        student = self.student[some].double().requires_grad_()
        losses = sparse_losses(self.loss, student, self.targets.rows(some), self.tokens.rows(some))
        (exact,) = torch.autograd.grad(losses.sum(), student)
        return float((gradient[some].double() - exact).norm() / exact.norm())

    def ours(self) -> torch.Tensor:
        """Loss and gradient by the kernels."""
        backend = sparse_backend_for(self.overwritten)
        record = backend.fused_(self.loss, self.overwritten, self.targets, self.tokens)
        values(self.loss, record, self.targets, self.tokens).weighted(self.loss, self.tokens).sum()
        return self.overwritten

    def differentiated(self, form: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Loss and gradient by autograd."""
        weights, tail = self.targets.probs_NK, self.targets.tail_N
        form(self.leaf, self.ids, weights, tail, self.labels).backward()
        assert self.leaf.grad is not None, "the loss does not depend on the student"
        return self.leaf.grad


def support_form(
    student: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tail: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Sum w (log w - log p) over the support."""
    log_p = F.log_softmax(student.float(), -1)
    kl = (weights * (weights.log() - log_p.gather(-1, ids))).sum(-1)
    return _mixed(kl, log_p, labels)


def residual_form(
    student: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tail: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """The same with all other tokens as one."""
    log_p = F.log_softmax(student.float(), -1)
    on = log_p.gather(-1, ids)
    rest = (1 - on.exp().sum(-1)).clamp_min(1e-7)
    kl = (weights * (weights.log() - on)).sum(-1) + tail * (tail.log() - rest.log())
    return _mixed(kl, log_p, labels)


def _mixed(kl: torch.Tensor, log_p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    nll = -log_p.gather(-1, labels[:, None])[:, 0]  # of the same log-softmax: the temperature is 1
    return (_ALPHA * kl + (1 - _ALPHA) * nll).mean() * UPSTREAM


_FORMS = {"support": support_form, "residual": residual_form}


def _race(bench: Bench, shape: SparseShape) -> None:
    problem = Problem(shape)
    entrants = {
        OURS: Entrant(run=problem.ours, prepare=problem.restore),
        _EVERY_BYTE: Entrant(
            run=lambda: problem.overwritten.mul_(2),
            prepare=problem.restore,
        ),
    }
    forms: dict[str, Callable[..., torch.Tensor]] = {"torch eager": _FORMS[shape.form]}
    if bench.sizes.quick:
        bench.skip("torch.compile: compiling takes longer than a quick run")
    else:
        torch._dynamo.reset()  # after 8 shapes it would fall back to eager without a word
        forms["torch.compile of it"] = torch.compile(_FORMS[shape.form], dynamic=False)
    for name, form in forms.items():
        run = functools.partial(problem.differentiated, form)
        entrants[name] = Entrant(run=run, prepare=problem.new_leaf)
    race_losses(
        bench, shape.device, entrants, limit=_EVERY_BYTE, error=problem.error,
        work=f"loss and gradient of {shape.rows} tokens", memory="memory beside the logits",
    )  # fmt: skip


def _case(shape: SparseShape) -> CaseFunction:
    def run(bench: Bench) -> None:
        if shape.device == "cuda" and not torch.cuda.is_available():
            bench.skip("there is no GPU")
            return
        _race(bench, replace(shape, rows=9, vocabulary=1031) if bench.sizes.quick else shape)

    return run


_SHAPES = [
    *(
        SparseShape(device="cpu", rows=256, vocabulary=vocabulary, dtype=dtype, form="residual")
        for vocabulary in (49152, 151936)
        for dtype in (torch.float32, torch.bfloat16)
    ),
    SparseShape(device="cpu", rows=256, vocabulary=49152, dtype=torch.float32, form="support"),
    *(
        SparseShape(
            device="cuda", rows=8192, vocabulary=vocabulary, dtype=torch.bfloat16, form="residual"
        )
        for vocabulary in (49152, 151936)
    ),
]
CASES = {shape.name: _case(shape) for shape in _SHAPES}
