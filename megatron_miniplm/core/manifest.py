"""Manifests, fingerprints and atomic files.

Every artifact has a JSON manifest, written last: kind, schema version, own fingerprint, the
fingerprints and places of its parents, the configuration that made it, and what is in it. An
artifact without its manifest does not exist, so a killed stage leaves nothing that opens.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import xxhash

import megatron_miniplm
from megatron_miniplm.core.errors import DataError, LineageError

SCHEMA_VERSION = 1
_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Parent:
    """One input of an artifact: what it was, and where it was (relative to the manifest)."""

    fingerprint: str
    path: str

    @classmethod
    def of(cls, fingerprint: str, path: Path, *, named_in: Path) -> Parent:
        """An input that lies at `path`, to be named in the manifest at `named_in`."""
        return cls(fingerprint=fingerprint, path=relative_path(path, named_in))


NO_PARENTS: Mapping[str, Parent] = MappingProxyType({})
"""Of an artifact that is made of nothing else."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The JSON beside every artifact."""

    kind: str
    """corpus, subset, scores, ..."""
    fingerprint: str
    """Content hash; equal content has an equal fingerprint, whoever made it."""
    parents: Mapping[str, Parent] = field(default_factory=dict)
    """Role -> input artifact, e.g. ``{"corpus": ...}``."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The flags that made it."""
    content: Mapping[str, Any] = field(default_factory=dict)
    """Facts of this kind: counts, shards, checksums."""
    tool_version: str = megatron_miniplm.__version__
    schema_version: int = SCHEMA_VERSION

    def write(self, path: Path) -> None:
        """Write atomically; the artifact exists from here on."""
        write_json(path, asdict(self))

    def parent_path(self, manifest_path: Path, role: str) -> Path:
        """Where the parent of that role is, absolute."""
        return Path(os.path.normpath(manifest_path.parent.absolute() / self.parents[role].path))


def read_manifest(path: Path, *kinds: str) -> Manifest:
    """Read and check a manifest; `kinds` are the acceptable ones (any when none is given)."""
    raw = read_json(path)
    missing = {"kind", "fingerprint", "schema_version"} - raw.keys()
    if missing:
        raise DataError(f"{path} is not a manifest: it lacks {sorted(missing)}")
    if raw["schema_version"] != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {raw['schema_version']}, this program reads "
            f"{SCHEMA_VERSION}; use the version that wrote it or make the artifact again"
        )
    if kinds and raw["kind"] not in kinds:
        raise LineageError(f"{path} is a {raw['kind']}, but a {' or '.join(kinds)} is needed here")
    raw["parents"] = {role: Parent(**parent) for role, parent in raw["parents"].items()}
    return Manifest(**raw)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, naming the file in every error."""
    try:
        raw = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist: nothing is there, or the stage that makes it did not finish"
        ) from None
    except (ValueError, IsADirectoryError) as error:
        raise DataError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(raw, dict):
        raise DataError(f"{path} holds a JSON {type(raw).__name__}, not an object")
    return raw


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write to a temporary name beside `path`; fsync and rename on success, remove on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of the host, too: processes of several may write the same file.
    temporary = path.with_name(f".{path.name}.tmp-{os.uname().nodename}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False, default=str).encode() + b"\n")


def fsync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, hex."""
    digest = xxhash.xxh3_128()
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def file_problem(path: Path, fact: Mapping[str, Any]) -> str:
    """What is wrong with a file of which a manifest says `size` and `hash`; empty if nothing is."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != fact["size"]:
        return f"{path} has {size} bytes, but {fact['size']} were written: it is truncated"
    found = hash_file(path)
    if found != fact["hash"]:
        return f"{path} has checksum {found}, but {fact['hash']} was written: it is corrupt"
    return ""


def hash_parts(*parts: str | bytes | memoryview) -> str:
    """xxh3-128 over length-prefixed parts, so that ("ab", "c") and ("a", "bc") differ."""
    digest = xxhash.xxh3_128()
    for part in parts:
        data = part.encode() if isinstance(part, str) else memoryview(part).cast("B")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def relative_path(target: Path, manifest_path: Path) -> str:
    """`target` as written in the manifest at `manifest_path`: relative, so trees can be moved."""
    return os.path.relpath(Path(target).absolute(), manifest_path.absolute().parent)


def provenance() -> dict[str, Any]:
    """What ran: versions of what decides results, and the git commit where there is one."""
    from importlib import metadata

    versions = {
        "python": platform.python_version(),
        "megatron_miniplm": megatron_miniplm.__version__,
    }
    for package in ("torch", "megatron-core", "numpy", "tokenizers", "fastokens", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "git_commit": _git_commit(), "machine": platform.platform()}


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None
