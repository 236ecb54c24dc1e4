"""What is done of a job that several processes share, of which any may be killed.

A folder with ``identity.json``, which is what must be equal for processes to share the job, and one
note for each finished part: bytes of the artifact's choice and their 16-byte xxh3 digest. A note is
written when its part is durable, so what has no note is made again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.core.manifest import atomic_file, read_json

_DIGEST_BYTES = 16


class Journal:
    """The notes of one job, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def join(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Begin it with this identity, or give the one that it was begun with."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # A process that hung may have written them after its job was over. Listed before the
        # identity is looked for, so that none is of a job that begins meanwhile.
        strays = self.names()
        if not (self.folder / "identity.json").exists():
            for name in strays:
                self.path(name).unlink(missing_ok=True)
        # Linking is atomic and fails where the name exists: of several starters, one writes it.
        draft = self.folder / f".identity.{os.uname().nodename}.{os.getpid()}"
        try:
            draft.write_text(json.dumps(identity, indent=1))
            os.link(draft, self.folder / "identity.json")
        except FileExistsError:
            pass
        finally:
            draft.unlink(missing_ok=True)
        return read_json(self.folder / "identity.json")

    def path(self, name: str) -> Path:
        """Where the note of a part is."""
        return self.folder / f"{name}.window"

    def names(self) -> list[str]:
        """Of the finished parts, in order."""
        return sorted(
            name.removesuffix(".window")
            for name in os.listdir(self.folder)
            if name.endswith(".window") and name[0] != "."
        )

    def write(self, name: str, data: bytes) -> None:
        """Note that a part is done."""
        with atomic_file(self.path(name)) as file:
            file.write(data + xxhash.xxh3_128(data).digest())

    def read(self, name: str) -> bytes:
        """What was noted of a part; a note that is corrupt is removed, and DataError names it."""
        path = self.path(name)
        raw = path.read_bytes()
        data, digest = raw[:-_DIGEST_BYTES], raw[-_DIGEST_BYTES:]
        if xxhash.xxh3_128(data).digest() != digest:
            path.unlink()
            raise DataError(
                f"{path} is corrupt ({len(raw)} bytes, wrong checksum) and was removed: run the "
                f"same command again to fill it"
            )
        return data

    def remove(self) -> None:
        """The job is over."""
        shutil.rmtree(self.folder, ignore_errors=True)


def differences(found: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """In what two identities, nested or not, differ; both values said."""
    parts = []
    for name in {**mine, **found}:
        theirs, ours = found.get(name), mine.get(name)
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping) and theirs != ours:
            parts.append(differences(theirs, ours))
        elif theirs != ours:
            there, here = (
                repr(each[name]) if name in each else "not said" for each in (found, mine)
            )
            parts.append(f"{name} is {there} there and {here} here")
    return "; ".join(parts)
