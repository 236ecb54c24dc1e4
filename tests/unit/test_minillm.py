"""MiniLLM's arithmetic: on a toy that can be enumerated, and against hand-made numbers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.evaluation.cost import METHODS
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.signal import SignalFacts
from megatron_miniplm.objectives.advantages import (
    AdvantageConfig,
    advantages,
    policy_gradient,
    rewards,
    whitened,
)
from megatron_miniplm.objectives.lm import LanguageModeling
from megatron_miniplm.objectives.minillm import MiniLlm, MiniLlmConfig
from megatron_miniplm.objectives.objective import LossConfig, Progress
from megatron_miniplm.objectives.rollouts import Rollout, RolloutConfig
from megatron_miniplm.parallel.vocab import VocabShard

PLAIN = AdvantageConfig(length_norm="none", whiten="none")
CODE = {"long_includes_current": True, "whiten": "none"}
WHOLE = VocabShard(first=0, size=3, valid=3, group=None)
DOUBLE = {"dtype": torch.float64}


def rollout(labels_bs: torch.Tensor, written_bs: torch.Tensor, **settled: torch.Tensor) -> Rollout:
    """Rows of labels of which some were written; weights are those of the mask."""
    zero, one = torch.zeros(labels_bs.shape), torch.ones(labels_bs.shape)
    usual = {
        "prompt_weight_bs": zero, "response_weight_bs": written_bs.float(), "reward_bs": zero,
        "advantage_bs": zero, "importance_bs": one, "logprob_bs": zero,
        "highest_importance_b": one[:, 0],
    }  # fmt: skip
    mask = torch.ones_like(labels_bs, dtype=torch.bool)
    return Rollout(labels_bs, labels_bs, mask, torch.arange(len(labels_bs)), **{**usual, **settled})


class Toy:
    """Three tokens, two steps: logits are a table of four contexts (nothing, or a first token)."""

    def __init__(self, *, same: bool = False) -> None:
        torch.manual_seed(5)
        self.student_3c = torch.randn(3, 4, **DOUBLE).requires_grad_()
        self.teacher_3c = self.student_3c.detach() if same else torch.randn(3, 4, **DOUBLE)
        self.written = torch.tensor([*itertools.product(range(3), repeat=2)])
        self.contexts = torch.stack([torch.zeros(9, dtype=torch.int64), self.written[:, 0] + 1], 1)

    def logprobs(self, table_3c: torch.Tensor) -> torch.Tensor:
        """[9, 2] of every token of every continuation."""
        return table_3c.t().log_softmax(-1)[self.contexts, self.written]

    def divergence(self) -> torch.Tensor:
        """KL(q || p) of whole continuations, by its definition."""
        log_q, log_p = (self.logprobs(t).sum(1) for t in (self.student_3c, self.teacher_3c))
        return (log_q.exp() * (log_q - log_p)).sum()

    def expected_gradient(self, config: MiniLlmConfig) -> torch.Tensor:
        """Over all that the student may write: each row weighs what it is likely."""
        both = torch.stack([self.logprobs(self.student_3c), self.logprobs(self.teacher_3c)])
        everywhere = torch.ones(9, 2, dtype=torch.bool)
        reward = rewards(both.detach(), everywhere, config.advantage)
        likely_b1 = both[0].detach().sum(1, keepdim=True).exp()
        batch = rollout(
            self.written, everywhere, response_weight_bs=likely_b1.expand(9, 2),
            advantage_bs=advantages(reward, everywhere, config.advantage),
            logprob_bs=both[0].detach(),
        )  # fmt: skip
        states_sbc = torch.nn.functional.one_hot(self.contexts.t(), 4).double()
        head, teacher = (
            Head(hidden_sbh=states_sbc, weight_vh=table, shard=WHOLE)
            for table in (self.student_3c, self.teacher_3c)
        )
        output = MiniLlm(LossConfig(), config)(head, batch, teacher)
        (gradient,) = torch.autograd.grad(output.loss_sum, self.student_3c)
        return gradient


@pytest.mark.parametrize("epochs", [1, 3])
def test_expected_gradient_is_that_of_the_reverse_kl_of_whole_continuations(epochs: int) -> None:
    toy = Toy()
    found = toy.expected_gradient(MiniLlmConfig(advantage=PLAIN, ppo_epochs=epochs))
    (expected,) = torch.autograd.grad(toy.divergence(), toy.student_3c)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_the_released_code_counts_the_single_step_twice() -> None:
    toy = Toy()
    once, twice, without = (
        toy.expected_gradient(MiniLlmConfig(advantage=replace(PLAIN, **change)))
        for change in ({}, {"long_includes_current": True}, {"reward_scaling": 1e12})
    )  # the last one has nothing but the single step
    assert without.abs().max() > 0.05
    torch.testing.assert_close(twice - once, without, rtol=0, atol=1e-7)


def test_a_student_like_its_teacher_stays_as_it_is() -> None:
    toy = Toy(same=True)
    for advantage in (PLAIN, AdvantageConfig()):
        assert toy.expected_gradient(MiniLlmConfig(advantage=advantage)).abs().max() < 1e-12


def test_single_step_gradient_is_the_analytic_one() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, **DOUBLE)
    table = student[:, None].clone().requires_grad_()
    label = torch.tensor([[2]])
    shard = VocabShard(first=0, size=5, valid=5, group=None)
    one = torch.ones(1, 1, 1, **DOUBLE)
    heads = [Head(hidden_sbh=one, weight_vh=t, shard=shard) for t in (table, teacher[:, None])]
    batch = rollout(label, torch.ones_like(label, dtype=torch.bool))
    MiniLlm(LossConfig())(heads[0], batch, heads[1]).loss_sum.backward()
    log_q, log_p = student.log_softmax(0), teacher.log_softmax(0)
    kl = (log_q.exp() * (log_q - log_p)).sum()
    assert table.grad is not None
    torch.testing.assert_close(
        table.grad[:, 0], log_q.exp() * (log_q - log_p - kl), atol=1e-7, rtol=0
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (CODE, [2, 2.5, 3]),
        (CODE | {"gamma": 0.95}, [1.8692, 2.425, 3]),
        ({"whiten": "none"}, [2.5, 3, 0]),
        ({"whiten": "none", "length_norm": "printed"}, [5, 3, 0]),
        ({"whiten": "none", "length_norm": "none"}, [5, 3, 0]),
    ],
)
def test_advantages_of_one_two_three(settings: dict, expected: list[float]) -> None:
    config = AdvantageConfig(**settings)
    three, mask = torch.tensor([[1.0, 2, 3]], **DOUBLE), torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(
        advantages(three, mask, config)[0], torch.tensor(expected, **DOUBLE), atol=5e-5, rtol=0
    )
    around = torch.nn.functional.pad(mask, (2, 4))
    rewards_bs = torch.nn.functional.pad(three, (2, 4), value=0.0)
    assert torch.equal(
        advantages(rewards_bs, around, config)[:, 2:5], advantages(three, mask, config)
    )
    assert not advantages(rewards_bs, around, config)[~around].any()


def test_rewards_are_scaled_then_held() -> None:
    logprobs = torch.tensor([[[-9.0, -1.0, -1.0, -5.0]], [[-2.0, -2.0, -9.0, -1.0]]])
    mask = torch.tensor([[True, True, True, False]])
    config = AdvantageConfig(reward_scaling=0.5, reward_clip=10)
    assert rewards(logprobs, mask, config).tolist() == [[10, -2, -10, 0]]


def test_whitening_gives_mean_zero_and_variance_one_over_what_is_counted() -> None:
    values = torch.tensor([[3.0, -1.0, 2.5, 0.0]], **DOUBLE)
    mask = values != 0
    sums = torch.tensor([3, values.sum(), values.square().sum()], **DOUBLE)
    found = whitened(values, mask, sums)
    assert found[mask].mean().abs() < 1e-12
    assert found[mask].var(correction=0) == pytest.approx(1)
    assert found[0, 3] == 0
    # The released code counts the padding, whose advantage is 0.
    padded = whitened(values, mask, sums + torch.tensor([1, 0, 0]))
    everything = (values - values.mean()) / values.var(correction=0).sqrt()
    torch.testing.assert_close(padded[mask], everything[mask], rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip_importance", [False, True])
def test_weights_have_the_gradient_of_clipped_ppo(clip_importance: bool) -> None:
    config = AdvantageConfig(clip_importance=clip_importance)
    advantage, ratio, importance = (
        t.flatten()
        for t in torch.meshgrid(
            torch.tensor([-2.0, 0.5], **DOUBLE), torch.tensor([0.5, 0.9, 1.1, 1.5], **DOUBLE),
            torch.tensor([0.3, 1.0, 1.25], **DOUBLE), indexing="ij",
        )
    )  # fmt: skip
    change = torch.zeros_like(ratio, requires_grad=True)  # of log q
    now = ratio * change.exp()
    if clip_importance:
        now, outside = now * importance, torch.ones_like(now)
    else:
        outside = importance
    loss = torch.maximum(-advantage * now, -advantage * now.clamp(0.8, 1.2)) * outside
    loss.sum().backward()
    found, weight = policy_gradient(advantage, ratio, importance, config)
    torch.testing.assert_close(found, loss.detach())
    assert change.grad is not None
    torch.testing.assert_close(-weight, change.grad)
    held = int((weight == 0).sum())
    assert 0 < held < len(weight)


def test_a_second_update_follows_the_ratio_of_probabilities_as_far_as_the_clip() -> None:
    toy = Toy()
    torch.manual_seed(1)
    advantage, importance = torch.randn(9, 2), torch.rand(9, 2) * 1.25
    now_bt = toy.logprobs(toy.student_3c)
    wrote_bt = now_bt.detach() - 0.4 * torch.randn(9, 2)
    ratio = (now_bt - wrote_bt).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) * importance
    (expected,) = torch.autograd.grad(-surrogate.sum(), toy.student_3c)
    written = torch.ones(9, 2, dtype=torch.bool)
    batch = rollout(
        toy.written, written, advantage_bs=advantage, importance_bs=importance,
        logprob_bs=wrote_bt,
    )  # fmt: skip
    states = torch.nn.functional.one_hot(toy.contexts.t(), 4).double()
    student = Head(hidden_sbh=states, weight_vh=toy.student_3c, shard=WHOLE)
    same = Head(hidden_sbh=states, weight_vh=toy.student_3c.detach(), shard=WHOLE)  # no KL
    output = MiniLlm(LossConfig(), MiniLlmConfig(ppo_epochs=2))(student, batch, same)
    (found,) = torch.autograd.grad(output.loss_sum, toy.student_3c)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float(output.metrics["policy loss"][0]) == pytest.approx(
        -float(surrogate.sum()), rel=1e-5
    )


def test_a_warm_start_is_language_modeling() -> None:
    objective = MiniLlm(LossConfig(), MiniLlmConfig(warm_start_samples=16))
    assert objective.plain_samples == 16
    moments = [Progress(consumed=at, total=99, warmup=1, decay=1) for at in (0, 15, 16)]
    found = [objective.at(moment) for moment in moments]
    assert [type(each) for each in found] == [LanguageModeling, LanguageModeling, MiniLlm]
    assert not found[0].explores


def test_work_of_an_update_is_that_of_the_paper() -> None:
    objective = MiniLlm(LossConfig())
    assert (objective.student_passes, objective.teacher_passes) == (4, 2)
    priced = METHODS["minillm"]
    assert (priced.student_passes, priced.teacher_passes) == (4, 2)
    assert MiniLlm(LossConfig(), MiniLlmConfig(ppo_epochs=4)).student_passes == 13


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MiniLlmConfig(lm_kd_ratio=2), "--lm-kd-ratio 2"),
        (lambda: MiniLlmConfig(ppo_epochs=0), "--ppo-epochs 0"),
        (lambda: MiniLlmConfig(lm_coef=-1), "--lm-coef -1"),
        (lambda: AdvantageConfig(gamma=1.5), "--gamma 1.5"),
        (lambda: AdvantageConfig(reward_clip=0), "--reward-clip 0"),
        (lambda: RolloutConfig(prompt_length=0), "--prompt-length 0"),
        (lambda: RolloutConfig(teacher_mixture=1), "importance weights have no bound"),
        (lambda: MiniLlm(LossConfig()).taught_by(SignalFacts(stored=True)), "--teacher online"),
    ],
)
def test_settings_without_a_meaning_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
