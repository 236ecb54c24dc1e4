"""The chunked head against float64 autograd over whole logits, and its bound on memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_miniplm.models import head as head_module
from megatron_miniplm.models.head import Head, Positions
from megatron_miniplm.models.logit_loss import KernelLoss
from megatron_miniplm.parallel.vocab import VocabShard

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # bf16: its own rounding is 4e-3


def make(dtype: torch.dtype, *, columns: int = 37, valid: int = 33):
    """(Head, labels, weights) with s = 9, b = 3, h = 8; every fifth position has weight 0."""
    torch.manual_seed(0)
    hidden = torch.randn(9, 3, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(columns, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, valid, (3, 9))
    weights = torch.rand(3, 9)
    weights.view(-1)[::5] = 0
    shard = VocabShard(first=0, size=columns, valid=valid, group=None)
    return Head(hidden_sbh=hidden, weight_vh=weight, shard=shard), labels, weights


def cross_entropy(head: Head, labels: torch.Tensor, weights: torch.Tensor):
    """(summed loss, cross entropy of every position)."""
    loss, values = head.loss(KernelLoss(), Positions(labels_bs=labels, ce_weight=weights))
    return loss, values.ce_N


def reference(head: Head, labels: torch.Tensor, weights: torch.Tensor):
    """(loss, nll_bs, dhidden, dweight) in float64, over the real columns of whole logits."""
    hidden = head.hidden_sbh.detach().double().requires_grad_()
    weight = head.weight_vh.detach().double().requires_grad_()
    logits = (hidden @ weight.t())[..., : head.shard.valid].transpose(0, 1)
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    nll = nll.view(labels.shape)
    loss = (nll * weights).sum()
    loss.backward()
    return loss.detach(), nll.detach(), hidden.grad, weight.grad


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("chunk_bytes", [1, 37 * 4 * 4, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_equal_float64(
    dtype: torch.dtype, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_module.CHUNK_BYTES, "cpu", chunk_bytes)
    head, labels, weights = make(dtype)
    loss, nll = cross_entropy(head, labels, weights)
    (0.37 * loss).backward()
    expected_loss, expected_nll, grad_hidden, grad_weight = reference(head, labels, weights)
    close(loss.detach(), expected_loss, TOLERANCE[dtype])
    close(nll[weights > 0], expected_nll[weights > 0], TOLERANCE[dtype])
    assert head.hidden_sbh.grad is not None
    assert head.weight_vh.grad is not None
    close(head.hidden_sbh.grad, 0.37 * grad_hidden, TOLERANCE[dtype])
    close(head.weight_vh.grad, 0.37 * grad_weight, TOLERANCE[dtype])


def test_columns_beyond_the_real_vocabulary_have_probability_zero() -> None:
    head, labels, weights = make(torch.float32)
    loss, _ = cross_entropy(head, labels, weights)
    with torch.no_grad():
        head.weight_vh[33:] = 1e4
    poisoned, _ = cross_entropy(head, labels, weights)
    assert torch.equal(loss, poisoned)
    poisoned.backward()
    assert head.weight_vh.grad is not None
    assert not head.weight_vh.grad[33:].any()


def test_positions_of_weight_zero_have_no_loss_and_no_gradient() -> None:
    head, labels, weights = make(torch.float32)
    loss, nll = cross_entropy(head, labels, weights)
    loss.backward()
    assert head.hidden_sbh.grad is not None
    assert not nll[weights == 0].any()
    assert not head.hidden_sbh.grad.transpose(0, 1)[weights == 0].any()


def test_memory_is_bounded_by_the_chunk_and_not_by_the_batch() -> None:
    tokens, columns = 4096, 50_000
    shard = VocabShard(first=0, size=columns, valid=columns, group=None)
    torch.manual_seed(0)
    head = Head(
        hidden_sbh=torch.randn(tokens, 1, 4), weight_vh=torch.randn(columns, 4), shard=shard
    )
    labels = torch.randint(0, columns, (1, tokens))
    with (
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
        torch.no_grad(),
    ):
        cross_entropy(head, labels, torch.ones(1, tokens))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    chunk = head_module.CHUNK_BYTES["cpu"]
    assert largest <= chunk, f"one allocation of {largest} bytes, a chunk is {chunk}"
    assert 4 * tokens * columns > 8 * chunk, "the whole logits must be far larger than a chunk"


class TestMainGrad:
    """Where Megatron keeps an fp32 sum over micro-batches, dweight goes there and nowhere else."""

    def backward(self, dtype: torch.dtype, scale: float, *, unit_upstream: bool) -> Head:
        head, labels, weights = make(dtype)
        head = replace(head, unit_upstream=unit_upstream)
        head.weight_vh.main_grad = torch.full(head.weight_vh.shape, 0.5)
        loss, _ = cross_entropy(head, labels, weights)
        (scale * loss).backward()
        return head

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_is_added_there_in_the_forward_pass(self, dtype: torch.dtype) -> None:
        head = self.backward(dtype, 1.0, unit_upstream=True)
        _, _, _, expected = reference(head, *make(dtype)[1:])
        assert head.weight_vh.grad is None
        close(head.weight_vh.main_grad - 0.5, expected, TOLERANCE[dtype])

    def test_a_loss_that_is_scaled_afterwards_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="scaled after its gradient"):
            self.backward(torch.float32, 0.5, unit_upstream=True)

    def test_without_that_promise_autograd_gets_the_scaled_gradient(self) -> None:
        head = self.backward(torch.float32, 0.5, unit_upstream=False)
        _, _, _, expected = reference(head, *make(torch.float32)[1:])
        assert head.weight_vh.grad is not None
        close(head.weight_vh.grad, 0.5 * expected, TOLERANCE[torch.float32])
        assert (head.weight_vh.main_grad == 0.5).all()

    def test_without_gradients_nothing_is_added(self) -> None:
        head, labels, weights = make(torch.float32)
        head = replace(head, unit_upstream=True)
        head.weight_vh.main_grad = torch.zeros(head.weight_vh.shape)
        with torch.no_grad():  # validation: the parameters still say that they want gradients
            cross_entropy(head, labels, weights)
        assert not head.weight_vh.main_grad.any()
