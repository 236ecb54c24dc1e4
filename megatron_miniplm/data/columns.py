"""What one model says of every instance of one corpus, as columns of numbers: `score` writes them.

A finished folder holds ``NAME.npy`` for each column and ``manifest.json``; row i is row i of the
corpus or subset that was scored. It is filled by windows of 4,096 rows (`data.windowed`); a
window's note is the bytes of its columns. `data.scores` and `data.predictions` are such folders.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.core.manifest import (
    NO_PARENTS,
    Manifest,
    Parent,
    atomic_file,
    hash_file,
    read_manifest,
)
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.mapped import blocks, hash_streams, load_column
from megatron_miniplm.data.windowed import WindowedWriter, plain

WINDOW = 4096


class ScoredColumns(ABC):
    """A finished folder; make one with `open`.

    Attributes: ``columns`` (name -> array[N]), ``manifest``, ``fingerprint``,
    ``corpus_fingerprint``.
    """

    kind: ClassVar[str]
    """Of the artifact, as in its manifest."""
    dtypes: ClassVar[Mapping[str, np.dtype]]
    """Name -> type of each column."""

    def __init__(self, path: Path, manifest: Manifest, columns: Mapping[str, np.ndarray]) -> None:
        self.path, self.manifest, self.columns = path, manifest, columns
        self.fingerprint = manifest.fingerprint
        self.corpus_fingerprint = manifest.parents["corpus"].fingerprint

    @staticmethod
    @abstractmethod
    def refuse_broken(columns: Mapping[str, np.ndarray], *, what: str, first_row: int = 0) -> None:
        """Refuse numbers that no model in order says, naming the first bad row."""

    @classmethod
    def open(cls, path: str | Path, *, check_rows: bool = True) -> Self:
        """Open a finished folder, its columns mapped; refuses missing or changed ones.

        Rows that are broken are refused, too, unless whoever reads them checks them
        (``check_rows=False``).
        """
        path = Path(path).absolute()
        if not (path / "manifest.json").exists() and (path / "journal").is_dir():
            raise DataError(f"{path} is incomplete: run the same `score` command again")
        manifest = read_manifest(path / "manifest.json", cls.kind)
        count = manifest.content["num_instances"]
        columns = {
            name: load_column(path / f"{name}.npy", count, kind, remedy="score again")
            for name, kind in cls.dtypes.items()
        }
        made = fingerprint(manifest.parents["corpus"].fingerprint, columns)
        if made != manifest.fingerprint:
            raise DataError(
                f"{path} has fingerprint {manifest.fingerprint}, but its columns give {made}: they "
                f"changed since they were written; score again"
            )
        if check_rows:
            first = 0
            for parts in zip(*map(blocks, columns.values()), strict=True):
                named = dict(zip(columns, parts, strict=True))
                cls.refuse_broken(named, what=str(path), first_row=first)
                first += len(parts[0])
        return cls(path, manifest, columns)

    def __len__(self) -> int:
        return int(self.manifest.content["num_instances"])


class ColumnWriter(WindowedWriter):
    """Fills such a folder; `model` holds facts for the manifest, the rest as `WindowedWriter`."""

    made: ClassVar[type[ScoredColumns]]
    """What it makes."""
    window = WINDOW

    def __init__(
        self,
        path: Path,
        *,
        corpus: Corpus,
        config: Mapping[str, Any],
        model: Mapping[str, Any],
        parents: Mapping[str, Parent] = NO_PARENTS,
        overwrite: bool = False,
    ) -> None:
        self._model = plain(model)
        super().__init__(
            path, corpus=corpus, window=WINDOW, config=config, parents=parents, overwrite=overwrite
        )

    def __init_subclass__(cls) -> None:
        """The artifact's kind and files are those of what it makes."""
        cls.kind, cls.files = cls.made.kind, tuple(f"{name}.npy" for name in cls.made.dtypes)

    def write_window(self, number: int, *given: np.ndarray) -> None:
        """Record one window, [n] of each column, durably; refuses NaN and wrong sizes."""
        rows = self.rows(number)
        if any(column.shape != (len(rows),) for column in given):
            shapes = " and ".join(str(list(column.shape)) for column in given)
            raise DataError(f"window {number} has {len(rows)} rows, but got {shapes}")
        dtypes = self.made.dtypes
        columns = {
            name: column.astype(dtypes[name].newbyteorder("<"))
            for name, column in zip(dtypes, given, strict=True)
        }
        what = f"{self.path}, window {number} from row {rows.start}"
        self.made.refuse_broken(columns, what=what)
        self._check(columns, rows, what)
        bytes_ = b"".join(column.tobytes() for column in columns.values())
        self._note(self._window_name(number), lambda: bytes_)

    def _check(self, columns: Mapping[str, np.ndarray], rows: range, what: str) -> None:
        """Refuse what cannot be of these rows of the corpus."""
        return

    def _facts(self, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Facts of its own, for the manifest."""
        return {}

    def _assemble(self) -> None:
        kinds = self.made.dtypes
        columns = {name: np.empty(len(self._corpus), kind) for name, kind in kinds.items()}
        for number in range(self.num_windows):
            rows = self.rows(number)
            data, at = self._journal.read(self._window_name(number)), 0
            for name, kind in kinds.items():
                part = np.frombuffer(data, kind.newbyteorder("<"), len(rows), at)
                columns[name][rows.start : rows.stop] = part
                at += part.nbytes
        for name, column in columns.items():
            with atomic_file(self.path / f"{name}.npy") as file:
                np.save(file, column)
        content = {
            "num_instances": len(self._corpus),
            **self._facts(columns),
            "seq_length": self._corpus.seq_length,
            "tokenizer_fingerprint": self._corpus.manifest.content["tokenizer"]["fingerprint"],
            "hashes": {name: hash_file(self.path / f"{name}.npy") for name in kinds},
            "model": self._model,
        }
        Manifest(
            kind=self.kind,
            fingerprint=fingerprint(self._corpus.fingerprint, columns),
            parents={"corpus": self._corpus.as_parent(self._manifest_path)} | self._parents,
            config=self._config,
            content=content,
        ).write(self._manifest_path)


def fingerprint(corpus: str, columns: Mapping[str, np.ndarray]) -> str:
    """Of columns of a corpus, in their order."""
    return hash_streams(corpus, *((each.nbytes, blocks(each)) for each in columns.values()))
