"""The chunked head against float64 autograd over whole logits, and its bound on memory.

What a device can do differently takes the fixture `device`; `tests/gpu/test_head.py` runs the same
functions on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.kernels.definition import token_losses
from megatron_miniplm.kernels.sparse_definition import sparse_losses
from megatron_miniplm.kernels.sparse_loss import SparseLoss, SparseTargets
from megatron_miniplm.kernels.token_loss import TokenLoss
from megatron_miniplm.models import head as head_module
from megatron_miniplm.models.head import Head, Positions
from megatron_miniplm.models.logit_loss import KernelLoss, SparseKernelLoss
from megatron_miniplm.parallel.vocab import VocabShard
from tests.memory import peak_bytes

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # bf16: its own rounding is 4e-3
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture
def device() -> str:
    return "cpu"


def make(device: str, dtype: torch.dtype, *, columns: int = 37, valid: int = 33):
    """(Head, labels, weights) with s = 9, b = 3, h = 8; every fifth position has weight 0."""
    torch.manual_seed(0)
    hidden = torch.randn(9, 3, 8).to(device, dtype).requires_grad_()
    weight = torch.randn(columns, 8).to(device, dtype).requires_grad_()
    labels = torch.randint(0, valid, (3, 9)).to(device)
    weights = torch.rand(3, 9)
    weights.view(-1)[::5] = 0
    shard = VocabShard(first=0, size=columns, valid=valid, group=None)
    return Head(hidden_sbh=hidden, weight_vh=weight, shard=shard), labels, weights.to(device)


def cross_entropy(head: Head, labels: torch.Tensor, weights: torch.Tensor):
    """(summed loss, cross entropy of every position)."""
    loss, values = head.loss(KernelLoss(), Positions(labels_bs=labels, ce_weight=weights))
    return loss, values.ce


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
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("chunk_bytes", [1, 37 * 4 * 4, 1 << 20])
@DTYPES
def test_value_and_gradients_equal_float64(
    device: str, dtype: torch.dtype, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_module.CHUNK_BYTES, device, chunk_bytes)
    head, labels, weights = make(device, dtype)
    loss, nll = cross_entropy(head, labels, weights)
    (0.37 * loss).backward()
    expected_loss, expected_nll, grad_hidden, grad_weight = reference(head, labels, weights)
    close(loss.detach(), expected_loss, TOLERANCE[dtype])
    close(nll[weights > 0], expected_nll[weights > 0], TOLERANCE[dtype])
    assert head.hidden_sbh.grad is not None
    assert head.weight_vh.grad is not None
    close(head.hidden_sbh.grad, 0.37 * grad_hidden, TOLERANCE[dtype])
    close(head.weight_vh.grad, 0.37 * grad_weight, TOLERANCE[dtype])


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@DTYPES
def test_a_teacher_of_another_width_gives_the_gradients_of_float64(
    device: str, dtype: torch.dtype, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_module.CHUNK_BYTES, device, 37 * 4 * 10)  # several chunks
    head, labels, weights = make(device, dtype)
    teacher = Head(
        hidden_sbh=torch.randn(9, 3, 12).to(device, dtype),
        weight_vh=torch.randn(37, 12).to(device, dtype), shard=head.shard,
    )  # fmt: skip
    positions = Positions(
        labels_bs=labels, ce_weight=0.5 * weights, kd_weight=2 * weights,
        student_scale=0.5, teacher_scale=0.5,
    )  # fmt: skip
    kind = KernelLoss(TokenLoss(divergence=divergence))
    loss, _ = head.loss(kind, positions, teacher)
    loss.backward()

    hidden = head.hidden_sbh.detach().double().requires_grad_()
    weight = head.weight_vh.detach().double().requires_grad_()
    student, taught = (
        (states @ matrix.t()).flatten(0, 1)
        for states, matrix in (
            (hidden, weight),
            (teacher.hidden_sbh.double(), teacher.weight_vh.double()),
        )
    )
    exact = token_losses(kind.loss, student, taught, positions.tokens(head.shard)).sum()
    exact.backward()
    close(loss.detach(), exact.detach(), TOLERANCE[dtype])
    close(head.hidden_sbh.grad, hidden.grad, TOLERANCE[dtype])
    close(head.weight_vh.grad, weight.grad, TOLERANCE[dtype])


@DTYPES
def test_a_sparse_teachers_targets_are_cut_with_the_tokens(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_module.CHUNK_BYTES, device, 37 * 4 * 5)  # several chunks
    head, labels, weights = make(device, dtype)
    probs, ids = torch.randn(27, 33).softmax(-1).topk(5)
    targets = SparseTargets(
        ids_NK=ids.int().to(device), probs_NK=probs.to(device),
        tail_N=(1 - probs.sum(-1)).to(device),
    )  # fmt: skip
    positions = Positions(
        labels_bs=labels, ce_weight=0.5 * weights, kd_weight=2 * weights, student_scale=0.5
    )
    kind = SparseKernelLoss(SparseLoss(form="residual"))
    loss, values = head.loss(kind, positions, targets)
    loss.backward()

    hidden = head.hidden_sbh.detach().double().requires_grad_()
    weight = head.weight_vh.detach().double().requires_grad_()
    student = (hidden @ weight.t()).flatten(0, 1)
    exact_N = sparse_losses(kind.loss, student, targets, positions.tokens(head.shard))
    exact_N.sum().backward()
    close(loss.detach(), exact_N.sum().detach(), TOLERANCE[dtype])
    close(head.hidden_sbh.grad, hidden.grad, TOLERANCE[dtype])
    close(head.weight_vh.grad, weight.grad, TOLERANCE[dtype])
    found_bs = 2 * weights * values.kd + 0.5 * weights * values.ce
    close(found_bs, exact_N.detach().view(9, 3).t(), TOLERANCE[dtype])


def test_a_step_never_waits_for_the_device(device: str) -> None:
    """On the CPU, there is nothing to wait for; it shows that what a GPU runs can be run."""

    def step() -> None:
        head, labels, weights = made
        head.weight_vh.main_grad = main_grad
        positions = Positions(labels_bs=labels, ce_weight=weights, kd_weight=weights)
        for unit_upstream in (True, False):
            student = replace(head, unit_upstream=unit_upstream)
            loss, _ = student.loss(KernelLoss(TokenLoss(divergence="jsd")), positions, teacher)
            loss.backward()

    made = make(device, torch.bfloat16)
    teacher, _, _ = make(device, torch.bfloat16)
    main_grad = torch.zeros(37, 8, device=device)
    step()  # compiles
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert main_grad.any()


def test_columns_beyond_the_real_vocabulary_have_probability_zero(device: str) -> None:
    head, labels, weights = make(device, torch.float32)
    loss, _ = cross_entropy(head, labels, weights)
    with torch.no_grad():
        head.weight_vh[33:] = 1e4
    poisoned, _ = cross_entropy(head, labels, weights)
    assert torch.equal(loss, poisoned)
    poisoned.backward()
    assert head.weight_vh.grad is not None
    assert not head.weight_vh.grad[33:].any()


def test_positions_of_weight_zero_have_no_loss_and_no_gradient(device: str) -> None:
    head, labels, weights = make(device, torch.float32)
    loss, nll = cross_entropy(head, labels, weights)
    loss.backward()
    assert head.hidden_sbh.grad is not None
    assert not nll[weights == 0].any()
    assert not head.hidden_sbh.grad.transpose(0, 1)[weights == 0].any()


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("first is 0 of the student's and 37 of the teacher's", {"first": 37}),
        ("size is 37 of the student's and 40 of the teacher's", {"size": 40}),
        ("valid is 33 of the student's and 34 of the teacher's", {"valid": 34}),
    ],
)
def test_a_teacher_with_other_columns_is_refused_with_both_values(what, changes) -> None:
    head, labels, weights = make("cpu", torch.float32)
    teacher = replace(head, shard=replace(head.shard, **changes))
    positions = Positions(labels_bs=labels, ce_weight=weights, kd_weight=1.0)
    with pytest.raises(ConfigError, match=what):
        head.loss(KernelLoss(TokenLoss(divergence="jsd")), positions, teacher)


@DTYPES
def test_memory_is_bounded_by_the_chunk_and_not_by_the_batch(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step with gradients: the chunk's logits, dhidden and the gradient of the weight."""
    tokens, columns, width, chunk = 512, 4096, 512, 1 << 19
    monkeypatch.setitem(head_module.CHUNK_BYTES, device, chunk)
    monkeypatch.setattr(head_module, "TILE_BYTES", 1 << 17)
    shard = VocabShard(first=0, size=columns, valid=columns, group=None)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 1, width).to(device, dtype).requires_grad_()
    weight = torch.randn(columns, width).to(device, dtype).requires_grad_()
    weight.main_grad = torch.zeros(columns, width, device=device)
    labels = torch.randint(0, columns, (1, tokens)).to(device)
    head = Head(hidden_sbh=hidden, weight_vh=weight, shard=shard, unit_upstream=True)

    def forward():
        loss, _ = cross_entropy(head, labels, torch.ones(1, tokens, device=device))
        return loss

    if device == "cuda":
        forward()  # compiles, and takes cuBLAS's workspace
    peak = peak_bytes(forward, device) - hidden.nbytes  # dhidden
    print(f"{peak / chunk:.2f} chunks")
    few = 3 << 17  # a chunk's hidden states, a tile, and what there is of every token
    assert peak <= chunk + few, f"{peak} bytes beside dhidden, a chunk is {chunk}"
    assert weight.nbytes >= 4 * (chunk + few), "another dweight would be seen"
    assert hidden.element_size() * tokens * columns >= 4 * (chunk + few), "as would all logits"


@pytest.mark.parametrize("columns", [37, 4099])
def test_a_sum_over_many_chunks_in_bf16_is_rounded_once(
    columns: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the products of the same bf16 gradients in fp64; dweight is fp32 in `main_grad`."""
    torch.manual_seed(0)
    grad = torch.randn(512, columns).to(device, torch.bfloat16)
    hidden = torch.randn(512, 24).to(device, torch.bfloat16)
    total = torch.zeros(columns, 24, device=device)
    monkeypatch.setattr(head_module, "TILE_BYTES", 1 << 14)
    for start in range(0, 512, 4):
        head_module._add_outer(total, grad[start : start + 4], hidden[start : start + 4])
    exact = grad.double().t() @ hidden.double()
    assert (total - exact).norm() <= 1e-6 * exact.norm()


class TestMainGrad:
    """Where Megatron keeps an fp32 sum over micro-batches, dweight goes there and nowhere else."""

    def backward(
        self, device: str, dtype: torch.dtype, scale: float, *, unit_upstream: bool
    ) -> Head:
        head, labels, weights = make(device, dtype)
        head = replace(head, unit_upstream=unit_upstream)
        head.weight_vh.main_grad = torch.full(head.weight_vh.shape, 0.5, device=device)
        loss, _ = cross_entropy(head, labels, weights)
        (scale * loss).backward()
        return head

    @DTYPES
    def test_it_is_added_there_in_the_forward_pass(self, device: str, dtype: torch.dtype) -> None:
        head = self.backward(device, dtype, 1.0, unit_upstream=True)
        _, _, _, expected = reference(head, *make(device, dtype)[1:])
        assert head.weight_vh.grad is None
        close(head.weight_vh.main_grad - 0.5, expected, TOLERANCE[dtype])

    @DTYPES
    def test_without_that_promise_autograd_gets_the_scaled_gradient(
        self, device: str, dtype: torch.dtype
    ) -> None:
        head = self.backward(device, dtype, 0.5, unit_upstream=False)
        _, _, _, expected = reference(head, *make(device, dtype)[1:])
        assert head.weight_vh.grad is not None
        close(head.weight_vh.grad, 0.5 * expected, TOLERANCE[dtype])
        assert (head.weight_vh.main_grad == 0.5).all()

    @DTYPES
    def test_of_a_tied_matrix_it_is_the_heads_part_and_autograd_gives_the_embeddings(
        self, device: str, dtype: torch.dtype
    ) -> None:
        """Megatron's hook adds what autograd gives to `main_grad`: both parts are in it once."""
        head, labels, weights = make(device, dtype)
        ids = torch.arange(27, device=device).view(9, 3)
        weight = head.weight_vh
        weight.main_grad = torch.zeros(weight.shape, device=device)
        loss, _ = cross_entropy(
            replace(head, hidden_sbh=F.embedding(ids, weight), unit_upstream=True), labels, weights
        )
        loss.backward()
        exact = weight.detach().double().requires_grad_()
        logits = (F.embedding(ids, exact) @ exact.t())[..., :33].transpose(0, 1)
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        (nll * weights.flatten()).sum().backward()
        close(weight.main_grad + weight.grad, exact.grad, TOLERANCE[dtype])

    def test_without_gradients_nothing_is_added(self, device: str) -> None:
        head, labels, weights = make(device, torch.float32)
        head = replace(head, unit_upstream=True)
        head.weight_vh.main_grad = torch.zeros(head.weight_vh.shape, device=device)
        with torch.no_grad():  # validation: the parameters still say that they want gradients
            cross_entropy(head, labels, weights)
        assert not head.weight_vh.main_grad.any()


def test_a_loss_that_is_scaled_after_its_gradient_went_to_main_grad_is_refused() -> None:
    """On the CPU alone: on a GPU, the refusal is an assertion that ends the process."""
    with pytest.raises(RuntimeError, match="scaled after its gradient"):
        TestMainGrad().backward("cpu", torch.float32, 0.5, unit_upstream=True)
