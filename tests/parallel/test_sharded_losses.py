"""Every KD loss over a divided vocabulary: the whole one's values and gradients, counted calls."""

from __future__ import annotations

import pytest
import torch

from megatron_miniplm import objectives
from megatron_miniplm.core.registry import Registry
from megatron_miniplm.kernels.sparse_loss import SPARSE_FORMS, SparseLoss, SparseTargets
from megatron_miniplm.kernels.token_loss import TokenLoss
from megatron_miniplm.models.head import Head, Positions
from megatron_miniplm.models.logit_loss import (
    FunctionLoss,
    KernelLoss,
    LogitLoss,
    SparseKernelLoss,
)
from megatron_miniplm.objectives.kd_losses import KD_LOSSES
from megatron_miniplm.parallel.vocab import VocabShard
from tests.pool import RankPool

Registry.discover(objectives)

S, B, H, COLUMNS, REAL = 9, 3, 8, 28, 20  # of 4 ranks the last one has no real column
TOLERANCE = 2e-6  # fp32, relative to the largest
# bf16: how much further from fp64 than what the roundings to bf16 alone do (`rounded`). Sums in
# fp32 may round a number that lies half-way to the other side, here and there.
OF_ROUNDING = 1.05
MIXTURES = ("jsd", "skew_kl", "skew_rkl", "tvd", "brier")


def forward_kl(student_CV, teacher_CV, labels_C):
    """What a user would write; must be found by pickle in the ranks."""
    log_p, log_q = student_CV.log_softmax(-1), teacher_CV.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def kinds() -> dict[str, LogitLoss]:
    """Cross entropy, every KD loss, dense and sparse, and a function that a kernel computes."""
    found: dict[str, LogitLoss] = {"cross entropy": KernelLoss(TokenLoss(z_loss=0.01))}
    for name in KD_LOSSES.names():
        loss = KD_LOSSES[name]
        found[name] = (
            FunctionLoss(loss, z_loss=0.01)
            if callable(loss)
            else KernelLoss(TokenLoss(divergence=loss, beta=0.25, z_loss=0.01))
        )
    for form in SPARSE_FORMS:
        found[f"sparse {form}"] = SparseKernelLoss(SparseLoss(form=form, z_loss=0.01))
    return found | {"forward_kl as a function": FunctionLoss(forward_kl, z_loss=0.01)}


def make() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Hidden states and output matrices of two models; labels, weights, a temperature a token."""
    torch.manual_seed(0)
    models = {
        "hidden": torch.randn(S, B, H), "weight": torch.randn(COLUMNS, H),
        "teacher_hidden": torch.randn(S, B, H + 4), "teacher_weight": torch.randn(COLUMNS, H + 4),
    }  # fmt: skip
    # Columns that are not real may hold anything.
    models["weight"][REAL:] = models["teacher_weight"][REAL:] = 1e3
    positions = {
        "labels_bs": torch.randint(0, REAL, (B, S)), "ce_weight": torch.rand(B, S),
        "kd_weight": torch.rand(B, S), "student_scale": 0.5 + torch.rand(B, S),
        "teacher_scale": 0.5 + torch.rand(B, S),
    }  # fmt: skip
    for name in ("ce_weight", "kd_weight"):
        positions[name].view(-1)[::5] = 0
    return models, positions


def targets() -> SparseTargets:
    """Six entries a token, of the first of four ranks alone every seventh; some rows have fewer."""
    torch.manual_seed(1)
    probs, ids = (2 * torch.randn(S * B, REAL)).softmax(-1).topk(6)
    ids[::7] = torch.randperm(7)[:6]
    ids[1::4, 4:] = -1
    probs = torch.where(ids >= 0, probs, 0)
    return SparseTargets(ids_NK=ids.int(), probs_NK=probs, tail_N=1 - probs.sum(-1))


def rounded(kind: LogitLoss, models, positions, world: int) -> dict[str, torch.Tensor]:
    """In fp64, rounded to bf16 where ranks store bf16: logits, their gradient, what comes of it."""

    def bf16(value: torch.Tensor) -> torch.Tensor:
        return value.bfloat16().double()

    exact = {name: tensor.double() for name, tensor in models.items()}
    hidden, weight = exact["hidden"].flatten(0, 1), exact["weight"]
    shard = VocabShard(first=0, size=COLUMNS, valid=REAL, group=None)
    tokens = Positions(**positions).tokens(shard)
    student = bf16(hidden @ weight.t())
    teacher = bf16(exact["teacher_hidden"].flatten(0, 1) @ exact["teacher_weight"].t())
    signal = targets() if isinstance(kind, SparseKernelLoss) else teacher
    found = kind(student, signal, tokens, shard, with_grad=True)
    gradient = bf16(student)
    parts = zip(gradient.chunk(world, 1), weight.chunk(world), strict=True)
    return {
        "loss": found.weighted(kind.loss, tokens).sum(),
        "hidden": bf16(sum(bf16(g @ w) for g, w in parts)).view(S, B, H),
        "weight": bf16(gradient.t() @ hidden),
    }


def whole(kind: LogitLoss, models, positions) -> dict[str, torch.Tensor]:
    """Loss and gradients of one shard that is the vocabulary, in fp64."""
    exact = {name: tensor.double() for name, tensor in models.items()}
    hidden, weight = exact["hidden"].requires_grad_(), exact["weight"].requires_grad_()
    shard = VocabShard(first=0, size=COLUMNS, valid=REAL, group=None)
    teacher = Head(
        hidden_sbh=exact["teacher_hidden"], weight_vh=exact["teacher_weight"], shard=shard
    )
    head = Head(hidden_sbh=hidden, weight_vh=weight, shard=shard)
    signal = targets() if isinstance(kind, SparseKernelLoss) else teacher
    loss, _ = head.loss(kind, Positions(**positions), signal)
    loss.backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}


@pytest.mark.parametrize("world", [2, 4])
def test_a_divided_vocabulary_gives_the_losses_of_the_whole_one(world: int, pool: RankPool) -> None:
    models, positions = make()
    ranks = pool.run(
        "tests.parallel.jobs:sharded_losses", world,
        models=models, positions=positions, real=REAL, kinds=kinds(), targets=targets(),
    )  # fmt: skip
    for name, kind in kinds().items():
        expected = whole(kind, models, positions)
        parts = [rank[name] for rank in ranks]
        found = {"weight": torch.cat([part["weight"] for part in parts])}
        for part in parts:
            for what, value in (part | found).items():
                if what != "collectives":
                    scale = float(expected[what].abs().max())
                    worst = float((value - expected[what]).abs().max())
                    assert worst <= TOLERANCE * scale, f"{name}: {what} is off by {worst / scale}"
        gathers = {"cross entropy": 1} | dict.fromkeys(MIXTURES, 2)
        if not isinstance(kind, FunctionLoss):
            # The one of the backward pass sums the gradient of the hidden states.
            assert {part["collectives"] for part in parts} == {(gathers.get(name, 1), 1)}, name


def test_a_divided_vocabulary_in_bf16_is_as_right_as_bf16_can_be(pool: RankPool) -> None:
    """Of two ranks: in which order more of them add their dhidden, and round, is not ours."""
    models, positions = make()
    models = {name: tensor.bfloat16() for name, tensor in models.items()}
    ranks = pool.run(
        "tests.parallel.jobs:sharded_losses", 2,
        models=models, positions=positions, real=REAL, kinds=kinds(), targets=targets(),
    )  # fmt: skip
    for name, kind in kinds().items():
        exact, floor = whole(kind, models, positions), rounded(kind, models, positions, 2)
        parts = [rank[name] for rank in ranks]
        found = parts[0] | {"weight": torch.cat([part["weight"] for part in parts])}
        assert torch.equal(parts[0]["hidden"], parts[1]["hidden"])
        for what, right in exact.items():
            error, limit = (float((each - right).norm()) for each in (found[what], floor[what]))
            limit = OF_ROUNDING * limit + TOLERANCE * float(right.norm())
            assert error <= limit, f"{name}: {what} is off by {error}, bf16 by {limit}"


def test_a_step_never_holds_all_logits(pool: RankPool) -> None:
    vocab, tokens = 151_936, 4096
    (grown,) = pool.run("tests.parallel.jobs:memory_of_a_step", 1, vocab=vocab, tokens=tokens)
    whole_matrix = 4 * vocab * tokens
    print(f"\npeak {grown / 1e6:,.0f} MB; one [4096, V] matrix is {whole_matrix / 1e6:,.0f} MB")
    assert grown < whole_matrix / 8
