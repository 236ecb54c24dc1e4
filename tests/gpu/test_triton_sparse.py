"""The Triton kernels of sparse losses on a device: their contract, and a batch of Qwen's size.

``python -m pytest tests/gpu/test_triton_sparse.py -n 8`` on a machine with a GPU.
"""

# ruff: noqa: F811 - the contract's fixture `loss` is imported by its name

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_miniplm.kernels import sparse_backend_for, sparse_reference, triton_sparse
from megatron_miniplm.kernels.sparse_loss import SPARSE_FORMS, SparseLoss, SparseTargets
from megatron_miniplm.kernels.sparse_record import values
from megatron_miniplm.kernels.token_loss import Tokens
from tests.contracts.test_sparse_losses import (
    loss,  # noqa: F401
    test_a_row_of_nan_spoils_no_other_row,  # noqa: F401
    test_a_student_sure_of_the_support_has_the_tail_that_it_has,  # noqa: F401
    test_a_token_without_weight_is_not_read_and_its_gradient_is_exactly_zero,  # noqa: F401
    test_columns_beyond_the_real_ones_are_not_read_and_have_no_gradient,  # noqa: F401
    test_rows_are_solved_alone_and_may_lie_apart,  # noqa: F401
    test_shards_merged_are_the_whole_vocabulary,  # noqa: F401
    test_values_and_gradients_are_those_of_the_definition,  # noqa: F401
    test_what_a_teacher_may_say_at_the_edges,  # noqa: F401
)
from tests.token_losses import Arithmetic

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

VOCABULARY, PADDED = 151_936, 152_064


def on_device(value):
    """Tensors, targets and tokens of the contract's problems, on the device."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, Tokens | SparseTargets):
        tensors = {name: item for name, item in vars(value).items() if hasattr(item, "cuda")}
        return replace(value, **{name: item.cuda() for name, item in tensors.items()})
    return value


class OnDevice:
    """The backend for problems on the CPU, solved on the device."""

    variant = "triton"

    def stats(self, *arguments):
        return triton_sparse.stats(*map(on_device, arguments)).cpu()

    def grad_(self, loss, student, *arguments):
        self._in_place(triton_sparse.grad_, loss, student, *arguments)

    def fused_(self, loss, student, *arguments):
        return self._in_place(triton_sparse.fused_, loss, student, *arguments).cpu()

    @staticmethod
    def _in_place(kernel, loss, student, *arguments):
        moved = on_device(student)
        found = kernel(loss, moved, *map(on_device, arguments))
        student.copy_(moved)
        return found


@pytest.fixture(
    params=[
        Arithmetic(backend=OnDevice(), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    ],
    ids=str,
)
def arithmetic(request) -> Arithmetic:
    return request.param


def large(rows: int) -> tuple[torch.Tensor, SparseTargets, Tokens]:
    """100 entries a token of Qwen's vocabulary, NaN in the padding, every fifth row off."""
    torch.manual_seed(0)
    student = torch.randn(rows, PADDED, device="cuda", dtype=torch.bfloat16).mul_(2.5)
    ids = torch.rand(rows, VOCABULARY // 100, device="cuda").topk(100).indices * 100
    probs = torch.randn(rows, 100, device="cuda").softmax(-1) * 0.9
    tail = torch.full((rows,), 0.1, device="cuda")
    active = (torch.arange(rows, device="cuda") % 5 != 4).float()
    student[:, VOCABULARY:] = torch.nan
    student[active == 0] = torch.nan
    tokens = Tokens.of(
        torch.randint(0, VOCABULARY, (rows,), device="cuda"),
        kd_weight=active * 0.5, ce_weight=active * 0.5, valid=VOCABULARY,
    )  # fmt: skip
    return student, SparseTargets(ids_NK=ids.int(), probs_NK=probs, tail_N=tail), tokens


@pytest.mark.parametrize("form", SPARSE_FORMS)
def test_a_batch_of_qwen_is_right_in_sampled_rows_and_waits_for_no_device(form):
    loss = SparseLoss(form=form, z_loss=1e-4)
    student, targets, tokens = large(4096)
    rows = torch.tensor([0, 1, 4, 2048, 4095], device="cuda")
    some_targets = replace(targets, **{name: item[rows] for name, item in vars(targets).items()})
    vectors = {name: item[rows] for name, item in vars(tokens).items() if name.endswith("_N")}
    some = replace(tokens, **vectors)
    right = student[rows].double()
    right_record = sparse_reference.fused_(loss, right, some_targets, some)
    backend = sparse_backend_for(student)
    assert backend.fused_.__module__ == triton_sparse.__name__
    backend.fused_(loss, student[:8].clone(), targets.rows(slice(8)), tokens.rows(slice(8)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        record = backend.fused_(loss, student, targets, tokens)
        found = values(loss, record, targets, tokens).weighted(loss, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gradient = student[rows].double()
    rounding = (right.bfloat16().double() - right).norm()
    assert (gradient - right).norm() <= 1.05 * rounding
    expected = values(loss, right_record, some_targets, some).weighted(loss, some)
    torch.testing.assert_close(found[rows].double(), expected.double(), rtol=2e-6, atol=1e-6)
    assert not student[:, VOCABULARY:].any()
    assert not student[4::5].any()
