"""A file that grows by whole lines, also while the disk is full now and then; read as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_miniplm.core.errors import DataError
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


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; none where there is no file.

    A last line that a kill cut is left out; any other that is not JSON is refused.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if number < len(lines):
                raise DataError(
                    f"{path}, line {number} is not JSON: {error}; remove that line"
                ) from error
    return found
