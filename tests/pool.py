"""A reusable pool of ranks: real processes, real gloo, started once for all parallel tests.

Starting ranks costs seconds of imports, so they are kept and given one job after another: a job is
either a `miniplm` command line or a function named ``module:function``. Every job gets a fresh
process group of the size it asks for, exactly as torchrun would set it up (environment variables).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]


class RankFailedError(AssertionError):
    """A rank raised: its traceback is the message."""


class RankPool:
    """Up to `size` worker processes; `run` starts those that a job needs."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder, self.jobs = size, folder, 0
        self.workers: list[subprocess.Popen[bytes]] = []

    def run(self, job: str | list[str], world: int, *, timeout: float = 240, **kwargs: Any) -> list:
        """Results of all ranks, in rank order; raises what the first failing rank raised."""
        assert world <= self.size, f"the pool has {self.size} ranks, not {world}"
        while len(self.workers) < world:
            self._start()
        self.jobs += 1
        port = free_port()
        results = [self.folder / f"{self.jobs}.{rank}.pickle" for rank in range(world)]
        for rank in range(world):
            order = {
                "job": job, "kwargs": kwargs, "rank": rank, "world": world, "port": port,
                "result": str(results[rank]),
            }  # fmt: skip
            stdin = self.workers[rank].stdin
            assert stdin is not None
            pickle.dump(order, stdin)
            stdin.flush()
        return self._collect(results, timeout)

    def _collect(self, paths: list[Path], timeout: float) -> list:
        deadline = time.monotonic() + timeout
        while not all(path.exists() for path in paths):
            failed = [path for path in paths if path.exists() and not _read(path)[0]]
            dead = [worker for worker in self.workers if worker.poll() is not None]
            if failed or dead or time.monotonic() > deadline:
                time.sleep(0.5)  # let the others fail with their own words
                break
            time.sleep(0.01)
        outcomes = [_read(path) if path.exists() else None for path in paths]
        errors = [text for ok, text in filter(None, outcomes) if not ok]
        if None in outcomes:
            self.close()  # a rank that hangs or died cannot be used again
        if errors or None in outcomes:
            raise RankFailedError(errors[0] if errors else "a rank died or did not finish in time")
        return [value for _, value in outcomes]  # type: ignore[misc]

    def _start(self) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        worker = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE, env=environment, cwd=PROJECT, start_new_session=True,
        )  # fmt: skip
        self.workers.append(worker)

    def close(self) -> None:
        """End every worker and whatever it started (checkpoint writers are forked)."""
        for worker in self.workers:
            kill_group(worker)
        self.workers = []


def kill_group(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process started in its own session, with its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _read(path: Path) -> tuple[bool, Any]:
    return pickle.loads(path.read_bytes())


def _serve() -> None:
    sys.path.insert(0, str(PROJECT))
    while True:
        try:
            order = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        os.environ.update(
            RANK=str(order["rank"]), LOCAL_RANK=str(order["rank"]),
            WORLD_SIZE=str(order["world"]), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(order["port"]),
        )  # fmt: skip
        try:
            outcome = (True, _run(order["job"], order["kwargs"]))
        except BaseException:  # noqa: BLE001 - whatever it was, the test shows it
            outcome = (False, f"rank {order['rank']}:\n{traceback.format_exc()}")
        gc.collect()
        path = Path(order["result"])
        draft = path.with_suffix(".draft")
        draft.write_bytes(pickle.dumps(outcome))
        draft.rename(path)


def _run(job: str | list[str], kwargs: dict[str, Any]) -> Any:
    if isinstance(job, str):
        module, _, name = job.partition(":")
        return getattr(importlib.import_module(module), name)(**kwargs)
    from megatron_miniplm.__main__ import stage_of
    from megatron_miniplm.core.config import parse_flags

    stage = stage_of(job[0])
    return stage.run(parse_flags(stage.Config, job[1:], prog=job[0]))


if __name__ == "__main__":
    _serve()
