"""Bytes by instance id: what a model says of each instance of a corpus, in a folder of shards.

A finished store holds ``shards/``, ``index.npy`` and ``manifest.json``. A shard is records end to
end; a record is a header (`HEADER`) and its payload, which is whatever the store is of. The index
is int64[4, N]: root ids in ascending order, and of each the number of its shard (in the manifest's
order), the record's first byte, and its size. A read is one `pread`, and the checksum of each
record is compared each time. The store of a model in training has ``updates.npy``, too: int64[N],
the update that saw each instance. `record_writer` fills a store.
"""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import xxhash

from megatron_miniplm.core.errors import DataError, LineageError
from megatron_miniplm.core.manifest import (
    Manifest,
    hash_parts,
    read_manifest,
)
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.mapped import load_column
from megatron_miniplm.data.token_file import TokenFile

KIND = "logit store"
HEADER = struct.Struct("<4sIqQQ")
"""Magic, positions, root id, values, xxh3-64 of all before it and of the payload."""
_MAGIC = b"MPR1"
INDEX = ("id", "shard", "offset", "size")
UPDATES = "updates.npy"
MOST_WINDOWS = 1 << 14
"""Into which a store is filled at most, each a shard."""
_REPAIR = "restore that file from a copy, or remove the store and cache it again"
_SOFT_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
_OPEN_SHARDS = MOST_WINDOWS if _SOFT_LIMIT == resource.RLIM_INFINITY else _SOFT_LIMIT // 2
_NO_SUMS: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one instance has in a store."""

    payload: bytes
    num_positions: int
    num_values: int
    """Kept logits, or numbers of hidden states."""
    sums: Mapping[str, float] = field(default_factory=lambda: _NO_SUMS)
    """Sums over the positions; the manifest has their means (``mean_entropy`` of "entropy")."""

    def as_bytes(self, instance_id: int) -> bytes:
        """Header and payload."""
        return _head(instance_id, self.num_positions, self.num_values, self.payload) + self.payload


class RecordStore:
    """A finished store; make one with `open`. Any thread may read it.

    Attributes: ``path``, ``manifest``, ``fingerprint``, ``root_fingerprint``,
    ``corpus_fingerprint``, ``ids`` (int64[N], ascending root ids, mapped), ``updates`` (int64[N],
    the teacher's update of each record, or None where the teacher was not in training).
    """

    def __init__(
        self, path: Path, manifest: Manifest, index: np.ndarray, updates: np.ndarray | None
    ) -> None:
        self.path, self.manifest, self.fingerprint = path, manifest, manifest.fingerprint
        self.root_fingerprint: str = manifest.content["root_fingerprint"]
        self.corpus_fingerprint = manifest.parents["corpus"].fingerprint
        self.ids, *self._places = index
        self.updates = updates
        files: Mapping[str, Any] = manifest.content["files"]
        self._shards = [(n, fact["size"]) for n, fact in files.items() if n.startswith("shards/")]
        self._opening = object()

    @classmethod
    def open(cls, path: str | Path) -> RecordStore:
        """Open a finished store, its index mapped; refuses missing and truncated files.

        Whole files are hashed by `inspect --verify`, and each record when it is read.
        """
        path = Path(path).absolute()
        if not (path / "manifest.json").exists() and (path / "journal").is_dir():
            raise DataError(
                f"{path} is incomplete: run the same command again (`cache-logits`, or the "
                f"`pretrain --cache-logits` that fills it)"
            )
        manifest = read_manifest(path / "manifest.json", KIND)
        found = manifest_checksum(manifest.fingerprint, manifest.config, manifest.content)
        if manifest.content.get("checksum") != found or "corpus" not in manifest.parents:
            raise DataError(
                f"{path / 'manifest.json'} was changed since it was written (its checksum is "
                f"{found}, not {manifest.content.get('checksum')}): {_REPAIR}"
            )
        for name, fact in manifest.content["files"].items():
            size = (path / name).stat().st_size if (path / name).is_file() else None
            if size != fact["size"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise DataError(
                    f"{path / name} {found}, but {fact['size']} were written: {_REPAIR}"
                )
        count = manifest.content["num_instances"]
        index = load_column(path / "index.npy", len(INDEX) * count, np.int64, remedy=_REPAIR)
        updates = None
        if UPDATES in manifest.content["files"]:
            updates = load_column(path / UPDATES, count, np.int64, remedy=_REPAIR)
        return cls(path, manifest, index.reshape(len(INDEX), count), updates)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the path: a worker process opens the files itself."""
        return RecordStore.open, (self.path,)

    def __len__(self) -> int:
        return len(self.ids)

    def check_corpus(self, corpus: Corpus) -> None:
        """Refuse a corpus or subset of another root: its ids are of other instances."""
        if corpus.root_fingerprint != self.root_fingerprint:
            raise LineageError(
                f"{self.path} is of root corpus {self.root_fingerprint}, but {corpus.prefix} is of "
                f"{corpus.root_fingerprint}: give the store of that corpus, or cache its logits"
            )

    def find(self, ids: np.ndarray) -> np.ndarray:
        """int64[n]: where each root id (int64[n]) is in ``ids``; -1 where there is no record."""
        at = np.searchsorted(self.ids, ids)
        there = at < len(self)
        there[there] = self.ids[at[there]] == ids[there]
        return np.where(there, at, -1)

    def read(self, ids: Sequence[int] | np.ndarray) -> list[memoryview]:
        """The payloads of some instances, in the order of their root `ids`, each checked.

        DataError names an instance that is not there or whose bytes have changed.
        """
        wanted = np.asarray(ids, dtype=np.int64)
        at = self.find(wanted)
        missing = at < 0
        if missing.any():
            raise DataError(
                f"instance {wanted[missing][0]} is not in {self.path}, nor are "
                f"{int(missing.sum()) - 1} more of {len(wanted)}; it holds {len(self)} instances "
                f"of root corpus {self.root_fingerprint}: cache the logits of all that is trained"
            )
        return [self._read(int(i), row) for i, row in zip(wanted, at, strict=True)]

    def _read(self, instance_id: int, row: int) -> memoryview:
        number, offset, size = (int(column[row]) for column in self._places)
        inside = 0 <= number < len(self._shards)
        end = self._shards[number][1] if inside else 0
        if not (offset >= 0 and size >= HEADER.size and offset + size <= end):
            raise DataError(
                f"instance {instance_id}: {self.path / 'index.npy'} is damaged, it names bytes "
                f"{offset} to {offset + size} of shard {number}: {_REPAIR}"
            )
        path = self.path / self._shards[number][0]
        try:
            raw = memoryview(_opened(path, self._opening).read(offset, size))
        except (OSError, DataError) as error:
            raise DataError(f"instance {instance_id}: {error}; {_REPAIR}") from error
        payload = raw[HEADER.size :]
        _, positions, _, values, _ = HEADER.unpack_from(raw)
        if raw[: HEADER.size] != _head(instance_id, positions, values, payload):
            raise DataError(
                f"instance {instance_id} is damaged in {path} (bytes {offset} to {offset + size}: "
                f"its checksum differs): {_REPAIR}; `inspect {self.path} --verify` names every "
                f"damaged file"
            )
        return payload


def manifest_checksum(
    fingerprint: str, config: Mapping[str, Any], content: Mapping[str, Any]
) -> str:
    """Of what a manifest says."""
    said = [fingerprint, config, {k: v for k, v in content.items() if k != "checksum"}]
    return hash_parts(json.dumps(said, sort_keys=True))


@lru_cache(maxsize=_OPEN_SHARDS)
def _opened(path: Path, opening: object) -> TokenFile:
    """A shard that stays open; each opening of a store has its own, since files change between."""
    return TokenFile(path)


def _head(instance_id: int, positions: int, values: int, payload: bytes | memoryview) -> bytes:
    head = HEADER.pack(_MAGIC, positions, instance_id, values, 0)[:-8]
    digest = xxhash.xxh3_64(head)
    digest.update(payload)
    return head + digest.intdigest().to_bytes(8, "little")
