"""A rank that dies or hangs ends the others: no process is left waiting for it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_miniplm.models.checkpoint import latest_checkpoint, verify_checkpoint
from tests.runs import TINY, pretrain_flags
from tests.torchrun import descendants, is_alive, kill_all, start_command

GONE_S = 60
"""Of the requirement; torchrun alone gives survivors 30 s between SIGTERM and SIGKILL."""


def seconds_until_gone(
    corpus: Path, folder: Path, *, ranks: int, number: signal.Signals, limit: float
) -> float:
    """Send a signal to the last rank of a run that trains; how long any process outlived it."""
    log, save = folder / "log", folder / "run"
    more = ["--save-interval", "2", "--async-save", "--distributed-timeout-minutes", "1"]
    flags = pretrain_flags(corpus, save, *TINY, *more, iterations=100_000)
    process = start_command(flags, ranks=ranks, log=log)
    try:
        deadline = time.monotonic() + 600
        while latest_checkpoint(save) is None:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        everyone = descendants(process.pid)
        workers = everyone[1 : 1 + ranks]
        os.kill(workers[-1], number)
        began = time.monotonic()
        while process.poll() is None or any(map(is_alive, everyone)):
            assert time.monotonic() - began < limit, [pid for pid in everyone if is_alive(pid)]
            time.sleep(0.05)
        seconds = time.monotonic() - began
        assert process.returncode != 0
        verify_checkpoint(latest_checkpoint(save) or save)
        print(f"\n{number.name} to one of {ranks} ranks: all gone after {seconds:.1f} s")
        return seconds
    finally:
        kill_all(process)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others(ranks: int, corpus: Path, tmp_path: Path) -> None:
    seconds_until_gone(corpus, tmp_path, ranks=ranks, number=signal.SIGKILL, limit=GONE_S)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_at_the_timeout(corpus: Path, tmp_path: Path) -> None:
    limit = 60 + GONE_S  # --distributed-timeout-minutes 1
    seconds_until_gone(corpus, tmp_path, ranks=2, number=signal.SIGSTOP, limit=limit)
