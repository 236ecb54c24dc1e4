"""Alpha over a run: golden values, ends, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.objectives.kd import Distillation, KdConfig
from megatron_miniplm.objectives.objective import LossConfig, Progress
from megatron_miniplm.objectives.schedules import AlphaConfig, wsd
from megatron_miniplm.training.optimizer import OptimizationConfig


def at(consumed: int, total: int = 10_000, warmup: int = 1000, decay: int = 1000) -> Progress:
    return Progress(consumed=consumed, total=total, warmup=warmup, decay=decay)


def alphas(config: AlphaConfig, highest: float, samples: list[int]) -> list[float]:
    return [config.alpha(highest, at(consumed)) for consumed in samples]


def test_wsd_has_the_golden_values() -> None:
    steps = [0, 500, 1000, 9000, 9500, 10_000]
    found = [wsd(step, 10_000, warmup=1000, decay=1000, highest=0.9) for step in steps]
    assert found == pytest.approx([0, 0.45, 0.9, 0.9, 0.45, 0], abs=1e-12)


def test_wsd_without_warmup_or_decay_is_constant() -> None:
    assert [wsd(s, 10, warmup=0, decay=0, highest=0.7) for s in (0, 5, 10)] == [0.7] * 3


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AlphaConfig(), [0.8, 0.8, 0.8, 0.8]),
        (AlphaConfig(kd_alpha_schedule="linear-inc"), [0, 0.2, 0.6, 0.8]),
        (AlphaConfig(kd_alpha_schedule="linear-dec", kd_alpha_min=0.4), [0.8, 0.7, 0.5, 0.4]),
        (AlphaConfig(kd_alpha_schedule="wsd", kd_alpha_min=0.2), [0, 0.8, 0.8, 0.2]),
        (AlphaConfig(kd_alpha_schedule="wsd-beta"), [0.8, 0, 0, 0.8]),
        (AlphaConfig(kd_alpha_schedule="wsd-beta", kd_alpha_min=0.2), [0.8, 0.2, 0.2, 0.8]),
        (AlphaConfig(kd_alpha_schedule="wsd", kd_alpha_warmup_fraction=0.5), [0, 0.4, 0.8, 0]),
        (AlphaConfig(kd_alpha_schedule="wsd", kd_alpha_decay_fraction=0.5), [0, 0.8, 0.4, 0]),
    ],
)
def test_shapes_go_from_end_to_end(config: AlphaConfig, expected: list[float]) -> None:
    assert alphas(config, 0.8, [0, 2500, 7500, 10_000]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", ["linear-inc", "linear-dec", "period", "wsd", "wsd-beta"])
def test_alpha_stays_between_its_ends_and_jumps_in_a_period_alone(shape: str) -> None:
    config = AlphaConfig(kd_alpha_schedule=shape, kd_alpha_min=0.4)
    for warmup, decay in ((1000, 1000), (9950, 1000), (0, 10_000), (10_000, 500)):
        moments = [at(s, warmup=warmup, decay=decay) for s in range(0, 10_000, 10)]
        found = [config.alpha(1.0, moment) for moment in moments]
        lowest = 0 if shape == "wsd" else 0.4  # its warm-up is from 0
        assert lowest - 1e-12 <= min(found) <= max(found) <= 1 + 1e-12
        steps = [abs(b - a) for a, b in pairwise(found)]
        # The shortest phase that is left of 10,000 samples is one of 50.
        assert shape == "period" or max(steps) < 0.6 * 10 / 50 * 1.6


def test_a_period_begins_high_and_stays_so_for_its_duty() -> None:
    config = AlphaConfig(kd_alpha_schedule="period", kd_alpha_period=0.4, kd_alpha_duty=0.25)
    assert alphas(config, 1.0, [0, 999, 1000, 3999, 4000, 4999, 5000]) == [1, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("style", ["WSD", "cosine"])
def test_phases_are_those_of_the_learning_rate(style: str) -> None:
    import torch

    from megatron_miniplm.training.optimizer import build_scheduler

    config = OptimizationConfig(lr_decay_style=style, lr_warmup_iters=5, lr_wsd_decay_iters=30)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer.param_groups[0]["wd_mult"] = 1.0
    scheduler = build_scheduler(
        config, optimizer, train_iters=100, samples_after=lambda updates: 8 * updates
    )
    decay = 30 if style == "WSD" else 10
    assert scheduler.progress(16, 800) == at(16, total=800, warmup=40, decay=8 * decay)


def test_the_objective_of_a_moment_has_its_alpha_and_the_run_keeps_its_own() -> None:
    alpha = AlphaConfig(kd_alpha_schedule="wsd")
    # The cross entropy's share is 0 on the plateau only, so a z-loss is not in vain.
    objective = Distillation(LossConfig(z_loss_weight=1e-4), KdConfig(kd_alpha=1.0, alpha=alpha))
    assert [objective.at(at(consumed)).alpha for consumed in (0, 500, 5000)] == [0, 0.5, 1.0]
    assert objective.alpha == 1.0
    assert objective.metric_names == (*Distillation.metric_names, "kd alpha")
    constant = Distillation(LossConfig(), KdConfig())
    assert constant.at(at(500)) is constant


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_alpha_min": 0.1}, "--kd-alpha-min 0.1 has no effect on --kd-alpha-schedule constant"),
        ({"kd_alpha_duty": 0.1, "kd_alpha_schedule": "wsd"}, "only on period"),
        ({"kd_alpha_period": 0.0, "kd_alpha_schedule": "period"}, "--kd-alpha-period 0.0 must be"),
        (
            {
                "kd_alpha_schedule": "wsd", "kd_alpha_warmup_fraction": 0.6,
                "kd_alpha_decay_fraction": 0.5,
            },
            "more than the whole run",
        ),
    ],
)  # fmt: skip
def test_schedules_that_mean_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AlphaConfig(**settings)


def test_a_lowest_alpha_above_the_highest_is_refused() -> None:
    alpha = AlphaConfig(kd_alpha_schedule="linear-inc", kd_alpha_min=0.6)
    with pytest.raises(ConfigError, match=r"--kd-alpha-min 0.6 is above --kd-alpha 0.5"):
        KdConfig(alpha=alpha)
