"""A divergence that is only a torch function: masked tokens, and one rounding of its gradient."""

from __future__ import annotations

import torch

from megatron_miniplm.kernels.definition import token_losses
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens
from megatron_miniplm.models.logit_loss import FunctionLoss
from megatron_miniplm.parallel.vocab import VocabShard

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
    assert not found.kd_N[::5].any()


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
