"""Every sparse loss on every backend against the definition in fp64, and what has to hold exactly.

Tolerances are those of `test_token_losses`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_miniplm.kernels import cpu, sparse_reference
from megatron_miniplm.kernels.sparse_cpu import SparseCpuKernels
from megatron_miniplm.kernels.sparse_loss import LOGARITHMIC, SparseLoss, SparseTargets
from megatron_miniplm.kernels.token_loss import TokenLoss
from tests import token_losses
from tests.sparse_losses import (
    LOSSES,
    exact,
    problem,
    solve,
    solve_split,
    sparse,
)
from tests.token_losses import Arithmetic, assert_solves

FLOATS = (torch.float32, torch.bfloat16)
BEST = cpu.variants()[0]
ARITHMETICS = [
    Arithmetic(backend=sparse_reference, dtype=torch.float64),
    *(Arithmetic(backend=SparseCpuKernels(BEST), dtype=dtype) for dtype in FLOATS),
]
# The formulas are those above; what differs is rounding, and how many lanes a vector has.
OTHERS = [
    Arithmetic(backend=backend, dtype=dtype)
    for backend in (sparse_reference, *map(SparseCpuKernels, cpu.variants()[1:]))
    for dtype in FLOATS
]


@pytest.fixture(
    params=[*ARITHMETICS, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)],
    ids=str,
)
def arithmetic(request) -> Arithmetic:
    return request.param


@pytest.fixture(params=LOSSES, ids=lambda loss: loss.form)
def loss(request):
    return request.param


# A column, odd sizes below and above a vector, and more than one tile with a ragged end.
@pytest.mark.parametrize(
    "shape", [(3, 1, 1, 1), (5, 7, 6, 3), (7, 131, 130, 17), (6, 4127, 4099, 100)], ids=str
)
def test_values_and_gradients_are_those_of_the_definition(arithmetic, loss, shape):
    given = problem(*shape[:3], entries=shape[3], dtype=arithmetic.dtype)
    assert_solves(arithmetic, solve(arithmetic.backend, loss, given), exact(loss, given))


@pytest.mark.parametrize("weights", ["kd", "ce"])
def test_either_part_alone_is_that_of_the_definition(arithmetic, loss, weights):
    given = problem(6, 131, dtype=arithmetic.dtype)
    other = "ce_weight_N" if weights == "kd" else "kd_weight_N"
    given = given.with_tokens(**{other: torch.zeros(6)})
    assert_solves(arithmetic, solve(arithmetic.backend, loss, given), exact(loss, given))


@pytest.mark.parametrize("cuts", [[], [61], [40, 77, 130]], ids=["1", "2", "4"])
def test_shards_merged_are_the_whole_vocabulary(arithmetic, loss, cuts):
    """The last of four shards has no real column, and one has the whole support of a row."""
    given = problem(7, 140, 130, dtype=arithmetic.dtype)
    given.targets.ids_NK[0] = torch.arange(8) + 41
    found = solve_split(arithmetic.backend, loss, given, cuts)
    assert_solves(arithmetic, found, exact(loss, given))
    whole = solve(arithmetic.backend, loss, given)
    for field, value in vars(whole.values).items():
        if value is not None:
            torch.testing.assert_close(getattr(found.values, field), value, rtol=2e-6, atol=2e-6)


def edges(given):
    """A token each: no entries; a tail of 0; of 1; nothing off the support; the label in it."""
    ids_NK, probs_NK = given.targets.ids_NK.clone(), given.targets.probs_NK.clone()
    tail_N, labels_N = given.targets.tail_N.clone(), given.tokens.labels_N.clone()
    ids_NK[0], probs_NK[0], tail_N[0] = -1, 0, 1
    tail_N[1] = 0
    probs_NK[2], tail_N[2] = 0, 1
    ids_NK[3], probs_NK[3] = torch.arange(ids_NK.shape[1]), 1 / ids_NK.shape[1]
    labels_N[4] = ids_NK[4].max()
    return given.with_targets(ids_NK=ids_NK, probs_NK=probs_NK, tail_N=tail_N).with_tokens(
        labels_N=labels_N
    )


@pytest.mark.parametrize("cuts", [None, [7]], ids=["1", "2"])
def test_what_a_teacher_may_say_at_the_edges(arithmetic, loss, cuts):
    """With all columns in the support, with some, and with no entries at all."""
    for entries in (14, 5, 0):
        given = problem(6, 14, entries=max(entries, 1), dtype=arithmetic.dtype)
        if entries == 0:
            targets = {"ids_NK": torch.empty(6, 0, dtype=torch.int32)}
            given = given.with_targets(**targets, probs_NK=torch.empty(6, 0), tail_N=torch.ones(6))
        else:
            given = edges(given)
        if cuts is None:
            found = solve(arithmetic.backend, loss, given)
        else:
            found = solve_split(arithmetic.backend, loss, given, cuts)
        assert_solves(arithmetic, found, exact(loss, given))


@pytest.mark.parametrize("form", ["support", "residual", "uniform", "on_support"])
def test_a_student_sure_of_the_support_has_the_tail_that_it_has(arithmetic, form):
    """p_S is 1 in fp32, and 1 - p_S, of which the loss has the logarithm, is 1e-13."""
    given = problem(6, 131, entries=4, dtype=arithmetic.dtype)
    columns = given.targets.ids_NK.clamp_min(0).long()
    # Up to 40: bf16's steps are small enough there for a gradient that is no rounding error.
    given.student_NV.scatter_add_(-1, columns, torch.full(columns.shape, 32.0).to(arithmetic.dtype))
    given = given.with_tokens(student_scale_N=torch.ones(6), ce_weight_N=torch.zeros(6))
    loss = SparseLoss(form=form)
    assert_solves(arithmetic, solve(arithmetic.backend, loss, given), exact(loss, given))


def test_a_token_without_weight_is_not_read_and_its_gradient_is_exactly_zero(arithmetic, loss):
    given = problem(6, 70, 67, dtype=arithmetic.dtype)
    weights = {
        field: getattr(given.tokens, field).clone() for field in ("kd_weight_N", "ce_weight_N")
    }
    for weight in weights.values():
        weight[[1, 4]] = 0
    given = given.with_tokens(**weights)
    right = exact(loss, given)
    given.student_NV[[1, 4]] = torch.nan
    given.targets.probs_NK[[1, 4]] = torch.nan
    given.targets.ids_NK[[1, 4]] = 9999
    given.tokens.labels_N[[1, 4]] = -100
    for found in (
        solve(arithmetic.backend, loss, given),
        solve_split(arithmetic.backend, loss, given, [33]),
    ):
        assert not found.grad_NV[[1, 4]].any()
        assert not found.loss_N[[1, 4]].any()
        assert_solves(arithmetic, found, right)


def test_columns_beyond_the_real_ones_are_not_read_and_have_no_gradient(arithmetic, loss):
    given = problem(6, 80, 67, dtype=arithmetic.dtype)
    right = exact(loss, given)
    given.student_NV[:, 67:] = torch.nan
    for found in (
        solve(arithmetic.backend, loss, given),
        solve_split(arithmetic.backend, loss, given, [33, 70]),
    ):
        assert not found.grad_NV[:, 67:].any()
        assert_solves(arithmetic, found, right)


def test_a_row_of_nan_spoils_no_other_row(arithmetic, loss):
    given = problem(5, 67, dtype=arithmetic.dtype)
    right = solve(arithmetic.backend, loss, given)
    given.student_NV[2, 5] = torch.nan
    found = solve(arithmetic.backend, loss, given)
    others = [0, 1, 3, 4]
    assert torch.equal(found.grad_NV[others], right.grad_NV[others])
    assert torch.equal(found.loss_N[others], right.loss_N[others])
    assert found.loss_N[2].isnan()


def test_rows_are_solved_alone_and_may_lie_apart(arithmetic, loss):
    """A slice of wider rows, some tokens of the batch: in place, the same bits."""
    given = problem(7, 131, dtype=arithmetic.dtype)
    whole = solve(arithmetic.backend, loss, given)
    for part in (slice(0, 3), slice(3, 7)):
        wide = torch.full((part.stop - part.start, 155), 7.0, dtype=arithmetic.dtype)
        wide[:, 11:142] = given.student_NV[part]
        arithmetic.backend.fused_(
            loss, wide[:, 11:142], given.targets.rows(part), given.tokens.rows(part)
        )
        assert torch.equal(wide[:, 11:142], whole.grad_NV[part])
        assert (wide[:, :11] == 7).all()
        assert (wide[:, 142:] == 7).all()


@pytest.mark.parametrize("form", LOGARITHMIC)
@pytest.mark.parametrize("entries", [9, 131])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(arithmetic, form, entries):
    """But in `support` of a few entries, whose weights are no distribution, and in `uniform`."""
    if entries < 131 and form in ("support", "uniform"):
        pytest.skip("the student is no minimum of this loss")
    dense = token_losses.problem(6, 131, dtype=arithmetic.dtype)
    dense = replace(dense, teacher_NV=dense.student_NV).with_tokens(
        ce_weight_N=torch.zeros(6), teacher_scale_N=dense.tokens.student_scale_N
    )
    given = sparse(dense, entries)
    if entries == 131 or form == "on_support":
        ids_NK = torch.arange(131).int().expand(6, 131)[:, :entries].contiguous()
        a_NK = (dense.student_NV.double() * dense.tokens.student_scale_N[:, None])[:, :entries]
        probs_NK = a_NK.softmax(-1).float()
        given = given.with_targets(ids_NK=ids_NK, probs_NK=probs_NK, tail_N=torch.zeros(6))
    found = solve(arithmetic.backend, SparseLoss(form=form), given)
    probabilities = dense.student_NV.double().softmax(-1).norm()
    assert found.grad_NV.double().norm() <= 1e-6 * probabilities
    assert found.values.kd.abs().max() <= 1e-6  # a difference of entropies of 4 nats, in fp32


@pytest.mark.parametrize("form", ["support", "residual", "uniform", "on_support"])
def test_all_tokens_in_the_support_make_dense_forward_kl(arithmetic, form):
    dense = token_losses.problem(6, 131, dtype=arithmetic.dtype)
    given = sparse(dense, 131)
    ids_NK = torch.arange(131).int().expand(6, 131).contiguous()
    teacher = dense.teacher_NV.double() * dense.tokens.teacher_scale_N[:, None]
    # What rounding leaves of a tail has no column to be at.
    given = given.with_targets(
        ids_NK=ids_NK, probs_NK=teacher.softmax(-1).float(), tail_N=torch.full((6,), 1e-7)
    )
    right = token_losses.exact(TokenLoss(divergence="forward_kl"), dense)
    found = solve(arithmetic.backend, SparseLoss(form=form), given)
    in_fp32 = Arithmetic(backend=arithmetic.backend, dtype=arithmetic.dtype)
    if arithmetic.dtype == torch.float64:  # the weights are fp32
        in_fp32 = replace(in_fp32, dtype=torch.float32)
    assert_solves(in_fp32, found, right)


@pytest.mark.parametrize("temperature", [0.05, 3.0, 100.0])
def test_all_temperatures(arithmetic, loss, temperature):
    given = problem(4, 131, dtype=arithmetic.dtype)
    given = given.with_tokens(student_scale_N=torch.full((4,), 1 / temperature))
    found = solve(arithmetic.backend, loss, given)
    # What is exponentiated is as many times larger, and so is its rounding.
    assert_solves(arithmetic, found, exact(loss, given), ill=max(1.0, 1 / temperature))


@pytest.mark.parametrize("form", LOGARITHMIC)
def test_a_soft_loss_lacks_the_teachers_entropy_and_nothing_of_the_gradient(arithmetic, form):
    given = problem(6, 131, dtype=arithmetic.dtype)
    hard, soft = (SparseLoss(form=form, soft=soft) for soft in (False, True))
    found = solve(arithmetic.backend, soft, given)
    assert_solves(arithmetic, found, exact(soft, given))
    assert torch.equal(found.grad_NV, solve(arithmetic.backend, hard, given).grad_NV)


def test_agreement_is_of_the_largest_logit_and_the_largest_weight(arithmetic):
    given = problem(4, 131, entries=8, dtype=arithmetic.dtype)
    best_N = given.targets.ids_NK.gather(-1, given.targets.probs_NK.argmax(-1)[:, None])[:, 0]
    given.student_NV[[0, 1], best_N[[0, 1]].long()] = 99
    off = next(each for each in range(131) if each not in given.targets.ids_NK[2])
    given.student_NV[2, off] = 99
    second = given.targets.probs_NK[3].topk(2).indices[1]
    given.student_NV[3, given.targets.ids_NK[3, second].long()] = 99
    for found in (
        solve(arithmetic.backend, SparseLoss(form="residual"), given),
        solve_split(arithmetic.backend, SparseLoss(form="residual"), given, [50]),
    ):
        assert found.values.agreement.tolist() == [1, 1, 0, 0]


# A worked example, as in test_sparse_kd.py: teacher [2, 1, 0, -1, -2], top-p 0.95, top-k 2.
@pytest.mark.parametrize(
    ("temperature", "form", "soft", "value", "gradient"),
    [
        (1, "support", True, 1.081944, [-0.434768, 0.219559, 0.066111, 0.108999, 0.040099]),
        (1, "support", False, 0.499741, [-0.434768, 0.219559, 0.066111, 0.108999, 0.040099]),
        (1, "square", False, 0.255089, None),
        (2, "support", True, 1.027645, None),
        (2, "support", False, 0.364797, None),
        (2, "square", False, 0.136558, None),
    ],
)
def test_golden_values_of_truncated_losses(arithmetic, temperature, form, soft, value, gradient):
    student = torch.tensor([[1, 1.5, -0.5, 0, -1]], dtype=arithmetic.dtype)
    kept = torch.tensor([[2.0, 1.0]]) / temperature
    targets = SparseTargets(
        ids_NK=torch.tensor([[0, 1]]), probs_NK=kept.softmax(-1), tail_N=torch.zeros(1)
    )
    given = replace(problem(1, 5), student_NV=student, targets=targets).with_tokens(
        kd_weight_N=torch.ones(1), ce_weight_N=torch.zeros(1), student_scale_N=torch.ones(1)
    )
    found = solve(arithmetic.backend, SparseLoss(form=form, soft=soft), given)
    assert abs(float(found.values.kd) - value) <= 1e-6
    if gradient is not None:
        tolerance = 1e-3 if arithmetic.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(
            found.grad_NV.double(), torch.tensor([gradient]).double(), rtol=0, atol=tolerance
        )
