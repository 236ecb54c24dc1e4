"""The log line is Megatron's, and metrics.jsonl reads as one run after any number of resumes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_miniplm.training.resume import Counters
from megatron_miniplm.training.step import StepReport
from megatron_miniplm.training.telemetry import RunFacts, Telemetry, drop_rows_after, log_line

FACTS = RunFacts(
    train_iters=100, train_samples=800, flops_per_sample=1e9, world_size=1, peak_flops=1e12
)


def report(loss: float) -> StepReport:
    return StepReport(losses={"lm loss": loss}, num_tokens=80, grad_norm=0.5, learning_rate=1e-3)


def step(
    telemetry: Telemetry, iteration: int, said: StepReport, *, consumed_tokens: int, log_now: bool
) -> None:
    """An update of 8 instances that waited half a millisecond for them."""
    counters = Counters(
        iteration=iteration, consumed_samples=8 * iteration, consumed_tokens=consumed_tokens
    )
    telemetry.step(counters, said, global_batch_size=8, data_wait=5e-4, log_now=log_now)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_logged_loss_is_the_mean_since_the_last_log(tmp_path: Path) -> None:
    telemetry = Telemetry(FACTS, save=tmp_path, active=True)
    step(telemetry, 1, report(4.0), consumed_tokens=80, log_now=False)
    step(telemetry, 2, report(2.0), consumed_tokens=160, log_now=True)
    step(telemetry, 3, report(1.0), consumed_tokens=240, log_now=True)
    first, second = rows(tmp_path / "metrics.jsonl")
    assert (first["lm loss"], second["lm loss"]) == (3.0, 1.0)
    assert (first["consumed_samples"], first["consumed_tokens"]) == (16, 160)
    flops_per_second = 1e9 * 16 / (2 * first["iteration time (ms)"] / 1e3)
    assert abs(first["mfu"] - flops_per_second / 1e12) <= 1e-9 * first["mfu"]


def test_throughput_is_said_without_and_with_the_teachers_forward_pass(tmp_path: Path) -> None:
    facts = replace(FACTS, flops_per_sample=3e12, teacher_flops_per_sample=1e12)
    for name, given in (("with", facts), ("without", FACTS)):
        (tmp_path / name).mkdir()
        telemetry = Telemetry(given, save=tmp_path / name, active=True)
        step(telemetry, 1, report(4.0), consumed_tokens=80, log_now=True)
    (row,), (plain,) = (rows(tmp_path / n / "metrics.jsonl") for n in ("with", "without"))
    alone = row["throughput (TFLOP/s/GPU)"]
    assert row["throughput with teacher (TFLOP/s/GPU)"] == pytest.approx(alone * 4 / 3)
    assert row["mfu"] == pytest.approx(alone), "the peak is 1 TFLOP/s: the student's alone"
    assert row["mfu with teacher"] == pytest.approx(alone * 4 / 3)
    assert log_line(row, 100).count("with teacher") == 1
    assert "with teacher" not in log_line(plain, 100)


def test_ranks_that_do_not_log_write_nothing(tmp_path: Path) -> None:
    telemetry = Telemetry(FACTS, save=tmp_path, active=False)
    step(telemetry, 1, report(4.0), consumed_tokens=80, log_now=True)
    telemetry.validation(Counters(iteration=1, consumed_samples=8), {"lm loss": 1.0}, seconds=0)
    assert list(tmp_path.iterdir()) == []


def test_time_of_validation_is_not_time_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    telemetry = Telemetry(FACTS, save=tmp_path, active=True)
    telemetry.window.started = clock[0]
    clock[0] += 1.0
    step(telemetry, 1, report(4.0), consumed_tokens=80, log_now=False)
    clock[0] += 50.0
    telemetry.validation(Counters(iteration=1, consumed_samples=8), {"lm loss": 1.0}, seconds=50.0)
    clock[0] += 1.0
    step(telemetry, 2, report(4.0), consumed_tokens=160, log_now=True)
    assert rows(tmp_path / "metrics.jsonl")[-1]["iteration time (ms)"] == pytest.approx(1000.0)


def test_log_line_has_megatrons_fields_in_megatrons_order(tmp_path: Path) -> None:
    telemetry = Telemetry(FACTS, save=tmp_path, active=True)
    step(telemetry, 1, report(4.0), consumed_tokens=80, log_now=True)
    line = log_line(rows(tmp_path / "metrics.jsonl")[0], 100)
    fields = [part.split(":")[0].strip() for part in line.split(" | ")]
    assert fields[:8] == [
        "iteration        1/     100", "consumed samples", "elapsed time per iteration (ms)",
        "throughput per GPU (TFLOP/s/GPU)", "learning rate", "global batch size", "lm loss",
        "grad norm",
    ]  # fmt: skip
    assert "lm loss: 4.000000E+00" in line


def test_rows_beyond_the_checkpoint_and_a_cut_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [{"iteration": 1}, {"iteration": 2}, {"iteration": 3, "validation": {}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in good) + '{"iteration": 4, "lm l')
    drop_rows_after(path, 2)
    assert rows(path) == good[:2]
