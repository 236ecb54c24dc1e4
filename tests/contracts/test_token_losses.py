"""Every token loss on every backend against the definition in fp64, and what has to hold exactly.

Tolerances (relative, norm of the whole tensor): fp64 1e-12; fp32 2e-6 (measured floors are 4e-8 to
5e-7); a bf16 gradient at most 1.05 times as far from the exact one as its own
rounding to bf16.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_miniplm.kernels import cpu, reference
from tests.token_losses import (
    LOSSES,
    Arithmetic,
    assert_solves,
    exact,
    name,
    problem,
    relative,
    solve,
    solve_split,
)

ARITHMETICS = [
    Arithmetic(backend=reference, dtype=torch.float64),
    Arithmetic(backend=reference, dtype=torch.float32),
    Arithmetic(backend=reference, dtype=torch.bfloat16),
    *(
        Arithmetic(backend=cpu.CpuKernels(variant), dtype=dtype)
        for variant in cpu.variants()
        for dtype in (torch.float32, torch.bfloat16)
    ),
]
KD_LOSSES = [loss for loss in LOSSES if loss.divergence is not None]
# KL(p || q) is infinite where the teacher has no probability, and so are squares of logits.
FINITE_WITHOUT_TEACHER = [
    loss
    for loss in KD_LOSSES
    if loss.divergence != "reverse_kl" and not loss.divergence.startswith("mse")
]


@pytest.fixture(params=ARITHMETICS, ids=str)
def arithmetic(request) -> Arithmetic:
    return request.param


@pytest.fixture(params=LOSSES, ids=name)
def loss(request):
    return request.param


# A column, odd sizes below and above a vector, and more than one tile with a ragged end.
@pytest.mark.parametrize("shape", [(3, 1, 1), (5, 7, 6), (7, 131, 130), (6, 4127, 4099)], ids=str)
def test_values_and_gradients_are_those_of_the_definition(arithmetic, loss, shape):
    given = problem(*shape, dtype=arithmetic.dtype)
    assert_solves(arithmetic, solve(arithmetic.backend, loss, given), exact(loss, given))


@pytest.mark.parametrize("weights", ["kd", "ce"])
def test_either_part_alone_is_that_of_the_definition(arithmetic, loss, weights):
    given = problem(6, 131, dtype=arithmetic.dtype)
    other = "ce_weight_N" if weights == "kd" else "kd_weight_N"
    given = given.with_tokens(**{other: torch.zeros(6)})
    assert_solves(arithmetic, solve(arithmetic.backend, loss, given), exact(loss, given))


@pytest.mark.parametrize("cuts", [[], [61], [40, 77, 130]], ids=["1", "2", "4"])
def test_shards_merged_are_the_whole_vocabulary(arithmetic, loss, cuts):
    """The last of four shards has no real column."""
    given = problem(7, 140, 130, dtype=arithmetic.dtype)
    found = solve_split(arithmetic.backend, loss, given, cuts)
    assert_solves(arithmetic, found, exact(loss, given))
    whole = solve(arithmetic.backend, loss, given)
    for field, value in vars(whole.values).items():
        if value is not None:
            torch.testing.assert_close(getattr(found.values, field), value, rtol=2e-6, atol=2e-6)


def test_a_token_without_weight_is_not_read_and_its_gradient_is_exactly_zero(arithmetic, loss):
    given = problem(6, 70, 67, dtype=arithmetic.dtype)
    weights = {
        field: getattr(given.tokens, field).clone() for field in ("kd_weight_N", "ce_weight_N")
    }
    for weight in weights.values():
        weight[[1, 4]] = 0
    given = given.with_tokens(**weights)
    right = exact(loss, given)
    for logits in (given.student_NV, given.teacher_NV):
        logits[[1, 4]] = torch.nan
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
    for logits in (given.student_NV, given.teacher_NV):
        logits[:, 67:] = torch.nan
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


def test_a_split_batch_is_the_batch_bit_for_bit(arithmetic, loss):
    given = problem(7, 131, dtype=arithmetic.dtype)
    whole = solve(arithmetic.backend, loss, given)
    for part in (slice(0, 3), slice(3, 7)):
        some = replace(
            given,
            student_NV=given.student_NV[part],
            teacher_NV=given.teacher_NV[part],
            tokens=given.tokens.rows(part),
        )
        found = solve(arithmetic.backend, loss, some)
        assert torch.equal(found.grad_NV, whole.grad_NV[part])
        assert torch.equal(found.loss_N, whole.loss_N[part])


def test_rows_may_lie_apart(arithmetic, loss):
    """A slice of wider rows is solved in place; its neighbours stay."""
    given = problem(5, 67, dtype=arithmetic.dtype)
    right = solve(arithmetic.backend, loss, given)
    wide = torch.full((5, 91), 7.0, dtype=arithmetic.dtype)
    wide[:, 11:78] = given.student_NV
    teacher = None if loss.divergence is None else given.teacher_NV
    arithmetic.backend.fused_(loss, wide[:, 11:78], teacher, given.tokens)
    assert torch.equal(wide[:, 11:78], right.grad_NV)
    assert (wide[:, :11] == 7).all()
    assert (wide[:, 78:] == 7).all()


@pytest.mark.parametrize("loss", KD_LOSSES, ids=name)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(arithmetic, loss):
    given = problem(6, 131, dtype=arithmetic.dtype)
    given = replace(given, teacher_NV=given.student_NV.clone()).with_tokens(
        ce_weight_N=torch.zeros(6), teacher_scale_N=given.tokens.student_scale_N
    )
    found = solve(arithmetic.backend, loss, given)
    probabilities = given.student_NV.double().softmax(-1).norm()
    assert found.grad_NV.double().norm() <= 1e-6 * probabilities
    if loss.form == "soft_nll":
        torch.testing.assert_close(found.values.kd, found.values.teacher_entropy)
    else:
        assert found.values.kd.abs().max() <= 1e-7
    assert found.values.agreement.eq(1).all()


def test_the_gradient_of_a_token_sums_to_zero(arithmetic, loss):
    if loss.divergence == "mse_logits":
        pytest.skip("a number added to all logits changes this loss")
    loss = replace(loss, z_loss=0.0)  # as it changes the squared log-sum-exp
    given = problem(6, 1031)
    solved = solve(arithmetic.backend, loss, given.to(_not_rounded(arithmetic.dtype))).grad_NV
    assert (solved.double().sum(-1).abs() <= 1e-6 * solved.double().abs().sum(-1)).all()


def _not_rounded(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0, 3.0, 4.0, 100.0])
def test_all_temperatures(arithmetic, loss, temperature):
    given = problem(4, 131, dtype=arithmetic.dtype)
    scale_N = torch.full((4,), 1 / temperature)
    given = given.with_tokens(student_scale_N=scale_N, teacher_scale_N=scale_N)
    found = solve(arithmetic.backend, loss, given)
    # What is exponentiated is as many times larger, and so is its rounding.
    assert_solves(arithmetic, found, exact(loss, given), ill=max(1.0, 1 / temperature))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_at_high_temperature_kl_is_the_error_of_centered_logits(arithmetic, divergence):
    """T^2 KL -> variance of (s - t) / 2: what the factor T^2 is for (Hinton et al., eq. 4)."""
    given = problem(4, 131, dtype=arithmetic.dtype)
    scale_N, kd_N = torch.full((4,), 1e-3), torch.full((4,), 1e6)
    given = given.with_tokens(
        student_scale_N=scale_N, teacher_scale_N=scale_N,
        kd_weight_N=kd_N, ce_weight_N=torch.zeros(4),
    )  # fmt: skip
    loss = next(each for each in LOSSES if each.divergence == divergence)
    d = given.student_NV.double() - given.teacher_NV.double()
    centered = (d - d.mean(-1, keepdim=True)) / 131
    found = solve(arithmetic.backend, loss, given).grad_NV
    # 1 / T = 1e-3 of the expansion remains; fp32 subtracts probabilities that differ by 1e-3.
    assert relative(found, centered) <= 2e-2


@pytest.mark.parametrize("loss", FINITE_WITHOUT_TEACHER, ids=name)
def test_a_teacher_may_rule_columns_out(arithmetic, loss):
    given = problem(5, 131, dtype=arithmetic.dtype)
    given.teacher_NV[:, 3:60] = -torch.inf
    assert_solves(arithmetic, solve(arithmetic.backend, loss, given), exact(loss, given))


def test_adding_to_all_logits_of_a_token_costs_no_digits(arithmetic, loss):
    if loss.divergence == "mse_logits":
        pytest.skip("a number added to all logits changes this loss")
    loss = replace(loss, z_loss=0.0)
    given = problem(5, 131, dtype=torch.bfloat16)  # bf16 values: the sums are exact in fp32
    given = given.to(_not_rounded(arithmetic.dtype))
    right = exact(loss, given)
    moved = replace(given, student_NV=given.student_NV + 512, teacher_NV=given.teacher_NV - 256)
    if not torch.equal(moved.student_NV - 512, given.student_NV):
        moved = replace(given, student_NV=(given.student_NV * 64).round() / 64 + 512)
        right = exact(loss, replace(moved, student_NV=moved.student_NV - 512))
    found = solve(arithmetic.backend, loss, moved)
    limit = 1e-11 if arithmetic.dtype == torch.float64 else 5e-6
    assert relative(found.grad_NV, right.grad_NV) <= limit
