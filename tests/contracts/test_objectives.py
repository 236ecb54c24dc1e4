"""What every registered objective must do, on random hidden states and a random head."""

from __future__ import annotations

import pytest
import torch

from megatron_miniplm import objectives
from megatron_miniplm.core.registry import Registry
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.models.head import Head
from megatron_miniplm.objectives.objective import OBJECTIVES, token_weights
from megatron_miniplm.parallel.vocab import VocabShard

Registry.discover(objectives)

B, S, H, V = 4, 11, 6, 23
NORMALIZATIONS = ("sequence", "token")

every_objective = pytest.mark.parametrize("name", OBJECTIVES.names())
every_normalization = pytest.mark.parametrize("normalization", NORMALIZATIONS)


def make() -> tuple[torch.Tensor, torch.Tensor, Batch]:
    """(hidden [s, b, h], weight [v, h], batch) with ragged masks and one empty row, fp64."""
    torch.manual_seed(1)
    hidden = torch.randn(S, B, H, dtype=torch.float64)
    weight = torch.randn(V, H, dtype=torch.float64)
    tokens, labels = torch.randint(0, V - 2, (2, B, S))
    mask = torch.rand(B, S) < 0.7
    mask[1, 3:] = False
    mask[2] = False
    return hidden, weight, Batch(tokens, labels, mask, torch.arange(B))


def evaluate(name: str, normalization: str, hidden, weight, batch: Batch):
    """(loss sum, count, gradient of hidden, gradient of weight)."""
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_()
    shard = VocabShard(first=0, size=V, valid=V - 2, group=None)
    head = Head(hidden_sbh=hidden, weight_vh=weight, shard=shard)
    objective = OBJECTIVES[name](normalization)
    output = objective(head, batch)
    assert set(output.metrics) == set(objective.metric_names)
    output.loss_sum.backward()
    return output.loss_sum.detach(), int(output.count), hidden.grad, weight.grad


def rows(batch: Batch, part: slice) -> Batch:
    return Batch(
        batch.tokens_bs[part], batch.labels_bs[part], batch.mask_bs[part], batch.rows_b[part]
    )


@every_objective
@every_normalization
def test_mean_equals_the_definition(name: str, normalization: str) -> None:
    hidden, weight, batch = make()
    loss, count, _, _ = evaluate(name, normalization, hidden, weight, batch)
    logits = (hidden @ weight.t())[..., : V - 2].transpose(0, 1)
    expected = OBJECTIVES[name](normalization).reference(logits, batch)
    # The statistics are summed in fp32 before the mean is said.
    torch.testing.assert_close(loss.double() / count, expected, rtol=1e-6, atol=0)


@every_objective
@every_normalization
def test_splitting_the_batch_changes_nothing(name: str, normalization: str) -> None:
    hidden, weight, batch = make()
    loss, count, grad_hidden, grad_weight = evaluate(name, normalization, hidden, weight, batch)
    parts = [
        evaluate(name, normalization, hidden[:, part], weight, rows(batch, part))
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert sum(part[1] for part in parts) == count
    torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-6, atol=0)
    joined = torch.cat([part[2] for part in parts], dim=1)
    torch.testing.assert_close(joined, grad_hidden, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sum(part[3] for part in parts), grad_weight, rtol=1e-5, atol=1e-6)


@every_objective
@every_normalization
def test_masked_positions_do_not_matter(name: str, normalization: str) -> None:
    hidden, weight, batch = make()
    before = evaluate(name, normalization, hidden, weight, batch)
    hidden[~batch.mask_bs.t()] += 100
    labels = torch.where(batch.mask_bs, batch.labels_bs, 0)
    other = Batch(batch.tokens_bs, labels, batch.mask_bs, batch.rows_b)
    after = evaluate(name, normalization, hidden, weight, other)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not after[2][~batch.mask_bs.t()].any()


@every_objective
@every_normalization
def test_gradient_equals_finite_differences(name: str, normalization: str) -> None:
    hidden, weight, batch = make()
    _, _, grad_hidden, grad_weight = evaluate(name, normalization, hidden, weight, batch)
    torch.manual_seed(2)
    # The loss is said in fp32, so the step is large: error ~ 1e-7 * loss / step + step^2.
    step = 3e-3
    for tensor, grad in ((hidden, grad_hidden), (weight, grad_weight)):
        direction = torch.randn_like(tensor)
        direction /= direction.norm()
        sides = []
        for sign in (1, -1):
            moved = tensor + sign * step * direction
            inputs = (moved, weight) if tensor is hidden else (hidden, moved)
            sides.append(evaluate(name, normalization, *inputs, batch)[0].double())
        expected = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close((grad * direction).sum(), expected, rtol=2e-3, atol=2e-3)


def test_sequence_weights_sum_to_one_per_instance_and_count_instances() -> None:
    _, _, batch = make()
    weights, count = token_weights(batch, "sequence")
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert int(count) == 3


def test_token_weights_are_the_mask_and_count_tokens() -> None:
    _, _, batch = make()
    weights, count = token_weights(batch, "token")
    assert torch.equal(weights, batch.mask_bs.float())
    assert int(count) == int(batch.mask_bs.sum())
