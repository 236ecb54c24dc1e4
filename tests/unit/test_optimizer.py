"""Golden learning rates, and what the schedule refuses."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.training.optimizer import OptimizationConfig, build_scheduler

BATCH = 512


class Groups:
    """The part of a Megatron optimizer that the scheduler touches."""

    def __init__(self, config: OptimizationConfig) -> None:
        group = {"max_lr": config.lr, "min_lr": config.final_lr, "wd_mult": 1.0, "lr_mult": 1.0}
        self.param_groups = [{**group, "params": [torch.zeros(1)], "lr": 0.0, "weight_decay": 0.0}]


def rate(config: OptimizationConfig, update: int, train_iters: int = 100_000) -> float:
    """Learning rate that update number `update` (from 0) is taken with."""
    optimizer = Groups(config)
    scheduler = build_scheduler(
        config, optimizer, train_iters=train_iters, samples_after=lambda updates: updates * BATCH
    )
    scheduler.step(increment=update * BATCH)
    return optimizer.param_groups[0]["lr"]


PAPER = OptimizationConfig(lr=6e-4, min_lr=6e-5, lr_warmup_iters=2000)


@pytest.mark.parametrize(
    ("update", "expected"),
    [(0, 0.0), (1000, 3e-4), (2000, 6e-4), (51_000, 3.3e-4), (100_000, 6e-5)],
)
def test_golden_rates_of_the_paper(update: int, expected: float) -> None:
    assert math.isclose(rate(PAPER, update), expected, rel_tol=1e-12, abs_tol=1e-15)


def test_default_final_rate_is_a_tenth_and_betas_are_the_papers() -> None:
    config = OptimizationConfig(lr=2e-3)
    assert config.final_lr == pytest.approx(2e-4)
    assert (config.adam_beta1, config.adam_beta2, config.adam_eps) == (0.9, 0.98, 1e-6)
    assert (config.weight_decay, config.clip_grad) == (0.1, 1.0)


@pytest.mark.parametrize(
    ("update", "expected"),
    [(0, 0), (500, 0.45), (1000, 0.9), (9000, 0.9), (9500, 0.45), (10_000, 0)],
)
def test_golden_wsd_rates(update: int, expected: float) -> None:
    config = OptimizationConfig(
        lr=0.9, min_lr=0.0, lr_decay_style="WSD", lr_warmup_iters=1000, lr_wsd_decay_iters=1000
    )
    assert rate(config, update, train_iters=10_000) == pytest.approx(expected, abs=1e-12)


def test_linear_and_constant() -> None:
    linear = OptimizationConfig(lr=1.0, min_lr=0.0, lr_decay_style="linear")
    assert rate(linear, 25, train_iters=100) == pytest.approx(0.75)
    constant = OptimizationConfig(lr=1.0, min_lr=0.0, lr_decay_style="constant")
    assert rate(constant, 99, train_iters=100) == 1.0


def test_warmup_fraction_is_of_the_decay() -> None:
    config = OptimizationConfig(lr=1.0, min_lr=0.0, lr_warmup_fraction=0.1)
    assert rate(config, 5, train_iters=100) == pytest.approx(0.5)


def test_contradictions_are_refused_by_flag() -> None:
    with pytest.raises(ConfigError, match=r"--min-lr 0.1 is above --lr 0.01"):
        OptimizationConfig(lr=0.01, min_lr=0.1)
    with pytest.raises(ConfigError, match="give one"):
        OptimizationConfig(lr_warmup_fraction=0.1, lr_warmup_iters=10)
    with pytest.raises(ConfigError, match="lower --lr-warmup-iters or raise --train-iters"):
        rate(OptimizationConfig(lr_warmup_iters=100), 0, train_iters=100)
