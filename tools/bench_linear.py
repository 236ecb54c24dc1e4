"""Cases of the chunked head: hidden states x output matrices -> loss, dhidden and dweight.

Ours is `models.head.Head.loss`, as Megatron's schedule calls it: dweight goes into an fp32
``main_grad`` that exists, so it is summed in fp32; peers sum it in the type of the weight unless
their name says otherwise. The error is the larger of dhidden's and dweight's, against fp64 on the
same hidden states and matrices: in bf16, the logits' own rounding is in everybody's.

The limit is the same GEMMs of the same chunks (student's and teacher's logits, dhidden, dweight)
with no loss between them; they are also run uncut, which is what one would do with enough memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bench_core import Bench, CaseFunction
from bench_loss_forms import Form, Shape, torch_forms
from bench_loss_peers import LINEAR_PEERS, peer_forms
from bench_loss_race import OURS, Entrant, race_losses

from megatron_miniplm.kernels import cpu
from megatron_miniplm.kernels.definition import token_losses
from megatron_miniplm.kernels.record import TokenValues
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens
from megatron_miniplm.models.head import Head, Positions
from megatron_miniplm.models.logit_loss import KernelLoss, LogitLoss
from megatron_miniplm.parallel.vocab import VocabShard

_GEMMS, _UNCUT = "its GEMMs alone", "the GEMMs alone, uncut"
_CHECKED_AT_ONCE = 128  # tokens in fp64
_CPU_HAS_BF16 = "avx512_bf16" in cpu.variants()

Gradients = tuple[torch.Tensor, torch.Tensor]
"""(dhidden [N, h], dweight [V, h])."""


@dataclass(frozen=True, kw_only=True)
class LinearShape(Shape):
    """A problem with hidden states of these widths."""

    width: int
    teacher_width: int

    @property
    def name(self) -> str:
        """As ``--case`` takes it."""
        return f"{self.device}-linear-{self.vocabulary}x{self.width}-{self.bits}-{self.loss_name}"


@dataclass(frozen=True)
class NoLoss:
    """Leaves the student's logits as they are, in the place of their gradient."""

    loss: TokenLoss

    def __call__(
        self,
        student_Cv: torch.Tensor,
        teacher_Cv: torch.Tensor | None,
        tokens: Tokens,
        shard: VocabShard,
        *,
        with_grad: bool,
    ) -> TokenValues:
        """Zeros."""
        zero_C = torch.zeros_like(tokens.ce_weight_N)
        return TokenValues(
            kd=zero_C, ce=zero_C, lse=zero_C,
            teacher_entropy=None, teacher_nll=None, agreement=None,
        )  # fmt: skip


class LinearProblem:
    """Hidden states and matrices whose logits are like those of a trained pair: t = 0.7 s + e."""

    def __init__(self, shape: LinearShape) -> None:
        self.shape = shape
        generator = torch.Generator(shape.device).manual_seed(1)
        random = functools.partial(torch.randn, generator=generator, device=shape.device)
        more = shape.teacher_width - shape.width
        hidden = random((shape.rows, shape.width))
        weight = random((shape.vocabulary, shape.width)).mul_(2.5 / shape.width**0.5)
        others = random((shape.vocabulary, more)).div_(more**0.5)
        self.teacher_hidden = torch.cat([hidden, random((shape.rows, more))], -1).to(shape.dtype)
        self.teacher_weight = torch.cat([0.7 * weight, others], -1).to(shape.dtype)
        self.hidden = hidden.to(shape.dtype).requires_grad_()
        weight_vh: Any = weight.to(shape.dtype).requires_grad_()
        weight_vh.main_grad = torch.zeros_like(weight)
        self.weight = weight_vh
        self.labels = shape.labels(generator)
        self.tokens = shape.tokens(self.labels)

    def clear(self) -> None:
        """No gradients."""
        self.hidden.grad = self.weight.grad = None
        self.weight.main_grad.zero_()

    def through_head(self, kind: LogitLoss) -> Gradients:
        """Of ours, with this loss."""
        shard = VocabShard(
            first=0, size=self.shape.vocabulary, valid=self.shape.vocabulary, group=None
        )
        head = Head(
            hidden_sbh=self.hidden[:, None], weight_vh=self.weight, shard=shard, unit_upstream=True
        )
        teacher = None
        if self.shape.divergence:
            teacher = Head(
                hidden_sbh=self.teacher_hidden[:, None], weight_vh=self.teacher_weight, shard=shard
            )
        tokens = self.tokens
        positions = Positions(
            labels_bs=self.labels[None],
            ce_weight=tokens.ce_weight_N[None],
            kd_weight=tokens.kd_weight_N[None],
            student_scale=tokens.student_scale_N[None],
            teacher_scale=tokens.teacher_scale_N[None],
        )
        loss, _ = head.loss(kind, positions, teacher)
        loss.backward()
        return _there(self.hidden.grad), self.weight.main_grad

    def uncut(self) -> Gradients:
        """The GEMMs of whole matrices."""
        with torch.no_grad():
            student = self.hidden @ self.weight.t()
            if self.shape.divergence:
                self.teacher_hidden @ self.teacher_weight.t()
            return student @ self.weight, student.t() @ self.hidden

    def differentiated(self, form: Callable[..., torch.Tensor]) -> Gradients:
        """Of a peer."""
        form(
            self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, self.labels
        ).backward()
        return _there(self.hidden.grad), _there(self.weight.grad)

    @functools.cached_property
    def exact(self) -> Gradients:
        """In fp64, by the definition on some tokens at a time."""
        hidden = self.hidden.detach().double().requires_grad_()
        weight = self.weight.detach().double().requires_grad_()
        teacher_weight = self.teacher_weight.double()
        for start in range(0, self.shape.rows, _CHECKED_AT_ONCE):
            some = slice(start, start + _CHECKED_AT_ONCE)
            teacher = self.teacher_hidden[some].double() @ teacher_weight.t()
            losses = token_losses(
                self.shape.loss, hidden[some] @ weight.t(), teacher, self.tokens.rows(some)
            )
            losses.sum().backward()
        return _there(hidden.grad), _there(weight.grad)

    def error(self, gradients: Gradients) -> float:
        """Norm of the error over the norm of the gradient; the worse of the two."""
        return max(
            float((found - right).norm() / right.norm())
            for found, right in zip(gradients, self.exact, strict=True)
        )


def _there(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None, "the loss does not depend on the student"
    return gradient


def _on_whole_logits(form: Form) -> Callable[..., torch.Tensor]:
    """A form of logits as one of hidden states and matrices."""

    def linear(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        with torch.no_grad():
            teacher = teacher_hidden @ teacher_weight.t()
        return form(hidden @ weight.t(), teacher, labels)

    return linear


def _race(bench: Bench, shape: LinearShape) -> None:
    problem = LinearProblem(shape)
    of_hidden, of_weight = problem.hidden.nbytes, problem.weight.nbytes

    def entrant(run: Callable[[], Gradients], results: int) -> Entrant:
        return Entrant(run=run, prepare=problem.clear, results=results)

    through_head = functools.partial(functools.partial, problem.through_head)
    entrants = {
        OURS: entrant(through_head(KernelLoss(shape.loss)), of_hidden),
        _GEMMS: entrant(through_head(NoLoss(TokenLoss())), of_hidden),
        _UNCUT: entrant(problem.uncut, of_hidden + of_weight),
    }
    forms = torch_forms(shape, bench, _on_whole_logits) | peer_forms(LINEAR_PEERS, shape, bench)
    for name, form in forms.items():
        run = functools.partial(problem.differentiated, form)
        entrants[name] = entrant(run, of_hidden + of_weight)
    race_losses(
        bench, shape.device, entrants, limit=_GEMMS, unranked={_UNCUT}, error=problem.error,
        work=f"loss, dhidden and dweight of {shape.rows} tokens",
        memory="memory beside the gradients",
    )  # fmt: skip


def _case(shape: LinearShape) -> CaseFunction:
    def run(bench: Bench) -> None:
        if shape.device == "cuda" and not torch.cuda.is_available():
            bench.skip("there is no GPU")
            return
        if bench.sizes.quick:
            _race(bench, replace(shape, rows=9, vocabulary=1031, width=16, teacher_width=24))
        elif (shape.device, shape.dtype) == ("cpu", torch.bfloat16) and not _CPU_HAS_BF16:
            bench.skip("products in bf16 take minutes on a CPU that has no instructions for it")
        else:
            _race(bench, shape)

    return run


def _shapes() -> list[LinearShape]:
    """A small model on the CPU; on a GPU that of benchmarks/README.md."""
    small: dict[str, Any] = {
        "device": "cpu", "rows": 512, "vocabulary": 32768, "width": 256, "teacher_width": 512,
        "dtype": torch.float32,
    }  # fmt: skip
    gpu: dict[str, Any] = {
        "device": "cuda", "rows": 8192, "vocabulary": 151936, "width": 1024,
        "teacher_width": 2048, "dtype": torch.bfloat16,
    }  # fmt: skip
    mix: dict[str, Any] = {"temperature": 2.0, "alpha": 0.5}
    variants: list[dict[str, Any]] = [
        small, small | {"dtype": torch.bfloat16}, small | mix | {"masked": 0.3},
        small | {"divergence": None},
        gpu, gpu | {"width": 768}, gpu | mix, gpu | {"masked": 0.3}, gpu | {"divergence": "jsd"},
        gpu | {"divergence": None}, gpu | {"divergence": None, "masked": 0.3},
    ]  # fmt: skip
    return [LinearShape(**each) for each in variants]


CASES = {shape.name: _case(shape) for shape in _shapes()}
