"""The ``.bin`` of a shard, read piece by piece in a way that can fail.

A mapped file that is truncated under its reader kills the process (SIGBUS), and a page fault in a
mapping may hold Python's interpreter for as long as the storage takes. `os.pread` answers both: it
comes back short, or with the system's error, and it lets other threads run meanwhile.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from threading import Lock

from megatron_miniplm.core.errors import DataError


class TokenFile:
    """One ``.bin``, opened when it is first read; any thread may read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = _identity(path.stat())
        self._lock = Lock()
        self._descriptor: int | None = None

    def read(self, begin: int, size: int) -> bytes:
        """`size` bytes from `begin`; refuses a file that is gone, shorter, or was written to."""
        try:
            descriptor = self._opened()
            found = _identity(os.fstat(descriptor))
            data = os.pread(descriptor, size, begin)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}; restore it") from error
        if found != self._known or len(data) < size:
            raise DataError(
                f"{self.path} changed while it was read: it had {self._known[0]} bytes when it was "
                f"opened and has {found[0]} now, and {len(data)} of {size} bytes from {begin} on "
                "were there; restore it, then repeat the command"
            )
        return data

    def _opened(self) -> int:
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
                weakref.finalize(self, os.close, self._descriptor)
            return self._descriptor


def _identity(stat: os.stat_result) -> tuple[int, int]:
    """Size and time of the last write."""
    return stat.st_size, stat.st_mtime_ns
