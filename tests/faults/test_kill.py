"""Killed at a random moment and started again, a stage ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_miniplm.data.scores import Scores
from tests.pool import PROJECT, RankPool, kill_group
from tests.runs import assert_same_files, curve, pretrain_flags, score_flags


def start(flags: list[str]) -> subprocess.Popen[str]:
    """The command as a user starts it, in a session of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_miniplm", *flags],
        env=environment, cwd=PROJECT, start_new_session=True, text=True, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Poll until `condition` holds; fails if the process ends or 120 s pass first."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"it ended before it was killed: {process.stderr.read()}"  # type: ignore[union-attr]
        assert time.monotonic() < deadline, "it did not get far enough in time"
        time.sleep(0.005)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def finish(flags: list[str]) -> None:
    """Run the command to its end; its exit code must be 0."""
    process = start(flags)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def whole(pool: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run, saving as often as the killed ones."""
    save = tmp_path_factory.mktemp("whole") / "run"
    pool.run(pretrain_flags(corpus, save, "--save-interval", "4"), 1)
    return save


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_pretrain_killed_at_random_steps_gives_the_same_curve(
    kills: int, whole: Path, corpus: Path, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    flags = pretrain_flags(corpus, save, "--save-interval", "4")
    for step in sorted(random.sample(range(5, 20), kills)):
        process = start(flags)
        wait_until(lambda at=step: count_lines(save / "metrics.jsonl") >= at, process)
        kill_group(process)
    print(f"\nkilled when step {step} was logged, after {count_lines(save / 'metrics.jsonl')}")
    finish(flags)
    found, expected = curve(save), curve(whole)
    assert [row["lm loss"] for row in found] == [row["lm loss"] for row in expected]
    assert [row["grad norm"] for row in found] == [row["grad norm"] for row in expected]
    assert [row["consumed_tokens"] for row in found] == [row["consumed_tokens"] for row in expected]


def test_pretrain_saves_and_exits_cleanly_on_sigterm(
    whole: Path, corpus: Path, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    flags = pretrain_flags(corpus, save)
    process = start(flags)
    wait_until(lambda: count_lines(save / "metrics.jsonl") >= 3, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    steps = len(curve(save))
    assert 3 <= steps < 20
    assert (save / f"iter_{steps:07d}" / "manifest.json").exists()
    finish(flags)
    assert [row["lm loss"] for row in curve(save)] == [row["lm loss"] for row in curve(whole)]


def test_score_killed_and_resumed_with_another_dp_size_gives_the_same_file(
    pool: RankPool, big_corpus: Path, model: Path, one_process: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scores"
    flags = score_flags(big_corpus, model, output)
    process = start(flags)
    wait_until(lambda: bool(list(output.glob("journal/*.window"))), process)
    kill_group(process)
    assert not (output / "manifest.json").exists(), "it was killed too late to show anything"
    with pytest.raises(Exception, match="incomplete"):
        Scores.open(output)
    pool.run(flags, 2)
    assert_same_files(output, one_process)
