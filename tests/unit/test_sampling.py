"""Draws follow the distribution they claim, and say the probability of what they drew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.sampling import Sampler, SamplingConfig, _invert, uniform

VOCAB = 50
DRAWS = 20_000


def logits(seed: int = 0, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCAB, generator=generator)


def draws(sampler: Sampler, *models: torch.Tensor) -> np.ndarray:
    """How often each column was drawn, of rows that differ by their id alone."""
    drawn = sampler([one.expand(DRAWS, -1) for one in models], np.arange(DRAWS), 7)
    return np.bincount(drawn.tokens_n.numpy(), minlength=VOCAB)


def p_value(counts: np.ndarray, probs: torch.Tensor) -> float:
    """Of a chi-square test; columns that cannot be drawn must not have been."""
    expected = probs.double().numpy() * counts.sum()
    assert not counts[expected == 0].any()
    there = expected > 0
    rare = there & (expected < 5)
    observed = np.append(counts[there & ~rare], counts[rare].sum())
    wanted = np.append(expected[there & ~rare], expected[rare].sum())
    if not wanted[-1]:
        observed, wanted = observed[:-1], wanted[:-1]
    return float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


def test_draws_are_distributed_as_the_softmax_says() -> None:
    one = logits()
    found = p_value(draws(Sampler(SamplingConfig()), one), one[0].softmax(-1))
    print(f"\nchi-square test, {DRAWS} draws of {VOCAB} tokens: p = {found:.3f}")
    assert found > 1e-3
    other = p_value(draws(Sampler(SamplingConfig(temperature=1.1)), one), one[0].softmax(-1))
    assert other < 1e-6, "the test tells a temperature of 1.1 from 1"


@pytest.mark.parametrize(
    "cut", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 8, "top_p": 0.8, "temperature": 0.8}],
    ids=str,
)  # fmt: skip
def test_cuts_are_those_of_transformers(cut: dict[str, float]) -> None:
    process = pytest.importorskip("transformers", reason="the [hf] extra is not installed")
    scores = one = logits()
    scores = process.TemperatureLogitsWarper(cut.get("temperature", 1.0))(None, scores)
    if "top_k" in cut:
        scores = process.TopKLogitsWarper(int(cut["top_k"]))(None, scores)
    if "top_p" in cut:
        scores = process.TopPLogitsWarper(cut["top_p"])(None, scores)
    probs = scores[0].softmax(-1)
    sampler = Sampler(SamplingConfig(**cut))  # type: ignore[arg-type]
    assert p_value(draws(sampler, one), probs) > 1e-3
    drawn = sampler([one.expand(300, -1)], np.arange(300), 0)
    torch.testing.assert_close(drawn.sampling_logprob_n, probs[drawn.tokens_n].log())
    torch.testing.assert_close(drawn.logprobs_mn[0], one[0].log_softmax(-1)[drawn.tokens_n])


def test_a_mixture_is_drawn_as_it_is_weighed() -> None:
    student, teacher = logits(0), logits(1)
    sampler = Sampler(SamplingConfig(temperature=0.9, top_p=0.9), mixture=0.3)
    parts = [Sampler(sampler.config)._mixed([one])[0].double() for one in (student, teacher)]
    mixed = 0.7 * parts[0] + 0.3 * parts[1]
    assert p_value(draws(sampler, student, teacher), mixed) > 1e-3
    rows = [one.expand(500, -1) for one in (student, teacher)]
    drawn = sampler(rows, np.arange(500), 0)
    expected = mixed[drawn.tokens_n].log().float()
    torch.testing.assert_close(drawn.sampling_logprob_n, expected, atol=1e-5, rtol=1e-5)


def test_the_mean_of_the_importance_weights_is_one() -> None:
    student, teacher = logits(0), logits(1)
    sampler = Sampler(SamplingConfig(temperature=1.3), mixture=0.4)
    rows = [one.expand(DRAWS, -1) for one in (student, teacher)]
    drawn = sampler(rows, np.arange(DRAWS), 0)
    weights = (drawn.logprobs_mn[0] - drawn.sampling_logprob_n).exp().double()
    error = float(weights.std()) / DRAWS**0.5
    assert abs(float(weights.mean()) - 1) < 4 * error < 0.1


def test_uniform_numbers_are_uniform_along_every_key() -> None:
    along = {
        "seed": np.array([uniform(s, np.array([1]), 2)[0] for s in range(5000)]),
        "id": uniform(1, np.arange(5000), 2),
        "position": uniform(1, np.zeros(5000, np.int64), np.arange(5000)),
    }
    for name, numbers in along.items():
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3, name
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06, name
    assert uniform(1, np.array([5]), 6)[0] != uniform(1, np.array([6]), 5)[0]
    assert uniform(1, np.array([5]), 6)[0] == uniform(1, np.array([4, 5]), np.array([9, 6]))[1]


def test_the_first_and_the_last_number_draw_tokens_that_can_be_drawn() -> None:
    one = logits()
    one[:, :3] = one[:, 20:] = -torch.inf
    for number, expected in ((0.0, 3), (np.nextafter(1.0, 0), 19)):
        tokens, _ = _invert(one.softmax(-1), torch.tensor([number], dtype=torch.float64))
        assert tokens == expected


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}],
    ids=str,
)  # fmt: skip
def test_settings_without_a_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        SamplingConfig(**wrong)  # type: ignore[arg-type]
