"""Filling a store of records (`data.record_store`): by windows of rows, or by what a run has seen.

A shard is written under a temporary name, made durable, renamed, and then noted in the journal
(`data.windowed`), so nothing is copied in the end and any kill leaves whole shards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.core.manifest import (
    NO_PARENTS,
    Manifest,
    Parent,
    atomic_file,
    hash_file,
    hash_parts,
)
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.record_store import (
    HEADER,
    INDEX,
    KIND,
    MOST_WINDOWS,
    UPDATES,
    Record,
    manifest_checksum,
)
from megatron_miniplm.data.windowed import WindowedWriter, plain

_LEAST_WINDOW, _WINDOW_TOKENS = 64, 1 << 20
_NUMBERS = 5
_NOBODY = np.empty(0, np.int64)


class RecordWriter(WindowedWriter):
    """Fills a store; several processes may fill the same one.

    `config` is what must be equal for that: teacher, truncation, encoding, what is stored. `facts`
    are for the manifest's content: vocabulary, training step of the teacher.

    Either by windows of rows, each a shard, until no row is missing (`write_window`); or by shards
    of whatever instances a training run has seen (`add_shard`).
    """

    kind, files = KIND, ("shards", "index.npy", UPDATES)

    def __init__(
        self,
        path: Path,
        *,
        corpus: Corpus,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        parents: Mapping[str, Parent] = NO_PARENTS,
        overwrite: bool = False,
    ) -> None:
        self._facts = plain(facts)
        super().__init__(
            path, corpus=corpus, window=_window_size(len(corpus), corpus.seq_length),
            config=config, parents=parents, overwrite=overwrite,
        )  # fmt: skip

    def write_window(self, number: int, records: Sequence[Record]) -> None:
        """Record one window durably, a record a row."""
        rows = self.rows(number)
        column = self._corpus.id_column
        ids = np.asarray(rows) if column is None else np.array(column[rows.start : rows.stop])
        self._write_shard(self._window_name(number), ids, records)

    def add_shard(
        self,
        name: str,
        ids: np.ndarray,
        records: Sequence[Record],
        *,
        step: int,
        updates: np.ndarray,
        lost: Sequence[int] | np.ndarray = (),
    ) -> None:
        """Record instances (int64 root ids) that a model saw while it was trained, durably.

        `step` is the model's training step at the end of the shard, `updates` (int64) that at which
        each was seen: where an id comes again, in whatever shard, the later update counts. `lost`
        are ids that were seen without a record.
        """
        name = f"step-{step:08d}-{name}"
        self._write_shard(name, ids, records, updates=updates, lost=np.asarray(lost, np.int64))

    def steps(self) -> set[int]:
        """The training steps of which there are shards."""
        return {_step(name) for name in self._step_names()}

    def rewind(self, step: int) -> None:
        """Remove the shards of later steps: a run that resumes from `step` makes them again."""
        for name in self._step_names():
            if _step(name) > step:
                self._journal.path(name).unlink()
                self._shard_path(name).unlink(missing_ok=True)

    def finish_seen(self) -> bool:
        """Assemble the store of all shards that were added, whatever instances they hold."""
        if self.finished:
            return True
        if not self._step_names():
            return False
        self._assemble_alone()
        return True

    def _write_shard(
        self,
        name: str,
        ids: np.ndarray,
        records: Sequence[Record],
        *,
        updates: np.ndarray | None = None,
        lost: np.ndarray = _NOBODY,
    ) -> None:
        if len(ids) != len(records):
            raise ValueError(f"{name}: {len(records)} records for {len(ids)} instances")
        numbers = np.array([
            ids,
            [len(each.payload) + HEADER.size for each in records],
            [each.num_positions for each in records],
            [each.num_values for each in records],
            np.zeros(len(ids)) if updates is None else updates,
        ], np.int64).reshape(_NUMBERS, len(ids))  # fmt: skip
        sums = {
            key: np.array([each.sums[key] for each in records], np.float64)
            for key in (records[0].sums if records else ())
        }

        def written() -> bytes:
            file = self._write_records(name, ids, records)
            return _Note(file=file, numbers=numbers, lost=lost, sums=sums).as_bytes()

        self._note(name, written)

    def _write_records(
        self, name: str, ids: np.ndarray, records: Sequence[Record]
    ) -> dict[str, Any]:
        """The shard's file; its size and hash."""
        digest, size = xxhash.xxh3_128(), 0
        with atomic_file(self._shard_path(name)) as file:
            for instance_id, record in zip(ids, records, strict=True):
                data = record.as_bytes(int(instance_id))
                file.write(data)
                digest.update(data)
                size += len(data)
        return {"size": size, "hash": digest.hexdigest()}

    def _assemble(self) -> None:
        names = self._journal.names()
        for stray in set(self._shard_path("").parent.iterdir()) - set(map(self._shard_path, names)):
            stray.unlink()  # a run that was killed before its note; nobody writes meanwhile
        totals = _Totals()
        with atomic_file(self.path / "index.npy") as file:
            if self._step_names():
                self._index_latest(file, names, totals)
            else:
                self._index_in_order(file, names, totals)
        beside = ["index.npy", UPDATES] if self._step_names() else ["index.npy"]
        files = {name: _facts(self.path / name) for name in beside} | {
            f"shards/{self._shard_path(name).name}": fact for name, fact in totals.files.items()
        }
        size = sum(fact["size"] for fact in files.values())
        root = self._corpus.root_fingerprint
        fingerprint = hash_parts(root, *(fact["hash"] for fact in totals.files.values()))
        content = plain({
            "num_instances": totals.instances,
            "num_tokens": totals.positions,
            "num_values": totals.values,
            "num_bytes": size,
            "bytes_per_value": size / max(totals.values, 1),
            "bytes_per_token": size / max(totals.positions, 1),
            "num_superseded": totals.superseded,
            "num_lost": totals.lost,
            **totals.means(),
            "root_fingerprint": root,
            "seq_length": self._corpus.seq_length,
            "tokenizer_fingerprint": self._corpus.manifest.content["tokenizer"]["fingerprint"],
            **self._facts,
            "files": files,
        })  # fmt: skip
        Manifest(
            kind=self.kind,
            fingerprint=fingerprint,
            parents={"corpus": self._corpus.as_parent(self._manifest_path)} | self._parents,
            config=self._config,
            content=content | {"checksum": manifest_checksum(fingerprint, self._config, content)},
        ).write(self._manifest_path)

    def _index_in_order(self, file: BinaryIO, names: Sequence[str], totals: _Totals) -> None:
        """Write the index of shards whose ids ascend from one to the next, one after the other."""
        count, last = len(self._corpus), -1
        begin = _start_index(file, count)
        for shard, name in enumerate(names):
            note = self._checked_note(name)
            ids, sizes, *_ = note.numbers
            if len(ids) and (ids[0] <= last or (np.diff(ids) <= 0).any()):
                raise DataError(
                    f"{self._shard_path(name)}: its ids do not ascend from {last} on: the corpus "
                    f"{self._corpus.prefix} changed or is damaged (`inspect --verify`)"
                )
            last = int(ids[-1]) if len(ids) else last
            columns = (ids, np.full_like(ids, shard), np.cumsum(sizes) - sizes, sizes)
            for number, column in enumerate(columns):
                file.seek(begin + 8 * (number * count + totals.instances))
                file.write(column.tobytes())
            totals.add(name, note, np.ones(len(ids), dtype=bool))

    def _index_latest(self, file: BinaryIO, names: Sequence[str], totals: _Totals) -> None:
        """Write the index of the last record of every id, in memory, and the updates of these."""
        notes = [self._checked_note(name) for name in names]
        index, updates, kept = _latest([note.numbers for note in notes])
        with atomic_file(self.path / UPDATES) as column:
            np.save(column, updates)
        totals.lost = np.setdiff1d(np.concatenate([note.lost for note in notes]), index[0]).size
        _start_index(file, index.shape[1])
        file.write(index.tobytes())
        for name, note, keep in zip(names, notes, kept, strict=True):
            totals.add(name, note, keep)

    def _checked_note(self, name: str) -> _Note:
        """The note of a shard whose file is as long as it says."""
        note, path = _Note.of_bytes(self._journal.read(name)), self._shard_path(name)
        size = path.stat().st_size if path.is_file() else 0
        if size != note.file["size"]:
            self._journal.path(name).unlink()
            raise DataError(
                f"{path} has {size} bytes, but {note.file['size']} were written: its note was "
                f"removed; run the same command again to fill it"
            )
        return note

    def _shard_path(self, name: str) -> Path:
        return self.path / "shards" / f"{name}.records"

    def _step_names(self) -> list[str]:
        return [name for name in self._journal.names() if name.startswith("step-")]


@dataclass(frozen=True)
class _Note:
    """What a shard leaves in the journal."""

    file: Mapping[str, Any]
    """Size and hash."""
    numbers: np.ndarray
    """int64[5, n]: id, size in bytes, positions, values and training step of each record."""
    lost: np.ndarray
    """int64: ids that were seen without a record."""
    sums: Mapping[str, np.ndarray]
    """float64[n] of each sum."""

    def as_bytes(self) -> bytes:
        head = {
            "file": self.file, "count": self.numbers.shape[1], "lost": len(self.lost),
            "sums": list(self.sums),
        }  # fmt: skip
        columns = (each.tobytes() for each in (self.numbers, self.lost, *self.sums.values()))
        return json.dumps(head).encode() + b"\n" + b"".join(columns)

    @classmethod
    def of_bytes(cls, data: bytes) -> _Note:
        line, _, rest = data.partition(b"\n")
        head = json.loads(line)
        count, num_sums = head["count"], len(head["sums"])
        numbers = np.frombuffer(rest, np.int64, _NUMBERS * count).reshape(_NUMBERS, count)
        lost = np.frombuffer(rest[numbers.nbytes :], np.int64, head["lost"])
        sums = np.frombuffer(rest[numbers.nbytes + lost.nbytes :], np.float64)
        by_name = zip(head["sums"], sums.reshape(num_sums, count), strict=True)
        return cls(head["file"], numbers, lost, dict(by_name))


@dataclass
class _Totals:
    """Of all shards of a store, which are added one after the other."""

    files: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of each shard's name, its size and hash."""
    instances: int = 0
    superseded: int = 0
    lost: int = 0
    """Instances that were seen without a record, and never with one."""
    positions: int = 0
    values: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, note: _Note, keep: np.ndarray) -> None:
        """A shard; of its records, those count that `keep` (bool[n]) says."""
        self.files[name] = note.file
        self.instances += int(keep.sum())
        self.superseded += int((~keep).sum())
        self.positions += int(note.numbers[2][keep].sum())
        self.values += int(note.numbers[3][keep].sum())
        for key, column in note.sums.items():
            self.sums.setdefault(key, []).append(math.fsum(column[keep]))

    def means(self) -> dict[str, float]:
        """Over the positions: the same in whatever order shards were written."""
        positions = max(self.positions, 1)
        return {f"mean_{key}": math.fsum(parts) / positions for key, parts in self.sums.items()}


def awaits_assembly(path: Path, step: int) -> bool:
    """Whether a store that is not complete has shards of that training step."""
    notes = (path / "journal").glob(f"step-{step:08d}-*.window")
    return not (path / "manifest.json").exists() and any(notes)


def _latest(shards: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The index, its updates, and of each shard which records are in it (bool[n]).

    It has the latest record of every id.

    `shards` are the numbers of notes, int64[5, n].
    """
    counts = [part.shape[1] for part in shards]
    ids, sizes, _, _, updates = np.concatenate(shards, axis=1)
    starts = np.concatenate([np.cumsum(part[1]) - part[1] for part in shards])
    order = np.lexsort((updates, ids))  # is stable
    last = np.ones(len(ids), dtype=bool)
    last[:-1] = ids[order][1:] != ids[order][:-1]
    order = order[last]
    keep = np.zeros(len(ids), dtype=bool)
    keep[order] = True
    numbers = np.repeat(np.arange(len(shards)), counts)
    index = np.stack([column[order] for column in (ids, numbers, starts, sizes)])
    return index, updates[order], np.split(keep, np.cumsum(counts)[:-1])


def _start_index(file: BinaryIO, count: int) -> int:
    """Write what an ``.npy`` file of the index begins with; where its numbers begin."""
    shape = (len(INDEX) * count,)
    header = {"descr": "<i8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _facts(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "hash": hash_file(path)}


def _step(name: str) -> int:
    return int(name.split("-")[1])


def _window_size(num_instances: int, seq_length: int) -> int:
    """Rows of a window: a power of two, and few enough files, but of no more than 2^20 tokens."""
    size = _LEAST_WINDOW
    while size * MOST_WINDOWS < num_instances:
        size *= 2
    while size > 1 and size * seq_length > _WINDOW_TOKENS:
        size //= 2
    return size
