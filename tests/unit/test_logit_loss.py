"""A divergence that is only a torch function: masked tokens, one rounding, and its memory."""

from __future__ import annotations

import pytest
import torch

from megatron_miniplm.kernels.definition import token_losses
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens
from megatron_miniplm.models import logit_loss
from megatron_miniplm.models.logit_loss import FunctionLoss
from megatron_miniplm.objectives.jeffreys import jeffreys
from megatron_miniplm.parallel.vocab import VocabShard
from tests.memory import peak_bytes

N, V, REAL = 16, 999, 990
SHARD = VocabShard(first=0, size=V, valid=REAL, group=None)


def distance(student_CV, teacher_CV, labels_C):
    """Has no derivative where both distributions are equal."""
    return (student_CV.softmax(-1) - teacher_CV.softmax(-1)).square().sum(-1).sqrt()


def forward_kl(student_CV, teacher_CV, labels_C):
    log_p, log_q = student_CV.log_softmax(-1), teacher_CV.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def make(dtype: torch.dtype, alpha: float) -> tuple[torch.Tensor, torch.Tensor, Tokens]:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, N, V).mul(2).to(dtype)
    weights = torch.rand(N)
    weights[::5] = 0
    tokens = Tokens.of(
        torch.randint(0, REAL, (N,)), kd_weight=alpha * weights, ce_weight=(1 - alpha) * weights,
        valid=REAL,
    )  # fmt: skip
    return student, teacher, tokens


def test_a_masked_token_has_no_gradient_even_where_the_function_has_none() -> None:
    student, teacher, tokens = make(torch.float32, 0.5)
    student[0], teacher[0] = float("nan"), float("inf")
    found = FunctionLoss(distance)(student, teacher, tokens, SHARD, with_grad=True)
    assert student.isfinite().all()
    assert not student[::5].any()
    assert student[1::5].any()
    assert not found.kd[::5].any()


def test_the_gradient_in_bf16_is_rounded_once() -> None:
    for alpha in (0.3, 0.5, 0.7):
        student, teacher, tokens = make(torch.bfloat16, alpha)
        exact = student.double().requires_grad_()
        losses = token_losses(
            TokenLoss(divergence="forward_kl"), exact[:, :REAL], teacher[:, :REAL].double(), tokens
        )
        (expected,) = torch.autograd.grad(losses.sum(), exact)
        FunctionLoss(forward_kl)(student, teacher, tokens, SHARD, with_grad=True)
        floor = (expected.bfloat16().double() - expected).norm()
        assert (student.double() - expected).norm() <= 1.05 * floor


@pytest.mark.parametrize("function", [forward_kl, jeffreys])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_function_takes_no_more_memory_than_a_chunks_logits(function, dtype, monkeypatch) -> None:
    """Some tokens at a time; what it takes of those fills the memory that it may have."""
    count, columns, chunk = 256, 4096, 4 << 20
    monkeypatch.setitem(logit_loss.CHUNK_BYTES, "cpu", chunk)
    shard = VocabShard(first=0, size=columns, valid=columns, group=None)
    student, teacher = torch.randn(2, count, columns).to(dtype)
    tokens = Tokens.of(torch.randint(0, columns, (count,)), ce_weight=0.5, valid=columns)
    peak = peak_bytes(
        lambda: FunctionLoss(function)(student, teacher, tokens, shard, with_grad=True), "cpu"
    )
    print(f"{peak / chunk:.2f} of what it may take")
    assert peak <= chunk, f"{peak} bytes of {chunk}"
    assert peak >= 0.6 * chunk, "it is cut smaller than it has to be"
    assert 9 * 4 * count * columns > 8 * chunk, "all tokens at once would take far more"


def test_tokens_some_at_a_time_are_the_tokens_all_at_once(monkeypatch) -> None:
    student, teacher, tokens = make(torch.bfloat16, 0.5)
    whole = student.clone()
    at_once = FunctionLoss(jeffreys)(whole, teacher, tokens, SHARD, with_grad=True)
    monkeypatch.setitem(logit_loss.CHUNK_BYTES, "cpu", 3 * 12 * 4 * REAL)
    some = FunctionLoss(jeffreys)(student, teacher, tokens, SHARD, with_grad=True)
    assert torch.equal(student, whole)
    for name, value in vars(at_once).items():
        assert torch.equal(getattr(some, name), value), name
