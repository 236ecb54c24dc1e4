"""The losses that are raced: their shapes, and how PyTorch programs write them on whole logits.

Every contestant makes the same number: the mean over the tokens that count, alpha of it the
divergence (times T^2) and the rest cross entropy, times an upstream factor that is not 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bench_core import Bench

from megatron_miniplm.kernels.definition import token_losses
from megatron_miniplm.kernels.token_loss import Divergence, TokenLoss, Tokens

UPSTREAM = 0.125
IGNORED = -100  # label of a token that does not count, to all peers

Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(student logits, teacher logits, labels) -> the loss."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One problem; `alpha` is the share of the divergence, the rest is cross entropy."""

    device: str
    rows: int
    vocabulary: int
    dtype: torch.dtype
    divergence: Divergence | None = "forward_kl"
    temperature: float = 1.0
    alpha: float = 1.0
    masked: float = 0.0
    """Share of the tokens that do not count."""

    @property
    def name(self) -> str:
        """As ``--case`` takes it."""
        return f"{self.device}-{self.vocabulary}-{self.bits}-{self.loss_name}"

    @property
    def bits(self) -> str:
        """Of the type."""
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]

    @property
    def loss_name(self) -> str:
        """Of the loss in a case's name."""
        what = (self.divergence or "ce").replace("_", "-")
        mixed = "-ce" if self.alpha < 1 and self.divergence else ""
        masked = f"-masked{self.masked:.0%}".rstrip("%") if self.masked else ""
        return f"{what}-t{self.temperature:g}{mixed}{masked}"

    @property
    def loss(self) -> TokenLoss:
        """In the words of the kernels."""
        return TokenLoss(divergence=self.divergence)

    def labels(self, generator: torch.Generator) -> torch.Tensor:
        """Random, `IGNORED` for the tokens that do not count."""
        labels = torch.randint(
            0, self.vocabulary, (self.rows,), generator=generator, device=self.device
        )
        labels[: round(self.masked * self.rows)] = IGNORED
        return labels[torch.randperm(self.rows, generator=generator, device=self.device)]

    def tokens(self, labels: torch.Tensor) -> Tokens:
        """The weights that make the loss a mean of the tokens that count."""
        counts = (labels != IGNORED).float()
        each = counts * (UPSTREAM / counts.sum())
        return Tokens.of(
            labels,
            kd_weight=each * (self.alpha * self.temperature**2) if self.divergence else 0.0,
            ce_weight=each * (1 - self.alpha) if self.divergence else each,
            student_scale=1 / self.temperature,
            teacher_scale=1 / self.temperature,
            valid=self.vocabulary,
        )


def mixed(
    shape: Shape, divergence: torch.Tensor, student: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The loss out of each token's divergence and the student's logits."""
    counts = labels != IGNORED
    loss = shape.alpha * torch.where(counts, divergence, 0)
    if shape.alpha < 1:
        loss = loss + (1 - shape.alpha) * F.cross_entropy(student, labels, reduction="none")
    return loss.sum() / counts.sum() * UPSTREAM


def cross_entropy_form(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Cross entropy alone, of fp32 logits."""
    return F.cross_entropy(student.float(), labels) * UPSTREAM


def modelopt_form(
    shape: Shape, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """KL of log-softmaxes in fp32 times T^2, as NVIDIA ModelOpt's LogitsDistillationLoss."""
    student, teacher = student.float(), teacher.float()
    divergence = F.kl_div(
        F.log_softmax(student / shape.temperature, -1),
        F.log_softmax(teacher / shape.temperature, -1),
        log_target=True,
        reduction="none",
    )
    return mixed(shape, divergence.sum(-1) * shape.temperature**2, student, labels)


def miniplm_form(
    shape: Shape, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Soft-target NLL with the mask of infinite logits, as in MiniPLM's code; same gradient."""
    probabilities = F.softmax(teacher, -1, dtype=torch.float32)
    log_probabilities = F.log_softmax(student, -1, dtype=torch.float32)
    products = torch.masked_fill(probabilities * log_probabilities, torch.isinf(student), 0)
    return mixed(shape, -products.sum(-1), student.float(), labels)


def definition_form(
    shape: Shape, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The paper's formula in fp32, for the losses that those do not have."""
    return token_losses(shape.loss, student.float(), teacher.float(), shape.tokens(labels)).sum()


def torch_forms(
    shape: Shape, bench: Bench, whole: Callable[[Form], Callable[..., torch.Tensor]] = lambda f: f
) -> dict[str, Callable[..., torch.Tensor]]:
    """What PyTorch programs do with whole logits, and the first of them compiled.

    `whole` makes of a form what is to be run, and compiled.
    """
    forms = {name: whole(form) for name, form in _eager_forms(shape).items()}
    if bench.sizes.quick:
        bench.skip("torch.compile: compiling takes longer than a quick run")
        return forms
    torch._dynamo.reset()  # after 8 shapes it would fall back to eager without a word
    return forms | {"torch.compile of it": torch.compile(next(iter(forms.values())), dynamic=False)}


def _eager_forms(shape: Shape) -> dict[str, Form]:
    if shape.divergence is None:
        return {"torch eager": cross_entropy_form}
    if shape.divergence != "forward_kl":
        return {"torch eager, the definition": functools.partial(definition_form, shape)}
    forms: dict[str, Form] = {
        "torch eager, ModelOpt's form": functools.partial(modelopt_form, shape)
    }
    if shape.temperature == 1:
        forms["torch eager, MiniPLM's form"] = functools.partial(miniplm_form, shape)
    return forms
