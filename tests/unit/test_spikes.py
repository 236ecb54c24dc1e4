"""A loss that stands out is a spike; a slow change, or a new level that stays, is none for long."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.training.spikes import WINDOW, SpikeConfig, SpikeDetector

NOISE = np.random.default_rng(0).normal(0, 0.05, 1000)


def verdicts(losses: np.ndarray, **settings) -> list[bool]:
    detector = SpikeDetector(config=SpikeConfig(on_loss_spike="skip", **settings), say_rows=str)
    return [judge(detector, float(loss)) for loss in losses]


def judge(detector: SpikeDetector, loss: float) -> bool:
    batch = Batch(*[torch.zeros(2, 1)] * 3, torch.tensor([11, 12]))
    report = {"lm loss": torch.tensor([2 * loss, 2.0])}
    return detector.allows("lm loss", loss, [report], [batch])


def test_a_falling_noisy_loss_has_no_spike() -> None:
    assert all(verdicts(2 + 8 * np.exp(-np.arange(1000) / 100) + NOISE))


def test_a_loss_that_stands_out_is_left_out_and_the_next_is_not() -> None:
    losses = 3 + NOISE
    losses[400] += 1
    assert np.flatnonzero(~np.array(verdicts(losses))).tolist() == [400]
    assert all(verdicts(losses, loss_spike_stds=100))


def test_a_new_level_that_stays_is_accepted_soon() -> None:
    losses = 3 + NOISE
    losses[400:] += 1
    out = np.flatnonzero(~np.array(verdicts(losses)))
    assert out[0] == 400
    assert len(out) < 5


def test_nothing_is_judged_before_half_of_the_window() -> None:
    losses = 3 + NOISE
    losses[WINDOW // 2 - 1] += 100
    assert all(verdicts(losses[: WINDOW // 2 + 1]))


def test_a_warning_names_the_rows_and_keeps_the_update(caplog: pytest.LogCaptureFixture) -> None:
    detector = SpikeDetector(config=SpikeConfig(), say_rows=str)
    for loss in 3 + NOISE[:WINDOW]:
        judge(detector, float(loss))
    assert judge(detector, 9.0)
    assert "lm loss 9.0000 is a spike" in (said := caplog.text)
    assert "on [11 12] (rank 0" in said


def test_a_threshold_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--loss-spike-stds 0\.0 must be above 0"):
        SpikeConfig(loss_spike_stds=0.0)
