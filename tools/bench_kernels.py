"""Cases of the token losses: logits to loss and gradient, on the CPU and on a GPU if there is one.

Every contestant gets the same logits (like those of a trained pair: never zeros) and does the same
work: the loss and its gradient for the student's logits, averaged over the tokens and multiplied by
an upstream factor that is not 1. Ours overwrites the student's logits; whoever differentiates gets
a leaf made before the clock starts. Its error against fp64 stands beside each time.

The limit is to move every byte once: ``student += teacher``, 6 bytes a column in bf16 (for cross
entropy alone ``student *= 2``, 4 bytes).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_core import Bench, CaseFunction, Clocked, Contestant, Suite, Timing

from megatron_miniplm.kernels import backend_for
from megatron_miniplm.kernels.definition import token_losses
from megatron_miniplm.kernels.record import values
from megatron_miniplm.kernels.token_loss import Divergence, TokenLoss, Tokens

_UPSTREAM = 0.125
_CHECKED_ROWS = 8  # against fp64: all rows of all sizes would need tens of gigabytes
_GPU_RUNS = 10  # a round, between two events each
_EVERY_BYTE = "every byte moved once"


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

    @property
    def name(self) -> str:
        """As ``--case`` takes it."""
        bits = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        what = (self.divergence or "ce").replace("_", "-")
        mixed = f"-t{self.temperature:g}" + ("-ce" if self.alpha < 1 and self.divergence else "")
        return f"{self.device}-{self.vocabulary}-{bits}-{what}{mixed}"


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
        self.labels = torch.randint(
            0, shape.vocabulary, (shape.rows,), generator=generator, device=shape.device
        )
        self.loss = TokenLoss(divergence=shape.divergence)
        each = _UPSTREAM / shape.rows
        self.tokens = Tokens.of(
            self.labels,
            kd_weight=each * shape.alpha * shape.temperature**2 if shape.divergence else 0.0,
            ce_weight=each * (1 - shape.alpha) if shape.divergence else each,
            student_scale=1 / shape.temperature,
            teacher_scale=1 / shape.temperature,
            valid=shape.vocabulary,
        )
        self.overwritten = self.student.clone()
        self.leaf = self.student

    def restore(self) -> None:
        """The logits that ours, or the limit, has overwritten."""
        self.overwritten.copy_(self.student)

    def new_leaf(self) -> None:
        """Student logits without a gradient."""
        self.leaf = self.student.detach().requires_grad_()

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


def _mixed(
    shape: Shape, divergence: torch.Tensor, student: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    loss = shape.alpha * divergence
    if shape.alpha < 1:
        loss = loss + (1 - shape.alpha) * F.cross_entropy(student, labels, reduction="none")
    return loss.mean() * _UPSTREAM


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
    return _mixed(shape, divergence.sum(-1) * shape.temperature**2, student, labels)


def miniplm_form(
    shape: Shape, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Soft-target NLL with the mask of infinite logits (spec/algorithms 7.2); same gradient."""
    probabilities = F.softmax(teacher, -1, dtype=torch.float32)
    log_probabilities = F.log_softmax(student, -1, dtype=torch.float32)
    products = torch.masked_fill(probabilities * log_probabilities, torch.isinf(student), 0)
    return _mixed(shape, -products.sum(-1), student.float(), labels)


def definition_form(
    problem: Problem, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The paper's formula in fp32, for the losses that those two do not have."""
    return token_losses(problem.loss, student.float(), teacher.float(), problem.tokens).sum()


_Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _forms(problem: Problem, bench: Bench) -> dict[str, _Form]:
    """Peers by name: functions of (student, teacher, labels) to a loss."""
    shape = problem.shape
    forms: dict[str, _Form] = {}
    if shape.divergence == "forward_kl":
        forms["torch eager, ModelOpt's form"] = functools.partial(modelopt_form, shape)
        if shape.temperature == 1:
            forms["torch eager, MiniPLM's form"] = functools.partial(miniplm_form, shape)
    else:
        forms["torch eager, the definition"] = functools.partial(definition_form, problem)
    if bench.sizes.quick:
        bench.skip("torch.compile: compiling takes longer than a quick run")
    else:
        torch._dynamo.reset()  # after 8 shapes it would fall back to eager without a word
        eager = next(iter(forms.values()))
        forms["torch.compile of it"] = torch.compile(eager, dynamic=False)
    if _liger_applies(shape, bench):
        forms["Liger JSD, log_softmax included"] = functools.partial(_liger_jsd, shape)
    return forms


def _liger_applies(shape: Shape, bench: Bench) -> bool:
    if shape.divergence not in ("forward_kl", "reverse_kl", "jsd") or shape.alpha < 1:
        return False
    if importlib.util.find_spec("liger_kernel") is None or shape.device != "cuda":
        bench.skip("Liger: needs liger-kernel and a GPU")
        return False
    return True


def _liger_jsd(
    shape: Shape, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Liger's mean over rows; beta 0 is its forward, 1 its reverse KL."""
    module = importlib.import_module("liger_kernel.transformers.jsd")
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[shape.divergence or ""]
    scale = 1 / shape.temperature
    log_p = F.log_softmax(student.float() * scale, -1)
    log_q = F.log_softmax(teacher.float() * scale, -1)
    return module.LigerJSD(beta=beta)(log_p, log_q) * shape.temperature**2 * _UPSTREAM


def _differentiated(problem: Problem, form: _Form) -> torch.Tensor:
    form(problem.leaf, problem.teacher, problem.labels).backward()
    assert problem.leaf.grad is not None, "the loss does not depend on the student"
    return problem.leaf.grad


def _race(bench: Bench, shape: Shape) -> None:
    problem = Problem(shape)
    runs: dict[str, tuple[Callable[[], torch.Tensor], Callable[[], None]]] = {
        "ours": (functools.partial(_ours, problem), problem.restore),
        _EVERY_BYTE: (functools.partial(_every_byte, problem), problem.restore),
    }
    for name, form in _forms(problem, bench).items():
        runs[name] = (functools.partial(_differentiated, problem, form), problem.new_leaf)
    errors, extra = {}, {}
    for name, (run, prepare) in runs.items():  # compiles, warms up, and is checked
        prepare()
        gradient, extra[name] = _with_peak(run, shape.device)
        errors[name] = problem.error(gradient)
        del gradient
    contestants = [
        Contestant(name=name, run=_clocked(run, prepare, shape.device), prepare=[prepare])
        for name, (run, prepare) in runs.items()
    ]
    timings = bench.race(*contestants, work=f"loss and gradient of {shape.rows} tokens")
    _write_rows(bench, timings, errors, extra)


def _write_rows(
    bench: Bench, timings: dict[str, Timing], errors: dict[str, float], extra: dict[str, float]
) -> None:
    def milliseconds(name: str) -> float:
        return timings[name].median * 1e3

    for name in timings:
        if name in ("ours", _EVERY_BYTE):
            continue
        bench.row(
            "loss and gradient", "ms",
            ours=milliseconds("ours"), peer=(name, milliseconds(name)),
            limit=(_EVERY_BYTE, milliseconds(_EVERY_BYTE)), lower_is_better=True,
            error_ours=errors["ours"], error_peer=errors[name],
        )  # fmt: skip
        bench.row(
            "memory beside the logits", "MB",
            ours=extra["ours"] / 1e6, peer=(name, extra[name] / 1e6), lower_is_better=True,
        )  # fmt: skip


def _clocked(
    run: Callable[[], torch.Tensor], prepare: Callable[[], None], device: str
) -> Callable[[], Any]:
    """On a GPU: the median of several runs between events, prepared and not waited for."""
    if device == "cpu":
        return run

    def timed() -> Clocked:
        seconds = []
        for _ in range(_GPU_RUNS):
            prepare()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = run()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        return Clocked(statistics.median(seconds), result)

    return timed


def _with_peak(run: Callable[[], torch.Tensor], device: str) -> tuple[torch.Tensor, float]:
    """The result, and bytes that were needed at once beside what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, float(torch.cuda.max_memory_allocated() - before)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak (Linux)
    before = _status_bytes("VmRSS")
    result = run()
    return result, float(max(0, _status_bytes("VmHWM") - before))


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _case(shape: Shape) -> CaseFunction:
    def run(bench: Bench) -> None:
        if shape.device == "cuda" and not torch.cuda.is_available():
            bench.skip("there is no GPU")
            return
        _race(bench, _quick(shape) if bench.sizes.quick else shape)

    return run


def _quick(shape: Shape) -> Shape:
    return Shape(
        device=shape.device, rows=9, vocabulary=1031, dtype=shape.dtype,
        divergence=shape.divergence, temperature=shape.temperature, alpha=shape.alpha,
    )  # fmt: skip


def _shapes() -> list[Shape]:
    """What issue 4 asks of the CPU, the other losses at one size, and the same on a GPU."""
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


SUITE = Suite("kernels", {shape.name: _case(shape) for shape in _shapes()})
