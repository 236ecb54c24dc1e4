"""Killed at a random moment and started again, a stage ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.data.scores import Scores
from megatron_miniplm.models.checkpoint import latest_checkpoint
from tests.pool import PROJECT, RankPool, kill_group
from tests.runs import assert_same_files, curve, losses, pretrain_flags, score_flags
from tests.torchrun import kill_all, start_command


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


@pytest.fixture(scope="module")
def whole(pool: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run, saving as often as the killed ones."""
    save = tmp_path_factory.mktemp("whole") / "run"
    pool.run(pretrain_flags(corpus, save, "--save-interval", "4"), 1)
    return save


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_pretrain_saves_and_exits_cleanly_on_a_signal(
    number: signal.Signals, whole: Path, pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    flags = pretrain_flags(corpus, save, "--save-interval", "2", "--async-save")
    process = start(flags)
    wait_until(lambda: count_lines(save / "metrics.jsonl") >= 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    steps = len(curve(save))
    assert 3 <= steps < 20
    assert latest_checkpoint(save) == save / f"iter_{steps:07d}"
    pool.run(flags, 1)
    assert losses(save) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_torchrun_reaches_its_ranks_which_save(
    number: signal.Signals, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torchrun --signals-to-handle: others end it at once, and leave its ranks alone.
    handled = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", handled)
    save, log = tmp_path / "run", tmp_path / "log"
    process = start_command(pretrain_flags(corpus, save, iterations=100_000), ranks=2, log=log)
    try:
        deadline = time.monotonic() + 600
        while count_lines(save / "metrics.jsonl") < 3:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        process.send_signal(number)
        code = process.wait(timeout=120)
        print(f"\n{number.name} to torchrun: its exit code is {code}")
        assert latest_checkpoint(save) == save / f"iter_{len(curve(save)):07d}"
    finally:
        kill_all(process)


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


def test_cache_logits_killed_and_resumed_with_another_dp_size_gives_the_same_bytes(
    pool: RankPool, big_corpus: Path, model: Path, tmp_path: Path
) -> None:
    def flags(name: str) -> list[str]:
        return [
            "cache-logits", "--data-path", str(big_corpus), "--load", str(model),
            "--output", str(tmp_path / name), "--micro-batch-size", "64", "--top-k", "8",
        ]  # fmt: skip

    output = tmp_path / "store"
    process = start(flags("store"))
    wait_until(lambda: bool(list(output.glob("journal/*.window"))), process)
    kill_group(process)
    assert not (output / "manifest.json").exists(), "it was killed too late to show anything"
    with pytest.raises(Exception, match="incomplete"):
        RecordStore.open(output)
    pool.run(flags("store"), 2)
    pool.run(flags("whole"), 1)
    names = ["index.npy", "manifest.json", *RecordStore.open(output).manifest.content["files"]]
    for name in names:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
