"""The log line is Megatron's, and every sink gets the same rows."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_miniplm.core.lines import read_objects
from megatron_miniplm.training.resume import Counters
from megatron_miniplm.training.sinks import JsonLines
from megatron_miniplm.training.step import StepReport
from megatron_miniplm.training.telemetry import (
    RunFacts,
    Telemetry,
    TelemetryConfig,
    hours_so_far,
    log_line,
)
from megatron_miniplm.training.timers import Timers

FACTS = RunFacts(train_iters=100, train_samples=800, flops_per_sample=1e9, peak_flops=1e12)


def report(loss: float) -> StepReport:
    return StepReport(losses={"lm loss": loss}, num_tokens=80, grad_norm=0.5, learning_rate=1e-3)


def at(iteration: int) -> Counters:
    return Counters(iteration, 8 * iteration, 80 * iteration)


def telemetry_of(folder: Path, facts: RunFacts = FACTS, interval: int = 1) -> Telemetry:
    folder.mkdir(exist_ok=True)
    return Telemetry(
        facts,
        sinks=[JsonLines(folder / "metrics.jsonl", 0)],
        timers=Timers(),
        config=TelemetryConfig(log_interval=interval),
    )


def rows(folder: Path) -> list[dict]:
    return read_objects(folder / "metrics.jsonl")


def test_logged_loss_is_the_mean_since_the_last_log(tmp_path: Path) -> None:
    telemetry = telemetry_of(tmp_path, interval=2)
    for iteration, loss in enumerate([4.0, 2.0, 1.0, 1.0], start=1):
        telemetry.step(at(iteration), report(loss), global_batch_size=8)
    first, second = rows(tmp_path)
    assert (first["lm loss"], second["lm loss"]) == (3.0, 1.0)
    assert (first["consumed_samples"], first["consumed_tokens"]) == (16, 160)
    assert first["world size"] == 1
    flops_per_second = 1e9 * 16 / (2 * first["iteration time (ms)"] / 1e3)
    assert abs(first["mfu"] - flops_per_second / 1e12) <= 1e-9 * first["mfu"]


def test_a_metric_that_some_updates_have_is_the_mean_of_these(tmp_path: Path) -> None:
    telemetry = telemetry_of(tmp_path, interval=2)
    telemetry.step(at(1), report(4.0), global_batch_size=8)
    both = replace(report(2.0), losses={"lm loss": 2.0, "reverse kl": 6.0})
    telemetry.step(at(2), both, global_batch_size=8)
    (row,) = rows(tmp_path)
    assert (row["lm loss"], row["reverse kl"]) == (3.0, 6.0)


def test_rates_count_the_samples_of_batches_of_several_sizes(tmp_path: Path) -> None:
    telemetry = telemetry_of(tmp_path, interval=2)
    telemetry.step(at(1), report(4.0), global_batch_size=8)
    telemetry.step(at(2), report(4.0), global_batch_size=24)
    (row,) = rows(tmp_path)
    flops_per_second = 1e9 * (8 + 24) / (2 * row["iteration time (ms)"] / 1e3)
    assert row["mfu"] == pytest.approx(flops_per_second / 1e12)


def test_throughput_is_said_without_and_with_the_teachers_forward_pass(tmp_path: Path) -> None:
    facts = replace(FACTS, flops_per_sample=3e12, teacher_flops_per_sample=1e12, times_plain=4.0)
    for name, given in (("with", facts), ("without", FACTS)):
        telemetry_of(tmp_path / name, given).step(at(1), report(4.0), global_batch_size=8)
    (row,), (plain,) = (rows(tmp_path / name) for name in ("with", "without"))
    alone = row["throughput (TFLOP/s/GPU)"]
    assert row["throughput with teacher (TFLOP/s/GPU)"] == pytest.approx(alone * 4 / 3)
    assert row["mfu"] == pytest.approx(alone), "the peak is 1 TFLOP/s: the student's alone"
    assert row["mfu with teacher"] == pytest.approx(alone * 4 / 3)
    assert (row["FLOPs (x 6 N D)"], plain.get("FLOPs (x 6 N D)")) == (4.0, None)
    assert log_line(row, 100, losses=["lm loss"]).count("with teacher") == 1
    assert "with teacher" not in log_line(plain, 100, losses=["lm loss"])


def test_updates_before_a_teachers_first_one_are_counted_as_plain_ones(tmp_path: Path) -> None:
    facts = replace(FACTS, times_plain=4.0, plain_samples=16)
    telemetry = telemetry_of(tmp_path, facts)
    for update in (1, 2, 3):
        telemetry.step(at(update), report(4.0), global_batch_size=8)
    assert [row["FLOPs (x 6 N D)"] for row in rows(tmp_path)] == [1.0, 1.0, 4.0]


def test_time_of_validations_and_saves_is_not_time_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    telemetry = telemetry_of(tmp_path, interval=2)
    telemetry.window.started = clock[0]
    clock[0] += 1.0
    telemetry.step(at(1), report(4.0), global_batch_size=8)
    with telemetry.aside("validation"):
        clock[0] += 50.0
    telemetry.validation(at(1), {"lm loss": 1.0})
    clock[0] += 1.0
    telemetry.step(at(2), report(4.0), global_batch_size=8)
    assert rows(tmp_path)[-1]["iteration time (ms)"] == pytest.approx(1000.0)


def test_parts_are_timed_by_the_update_and_waiting_is_a_share_of_it(tmp_path: Path) -> None:
    telemetry = telemetry_of(tmp_path, interval=2)
    for iteration in (1, 2):
        with telemetry.timers.host("data wait"):
            time.sleep(0.02)
        with telemetry.timers.device("optimizer"):
            time.sleep(0.01)
        telemetry.step(at(iteration), report(4.0), global_batch_size=8)
    (row,) = rows(tmp_path)
    fastest, slowest = row["timers (ms)"]["data wait"]
    assert fastest == slowest >= 20
    assert row["timers (ms)"]["optimizer"][1] >= 10
    assert row["data wait"] == pytest.approx(slowest / row["iteration time (ms)"])
    assert telemetry.timers.read() == {}, "the next line starts from zero"


def test_gpu_hours_count_every_start_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for start in range(2):
        before = hours_so_far(tmp_path / "metrics.jsonl")
        telemetry = telemetry_of(tmp_path, replace(FACTS, hours_before=before))
        clock[0] += 1800.0
        telemetry.step(at(start + 1), report(4.0), global_batch_size=8)
    assert hours_so_far(tmp_path / "metrics.jsonl") == pytest.approx(1.0)


def test_log_line_has_megatrons_fields_in_megatrons_order(tmp_path: Path) -> None:
    telemetry_of(tmp_path).step(at(1), report(4.0), global_batch_size=8)
    line = log_line(rows(tmp_path)[0], 100, losses=["lm loss"])
    fields = [part.split(":")[0].strip() for part in line.split(" | ")]
    assert fields[:8] == [
        "iteration        1/     100", "consumed samples", "elapsed time per iteration (ms)",
        "throughput per GPU (TFLOP/s/GPU)", "learning rate", "global batch size", "lm loss",
        "grad norm",
    ]  # fmt: skip
    assert "lm loss: 4.000000E+00" in line
    assert json.dumps(rows(tmp_path)[0]), "the row is plain JSON"
