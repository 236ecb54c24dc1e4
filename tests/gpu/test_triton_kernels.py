"""The Triton kernels on a device: the contract of all token losses, and what no interpreter shows.

One command on a machine with a GPU, from the project's root: ``python -m pytest tests/gpu -n 8``
(most of the time goes into compiling); then ``-k faster -s``, alone on the device, prints the times
that `triton_loss.MEASURED_MS` is filled from.
"""

# ruff: noqa: F811 - the contract's fixture `loss` is imported by its name

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.kernels import backend_for, record, reference, triton_loss
from megatron_miniplm.kernels.choice import VARIABLE
from megatron_miniplm.kernels.token_loss import DIVERGENCES, TokenLoss, Tokens
from tests.contracts.test_token_losses import (
    loss,  # noqa: F401
    test_a_split_batch_is_the_batch_bit_for_bit,  # noqa: F401
    test_a_teacher_may_rule_columns_out,  # noqa: F401
    test_a_token_without_weight_is_not_read_and_its_gradient_is_exactly_zero,  # noqa: F401
    test_columns_beyond_the_real_ones_are_not_read_and_have_no_gradient,  # noqa: F401
    test_rows_may_lie_apart,  # noqa: F401
    test_shards_merged_are_the_whole_vocabulary,  # noqa: F401
    test_values_and_gradients_are_those_of_the_definition,  # noqa: F401
)
from tests.pool import PROJECT
from tests.token_losses import Arithmetic

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

VOCABULARY, PADDED = 151_936, 152_064
FORMS = [None, *DIVERGENCES]


def on_device(value):
    """Tensors and `Tokens` of the contract's problems, on the device."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, Tokens):
        tensors = {name: item for name, item in vars(value).items() if hasattr(item, "cuda")}
        return replace(value, **{name: item.cuda() for name, item in tensors.items()})
    return value


class OnDevice:
    """A backend for problems on the CPU that solves them on the device."""

    def __init__(self, variant: str, fused_: Callable) -> None:
        self.variant = variant
        self._fused = fused_

    def stats(self, *arguments):
        return triton_loss.stats(*map(on_device, arguments)).cpu()

    def inner(self, *arguments):
        return triton_loss.inner(*map(on_device, arguments)).cpu()

    def grad_(self, loss, student, *arguments):
        self._in_place(triton_loss.grad_, loss, student, *arguments)

    def fused_(self, loss, student, *arguments):
        merged, inner = self._in_place(self._fused, loss, student, *arguments)
        return merged.cpu(), None if inner is None else inner.cpu()

    @staticmethod
    def _in_place(kernel, loss, student, *arguments):
        moved = on_device(student)
        found = kernel(loss, moved, *map(on_device, arguments))
        student.copy_(moved)
        return found


@pytest.fixture(
    params=[
        Arithmetic(backend=OnDevice(variant, fused_), dtype=dtype)
        for variant, fused_ in (
            ("two-pass", triton_loss.two_pass_),
            ("one-read", triton_loss.one_read_),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ],
    ids=str,
)
def arithmetic(request) -> Arithmetic:
    return request.param


def large(
    rows: int, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, Tokens]:
    """Logits of a trained pair over Qwen's vocabulary, NaN in the padding, every fifth row off."""
    torch.manual_seed(seed)
    student = torch.randn(rows, PADDED, device="cuda", dtype=dtype).mul_(2.5)
    teacher = torch.randn(rows, PADDED, device="cuda", dtype=dtype).add_(student, alpha=0.7)
    student[:, VOCABULARY:] = torch.nan
    teacher[:, VOCABULARY:] = torch.nan
    active = (torch.arange(rows, device="cuda") % 5 != 4).float()
    student[active == 0] = torch.nan
    tokens = Tokens.of(
        torch.randint(0, VOCABULARY, (rows,), device="cuda"),
        kd_weight=active * 0.5, ce_weight=active * 0.5, valid=VOCABULARY,
    )  # fmt: skip
    return student, teacher, tokens


FUSED = pytest.mark.parametrize("fused_", [triton_loss.two_pass_, triton_loss.one_read_])


@FUSED
@pytest.mark.parametrize(
    ("count", "form"), [*((8192, form) for form in FORMS), (16384, "forward_kl")]
)
def test_a_batch_of_qwen_is_right_in_sampled_rows(fused_, count, form):
    """16,384 tokens are more logits than 2^31."""
    loss = TokenLoss(divergence=form, z_loss=1e-4)
    student, teacher, tokens = large(count)
    rows = torch.tensor([0, 1, 4, count // 2, count - 3, count - 1], device="cuda")
    few = replace(
        tokens,
        **{name: item[rows] for name, item in vars(tokens).items() if name.endswith("_N")},
    )
    right = student[rows].double()
    right_record, right_inner = reference.fused_(loss, right, teacher[rows].double(), few)
    merged, inner = fused_(loss, student, None if form is None else teacher, tokens)
    found = student[rows].double()
    rounding = (right.bfloat16().double() - right).norm()
    assert (found - right).norm() <= 1.05 * rounding
    values = record.values(loss, merged[rows], None if inner is None else inner[rows], few)
    expected = record.values(loss, right_record, right_inner, few)
    torch.testing.assert_close(
        values.weighted(loss, few).double(), expected.weighted(loss, few), rtol=2e-6, atol=1e-6
    )
    assert not student[:, VOCABULARY:].any()
    assert not student[4::5].any()


@FUSED
@pytest.mark.parametrize("form", [None, "forward_kl", "jsd"])
def test_replays_of_a_captured_graph_follow_its_inputs(fused_, form):
    loss = TokenLoss(divergence=form)
    student, teacher, tokens = large(64)
    work = student.clone()
    fused_(loss, work.clone(), teacher, tokens)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_(loss, work, teacher, tokens)
    for seed in range(3):
        student, new_teacher, _ = large(64, seed=seed)
        teacher.copy_(new_teacher)
        work.copy_(student)
        graph.replay()
        fused_(loss, student, teacher, tokens)
        assert torch.equal(work, student)


@FUSED
def test_no_call_waits_for_the_device(fused_):
    loss = TokenLoss(divergence="jsd")
    student, teacher, tokens = large(8)
    fused_(loss, student.clone(), teacher, tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_(loss, student, teacher, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


MEETINGS = """
import torch
from megatron_miniplm.kernels import triton_loss
from megatron_miniplm.kernels.token_loss import TokenLoss
from tests.gpu.test_triton_kernels import large

student, teacher, tokens = large(257)
other, a = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
for form in ("forward_kl", "jsd"):
    loss = TokenLoss(divergence=form)
    right, work = student.clone(), torch.empty_like(student)
    triton_loss.one_read_(loss, right, teacher, tokens)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for launch in range(2000):
        if {concurrent} and launch % 8 == 0:
            with torch.cuda.stream(other):
                a = (a @ a).clamp_(-1, 1)  # fills the device's multiprocessors
                some = tokens.rows(slice(32))
                triton_loss.one_read_(loss, student[:32].clone(), teacher[:32], some)
        work.copy_(student)
        triton_loss.one_read_(loss, work, teacher, tokens)
        wrong += (work != right).any()
    torch.cuda.synchronize()
    assert wrong.item() == 0, f"{{wrong.item()}} launches of {{form}} gave other bits"
"""


@pytest.mark.parametrize("concurrent", [False, True], ids=["alone", "beside-other-work"])
def test_thousands_of_meetings_end_and_give_the_same_bits(concurrent):
    """In a process of its own, which a deadlock costs no more than the time limit."""
    done = subprocess.run(
        [sys.executable, "-c", MEETINGS.format(concurrent=concurrent)],
        capture_output=True, text=True, cwd=PROJECT, timeout=180, check=False,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("form", FORMS)
def test_the_faster_kernel_is_the_one_that_is_chosen(form, capsys):
    """Prints an entry of `MEASURED_MS`; fails where that table says otherwise by over 3 %."""
    loss = TokenLoss(divergence=form)
    student, teacher, tokens = large(8192)
    tokens = replace(
        tokens,
        kd_weight_N=torch.full_like(tokens.kd_weight_N, 0.5),
        ce_weight_N=torch.full_like(tokens.ce_weight_N, 0.5),
    )
    one_read, two_pass = (
        milliseconds(lambda fused_=fused_: fused_(loss, student, teacher, tokens))
        for fused_ in (triton_loss.one_read_, triton_loss.two_pass_)
    )
    entry = (torch.cuda.get_device_name(), form)
    with capsys.disabled():
        print(f"\n    {entry}: ({one_read:.3f}, {two_pass:.3f}),")
    if entry in triton_loss.MEASURED_MS:
        chosen = triton_loss.fused_
        took = milliseconds(lambda: chosen(loss, student, teacher, tokens))
        assert took <= 1.03 * min(one_read, two_pass)


def milliseconds(call: Callable[[], object], times: int = 20) -> float:
    """Median. The logits are 5 GB, far more than any cache; gradients serve as logits next time."""
    for _ in range(3):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def test_a_kernel_that_is_asked_for_runs_or_says_why_not(monkeypatch):
    logits = torch.randn(2, 4096 * 1000, device="cuda", dtype=torch.bfloat16)
    tokens = Tokens.of(torch.zeros(2, device="cuda").long(), ce_weight=1.0, valid=logits.shape[1])
    monkeypatch.setenv(VARIABLE, "triton-one-read")
    with pytest.raises(ConfigError, match=r"4096000 columns takes 1000 programs at once"):
        backend_for(logits).fused_(TokenLoss(), logits, None, tokens)
    monkeypatch.setenv(VARIABLE, "triton-two-pass")
    backend_for(logits).fused_(TokenLoss(), logits, None, tokens)


def test_compiled_kernels_do_not_spill():
    done = subprocess.run(
        [sys.executable, "tools/inspect_triton.py", "--form", "none", "forward_kl", "jsd"],
        capture_output=True, text=True, cwd=PROJECT, check=False,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
