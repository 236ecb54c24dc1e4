"""Who computes a token loss, and what the door to the native kernels promises and refuses."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.log import LOGGER_NAME
from megatron_miniplm.kernels import (
    VARIABLE,
    _plain_torch,
    backend_for,
    cpu,
    record,
    reference,
    sparse_backend_for,
    sparse_cpu,
    sparse_reference,
)
from megatron_miniplm.kernels.definition import token_losses
from megatron_miniplm.kernels.sparse_loss import SparseLoss, SparseTargets
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens
from tests.token_losses import LOSSES, exact, name, problem, relative, solve

KL = TokenLoss(divergence="forward_kl")


@pytest.mark.parametrize(
    ("dtype", "backend", "sparse_backend"),
    [
        (torch.float32, cpu, sparse_cpu),
        (torch.bfloat16, cpu, sparse_cpu),
        (torch.float64, reference, sparse_reference),
    ],
)
def test_logits_on_the_cpu_go_to_native_code_and_fp64_to_torch(dtype, backend, sparse_backend):
    assert backend_for(torch.empty(1, 1, dtype=dtype)) is backend
    assert sparse_backend_for(torch.empty(1, 1, dtype=dtype)) is sparse_backend


def test_a_fallback_is_said_and_said_once(caplog):
    _plain_torch.cache_clear()
    logging.getLogger(LOGGER_NAME).propagate = True
    for _ in range(3):
        assert backend_for(torch.empty(1, 1, dtype=torch.float16)) is reference
    # By identity: whatever ran before may have left a second way to the same handler.
    said = {id(each): each for each in caplog.records if "plain torch" in each.message}
    assert ["float16" in each.message for each in said.values()] == [True]


def test_the_environment_can_ask_for_plain_torch_and_for_nothing_unknown(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert backend_for(torch.empty(1, 1)) is reference
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ConfigError, match=r"fast.*auto, reference"):
        backend_for(torch.empty(1, 1))


@pytest.mark.parametrize("choice", ["triton-one-read", "triton-two-pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kernel_of_gpus_is_not_left_out_in_silence_on_the_cpu(choice, dtype, monkeypatch):
    monkeypatch.setenv(VARIABLE, choice)
    with pytest.raises(ConfigError, match=rf"{choice} asks .* {dtype} on cpu.*unset"):
        backend_for(torch.empty(1, 1, dtype=dtype))


@pytest.fixture
def door():
    """A backend of native code. `triton_contract` runs the tests of it with Triton's."""
    return cpu


@pytest.mark.parametrize(
    ("student", "teacher", "why"),
    [
        (torch.zeros(3, 8, dtype=torch.float64), torch.zeros(3, 8), "student .*float64"),
        (torch.zeros(3, 8), torch.zeros(3, 8, dtype=torch.float64), "teacher .*float64"),
        (torch.zeros(3, 8), torch.zeros(3, 8, device="meta"), "teacher .* on meta, must be"),
        (torch.zeros(8, 3).t(), torch.zeros(3, 8), "student .* columns 3 elements apart"),
        (torch.zeros(8).expand(3, 8), torch.zeros(3, 8), "student .* rows 0 elements apart"),
        (torch.zeros(3, 8), torch.zeros(2, 8), r"teacher .* \(2, 8\), must be \[3, 8 or more\]"),
        (torch.zeros(3, 7), torch.zeros(3, 8), r"student .* \(3, 7\), must be \[3, 8 or more\]"),
        (torch.zeros(3, 1, 8), torch.zeros(3, 8), r"student .* \(3, 1, 8\), must be"),
    ],
)
def test_logits_that_native_code_would_misread_are_refused(door, student, teacher, why):
    tokens = Tokens.of(torch.zeros(3, dtype=torch.int64), valid=8)
    with pytest.raises(ConfigError, match=why):
        door.fused_(KL, student, teacher, tokens)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"labels_N": torch.zeros(2, dtype=torch.int64)}, r"labels_N has shape \(2,\).*\[3\]"),
        ({"kd_weight_N": torch.ones(3, device="meta")}, r"kd_weight_N .* on meta.* on cpu"),
    ],
)
def test_tokens_that_native_code_would_misread_are_refused(door, changes, why):
    tokens = replace(Tokens.of(torch.zeros(3, dtype=torch.int64), valid=8), **changes)
    with pytest.raises(ConfigError, match=why):
        door.fused_(KL, torch.zeros(3, 8), torch.zeros(3, 8), tokens)


@pytest.mark.parametrize("label", [-100, -1, 8])
def test_a_label_outside_the_vocabulary_is_refused_where_it_counts(door, label):
    tokens = Tokens.of(torch.tensor([3, label, 3]), ce_weight=1.0, valid=8)
    with pytest.raises(DataError, match=rf"token 1 has label {label}, must be 0 to 7"):
        door.fused_(KL, torch.zeros(3, 10), torch.zeros(3, 10), tokens)
    tokens.ce_weight_N[1] = 0
    door.fused_(KL, torch.zeros(3, 10), torch.zeros(3, 10), tokens)


def test_labels_and_weights_may_be_of_any_type(door):
    """Those of what a kernel reads are seen to at its door."""
    given = problem(5, 67, dtype=torch.float32)
    others = {
        name: value.to(torch.int32 if name == "labels_N" else torch.float64)
        for name, value in vars(given.tokens).items()
        if isinstance(value, torch.Tensor)
    }
    found = [solve(door, KL, each).grad_NV for each in (given, given.with_tokens(**others))]
    assert torch.equal(*found)


def test_no_native_code_for_a_machine_that_lacks_it():
    tokens = Tokens.of(torch.zeros(1, dtype=torch.int64), valid=8)
    with pytest.raises(ValueError, match="no variant vax"):
        cpu.CpuKernels("vax").stats(TokenLoss(), torch.zeros(1, 8), None, tokens)


@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("types", [("float32", "bfloat16"), ("bfloat16", "float32")], ids=str)
def test_student_and_teacher_may_have_types_of_their_own(loss, types):
    student, teacher = (getattr(torch, each) for each in types)
    given = problem(5, 300)
    given = replace(
        given, student_NV=given.student_NV.to(student), teacher_NV=given.teacher_NV.to(teacher)
    )
    found, right = solve(cpu, loss, given), exact(loss, given)
    assert relative(found.loss_N, right.loss_N) <= 2e-6
    assert relative(found.grad_NV, right.grad_NV) <= (2e-6 if student == torch.float32 else 3e-3)


def test_neither_threads_nor_passes_in_one_go_change_a_bit():
    given = problem(37, 1031, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = solve(cpu, KL, given)
        torch.set_num_threads(3)
        three = solve(cpu, KL, given)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.grad_NV, three.grad_NV)
    student = given.student_NV.clone()
    found = cpu.stats(KL, student, given.teacher_NV, given.tokens)
    cpu.grad_(KL, student, given.teacher_NV, given.tokens, found, None)
    assert torch.equal(student, one.grad_NV)


def test_a_graph_that_saved_the_logits_hears_that_they_are_gone():
    logits = torch.randn(3, 8)
    weight = torch.ones(3, 8, requires_grad=True)
    loss = (weight * logits).sum()  # saves the logits for the gradient of the weight
    cpu.fused_(TokenLoss(), logits, None, Tokens.of(torch.zeros(3).long(), ce_weight=1.0, valid=8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_denormal_numbers_are_as_before_after_a_call():
    solve(cpu, KL, problem(3, 100, dtype=torch.float32))
    assert (torch.tensor([2e-40]) * 0.5).item() > 0


def test_no_tokens_and_no_columns_are_fine():
    none = torch.empty(0, dtype=torch.int64)
    found, _ = cpu.fused_(KL, torch.empty(0, 8), torch.empty(0, 8), Tokens.of(none, valid=8))
    assert found.shape == (0, record.SIZE)
    tokens = Tokens.of(torch.zeros(2, dtype=torch.int64), valid=0)
    found = cpu.stats(KL, torch.empty(2, 0), torch.empty(2, 0), tokens)
    assert torch.equal(found, reference.stats(KL, torch.empty(2, 0), torch.empty(2, 0), tokens))


@pytest.mark.parametrize(
    ("loss", "plain"),
    [
        (TokenLoss(divergence="jsd", beta=0.0), "forward_kl"),
        (TokenLoss(divergence="jsd", beta=1.0), "reverse_kl"),
        (TokenLoss(divergence="skew_kl", beta=0.0), "forward_kl"),
        (TokenLoss(divergence="skew_rkl", beta=0.0), "reverse_kl"),
    ],
)
def test_at_its_ends_a_mixture_is_a_plain_divergence(loss, plain):
    assert loss.form == plain
    assert not loss.needs_inner
    given = problem(4, 50)
    expected = token_losses(
        TokenLoss(divergence=plain), given.student_NV, given.teacher_NV, given.tokens
    )
    assert torch.equal(solve(reference, loss, given).loss_N.isnan(), torch.zeros(4).bool())
    torch.testing.assert_close(solve(reference, loss, given).loss_N, expected)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"divergence": "kl"}, "no divergence 'kl'.*forward_kl"),
        ({"divergence": "jsd", "beta": 1.5}, "beta 1.5"),
        ({"divergence": "skew_kl", "beta": 1.0}, "below 1"),
    ],
)
def test_a_loss_that_is_none_is_refused(wrong, why):
    with pytest.raises(ConfigError, match=why):
        TokenLoss(**wrong)


@pytest.mark.parametrize(
    ("ids", "weights", "why"),
    [
        ([[0, 8]], (1, 2), r"teacher of token 0 names token id 8, must be 0 to 7, or -1"),
        ([[-2, 3]], (1, 2), r"teacher of token 0 names token id -2, must be 0 to 7, or -1"),
        ([[0, 1]], (1, 3), r"ids and weights must be \[1, K\], the tail \[1\]"),
        ([[0, 1], [0, 1]], (2, 2), r"ids and weights must be \[1, K\], the tail \[1\]"),
    ],
)
def test_targets_that_native_code_would_misread_are_refused(ids, weights, why):
    targets = SparseTargets(
        ids_NK=torch.tensor(ids, dtype=torch.int32), probs_NK=torch.ones(weights),
        tail_N=torch.zeros(1),
    )  # fmt: skip
    tokens = Tokens.of(torch.zeros(1, dtype=torch.int64), valid=8)
    with pytest.raises((ConfigError, DataError), match=why):
        sparse_cpu.fused_(SparseLoss(form="residual"), torch.zeros(1, 8), targets, tokens)


def test_a_sparse_loss_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"no sparse loss 'ghost'; there is: support, residual"):
        SparseLoss(form="ghost")
    with pytest.raises(ConfigError, match=r"square has none; it goes with support, residual"):
        SparseLoss(form="square", soft=True)
