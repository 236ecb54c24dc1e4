"""Commands in a process of their own, and the memory that they take (Linux)."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_miniplm.core.errors import MiniPLMError

_POLL_S = 0.005


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a child process took."""

    seconds: float
    """From its start to its end."""
    peak_resident: int
    """Bytes, file-backed pages included."""
    peak_anonymous: int
    """Bytes of memory that no file backs: what counts against a limit when memory is short."""
    output: str
    """What it wrote to stdout."""


def run_measured(words: Sequence[str]) -> Figures:
    """Run a command and follow its memory; refuses one that fails.

    The peak is the kernel's high-water mark of the process itself (``VmHWM``), read while it runs:
    ``ru_maxrss`` would count the pages of the process that started it. The anonymous peak is the
    highest of samples 5 ms apart.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(words, stdout=output, stderr=errors)
        resident = anonymous = 0
        while process.poll() is None:
            status = _memory(process.pid)
            resident = max(resident, status.get("VmHWM", 0))
            anonymous = max(anonymous, status.get("RssAnon", 0))
            time.sleep(_POLL_S)
        seconds = time.perf_counter() - start
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise MiniPLMError(
                f"{' '.join(words[:6])} ... ended with code {process.returncode}: "
                f"{errors.read().decode(errors='replace')[-2000:]}"
            )
        return Figures(
            seconds=seconds,
            peak_resident=resident,
            peak_anonymous=anonymous,
            output=output.read().decode(),
        )


def _memory(pid: int) -> dict[str, int]:
    """Bytes, by the names of /proc/PID/status; nothing for a process that just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith(("VmHWM:", "RssAnon:")))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields}
