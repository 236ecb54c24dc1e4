"""Temperatures that follow the teacher: golden values, bounds, shards, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.signal import SignalFacts
from megatron_miniplm.models.teacher_stats import TeacherStats, dense_stats
from megatron_miniplm.objectives.kd import Distillation, KdConfig
from megatron_miniplm.objectives.objective import LossConfig
from megatron_miniplm.objectives.temperature import Temperature, TemperatureConfig
from megatron_miniplm.parallel.vocab import VocabShard

# The vectors of test_sparse_kd.py.
TEACHER = [2.0, 1.0, 0.0, -1.0, -2.0]
STUDENT = [1.0, 1.5, -0.5, 0.0, -1.0]
VOCAB = 7


def temperature(method: str, base: float = 1.0, **settings) -> Temperature:
    config = TemperatureConfig(kd_temperature_method=method, **settings)
    return Temperature(config=config, base=base, student=None, power=0)


def stats(entropy: float = 1.0, std: float = 2.0) -> TeacherStats:
    return TeacherStats(
        entropy=torch.tensor([entropy]), logit_std=torch.tensor([std]), power_sum=torch.ones(1)
    )


def one_token(config: KdConfig) -> tuple[float, dict[str, float]]:
    """(loss, metrics) of the golden vectors as logits of one token of label 0."""
    shard = VocabShard(first=0, size=5, valid=5, group=None)

    def head(logits: list[float]) -> Head:
        hidden = torch.tensor(logits, dtype=torch.float64)[None, None]
        return Head(hidden_sbh=hidden, weight_vh=torch.eye(5, dtype=torch.float64), shard=shard)

    one = torch.zeros(1, 1, dtype=torch.int64)
    batch = Batch(one, one, one == 0, torch.zeros(1))
    output = Distillation(LossConfig(), config)(head(STUDENT), batch, head(TEACHER))
    return float(output.loss_sum), {k: float(v[0]) for k, v in output.metrics.items()}


def test_wttm_has_the_golden_values() -> None:
    adaptive = TemperatureConfig(kd_temperature_method="wttm")
    loss, metrics = one_token(KdConfig(kd_alpha=1.0, kd_temperature=2.0, adaptive=adaptive))
    assert loss == pytest.approx(0.261189, abs=1e-6)
    assert metrics["kd loss"] == pytest.approx(0.140344, abs=1e-6)
    assert loss / metrics["kd loss"] == pytest.approx(1.861057, abs=1e-6)


def test_a_student_at_its_own_temperature_sets_the_factor_of_the_divergence() -> None:
    at_one = KdConfig(kd_alpha=1.0, kd_temperature=2.0, kd_student_temperature=1.0)
    loss, metrics = one_token(at_one)
    assert loss == pytest.approx(metrics["kd loss"])
    both, metrics = one_token(KdConfig(kd_alpha=1.0, kd_temperature=2.0))
    assert both == pytest.approx(4 * metrics["kd loss"])
    assert loss == pytest.approx(0.140344, abs=1e-6)


@pytest.mark.parametrize("mirrored", [False, True])
def test_adaptive_temperatures_keep_their_bounds_and_go_one_way(mirrored: bool) -> None:
    sure, unsure = stats(0.01, 50.0), stats(math.log(VOCAB), 0.01)
    for method, settings in (("adakd-sd", {"kd_temperature_center": 2.0}), ("adakd-h", {})):
        found = temperature(method, kd_temperature_mirrored=mirrored, **settings)
        high, low = (float(found.tau(each, VOCAB)) for each in (sure, unsure))
        assert (high < low) == mirrored
        assert (high, low) == pytest.approx((0.5, 2.0) if mirrored else (2.0, 0.5), abs=0.01)


def test_at_the_center_the_temperature_is_the_base() -> None:
    found = temperature("adakd-sd", base=1.3, kd_temperature_center=2.0)
    assert float(found.tau(stats(std=2.0), VOCAB)) == pytest.approx(1.3)


def test_normkd_divides_by_the_std_even_where_there_is_none() -> None:
    found = temperature("normkd", base=2.0)
    assert float(found.tau(stats(std=3.0), VOCAB)) == pytest.approx(6.0)
    assert math.isfinite(found.of(stats(std=0.0), VOCAB).teacher)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_statistics_are_by_their_definitions_and_of_the_real_vocabulary(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(6, 24, dtype=torch.float64) * 3 + 100).to(dtype)
    logits[:, 21:] = 1e4
    real = logits[:, :21].double()
    q = real.softmax(-1)
    shard = VocabShard(first=0, size=24, valid=21, group=None)
    found = dense_stats(logits, shard, temperature=2.5)
    close = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for value, expected in (
        (found.entropy, -(q * q.log()).sum(-1)),
        (found.logit_std, real.std(-1)),
        (found.power_sum, q.pow(1 / 2.5).sum(-1)),
    ):
        torch.testing.assert_close(value.double(), expected, **close)
    assert dense_stats(logits, shard, temperature=None).power_sum.unique().tolist() == [1]


def test_the_student_of_normkd_is_at_one_and_its_divergence_has_no_factor() -> None:
    adaptive = TemperatureConfig(kd_temperature_method="normkd")
    found = KdConfig(kd_temperature=2.0, adaptive=adaptive).temperature.of(stats(std=3.0), VOCAB)
    assert (found.student, found.weight, float(found.teacher)) == (1, 1, pytest.approx(1 / 6))


def test_a_center_divides_the_weights_of_wttm() -> None:
    adaptive = TemperatureConfig(kd_temperature_method="wttm", kd_temperature_center=1.5)
    loss, _ = one_token(KdConfig(kd_alpha=1.0, kd_temperature=2.0, adaptive=adaptive))
    assert loss == pytest.approx(0.261189 / 1.5, abs=1e-6)


def test_a_temperature_that_adakd_h_does_not_look_at_is_refused() -> None:
    adaptive = TemperatureConfig(kd_temperature_method="adakd-h")
    with pytest.raises(ConfigError, match=r"--kd-temperature 2.0 has no effect on .* adakd-h"):
        KdConfig(kd_temperature=2.0, adaptive=adaptive)


def test_the_center_is_the_stores_unless_it_is_said() -> None:
    def center(facts: SignalFacts, said: float | None = None) -> float:
        adaptive = TemperatureConfig(kd_temperature_method="adakd-sd", kd_temperature_center=said)
        objective = Distillation(LossConfig(), KdConfig(adaptive=adaptive))
        return objective.taught_by(facts).temperature.center

    stored = SignalFacts(mean_logit_std=2.5)
    assert center(stored) == 2.5
    assert center(stored, 3.0) == 3.0
    with pytest.raises(ConfigError, match="needs --kd-temperature-center"):
        center(replace(stored, mean_logit_std=None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_temperature_min": 0.1}, "no effect on --kd-temperature-method fixed"),
        ({"kd_temperature_method": "adakd-h", "kd_temperature_center": 2.0}, "only on adakd-sd"),
        ({"kd_temperature_method": "adakd-h", "kd_temperature_min": 3.0}, "at most --kd-temp"),
    ],
)
def test_temperatures_that_mean_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TemperatureConfig(**settings)
