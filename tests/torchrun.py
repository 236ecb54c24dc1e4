"""Real commands, as users start them: one process, or several under torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.pool import PROJECT, free_port


def start_command(flags: list[str], *, ranks: int, log: Path) -> subprocess.Popen[bytes]:
    """`miniplm` with these flags; what it says goes to `log`."""
    words = [sys.executable, "-m"]
    if ranks > 1:
        words += ["torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port"]
        words += [str(free_port()), "-m"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    with log.open("ab") as file:
        return subprocess.Popen(
            [*words, "megatron_miniplm", *flags],
            env=environment, cwd=PROJECT, start_new_session=True, stdout=file, stderr=file,
        )  # fmt: skip


def descendants(pid: int) -> list[int]:
    """A process and all that it started: torchrun puts each rank into a session of its own."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = status.read_text()
            parent = int(text.rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(status.parent.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a command with everything that it started, as a machine that loses power."""
    pids = descendants(process.pid)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)  # none of them reacts to the death of another
    for pid in {*pids, *descendants(process.pid)}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
