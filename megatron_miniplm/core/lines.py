"""A file that grows by whole lines, also while the disk is full now and then."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_miniplm.core.log import get_logger


class LineFile:
    """Appends lines; those that there is no room for wait for the next one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []

    def add(self, line: str) -> None:
        """Append a line and what waits; what was half written is taken back."""
        self.waiting.append(line + "\n")
        size = self.path.stat().st_size if self.path.exists() else 0
        data = memoryview("".join(self.waiting).encode())
        try:
            # Unbuffered: a buffer would write the rest once more when it is closed or collected.
            with self.path.open("ab", buffering=0) as file:
                while data:
                    data = data[file.write(data) :]
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)
            get_logger().error("%s: %s; %d lines wait", self.path, error, len(self.waiting))
        else:
            self.waiting.clear()
