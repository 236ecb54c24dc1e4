"""What one model thinks of every instance of one corpus: files, and the journal that fills them.

A finished folder holds ``sum_nll.npy`` (float32[N], nats), ``num_tokens.npy`` (int32[N]) and
``manifest.json``; row i is row i of the scored corpus or subset. It is filled by windows of 4,096
rows (`data.windowed`); a window's note is the two columns' bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.core.manifest import (
    Manifest,
    Parent,
    atomic_file,
    hash_file,
    read_manifest,
)
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.mapped import blocks, hash_streams, load_column
from megatron_miniplm.data.windowed import WindowedWriter, plain

ScoreNormalization = Literal["mean", "sum"]
"""Of a token on average, or of the whole instance (Eq. 4)."""
WINDOW = 4096
_COLUMNS = {"sum_nll": np.dtype(np.float32), "num_tokens": np.dtype(np.int32)}
_NO_PARENTS: Mapping[str, Parent] = MappingProxyType({})


def check_finite(
    sum_nll: np.ndarray, num_tokens: np.ndarray, *, what: str, first_row: int = 0
) -> None:
    """Refuse NaN, infinite and negative sums, and negative counts, naming the first bad row."""
    bad = np.flatnonzero(~np.isfinite(sum_nll) | (sum_nll < 0) | (num_tokens < 0))
    if len(bad):
        at = bad[0]
        raise DataError(
            f"{what}: row {first_row + at} has sum_nll {sum_nll[at]} over {num_tokens[at]} tokens, "
            f"and {len(bad) - 1} more rows are broken: look at the model and its precision, and "
            f"score again"
        )


class Scores:
    """Finished scores; make one with `Scores.open`.

    Attributes: ``sum_nll`` (float32[N], nats), ``num_tokens`` (int32[N]), ``manifest``,
    ``fingerprint``, ``corpus_fingerprint``.
    """

    def __init__(self, path: Path, manifest: Manifest, columns: Mapping[str, np.ndarray]) -> None:
        self.path, self.manifest = path, manifest
        self.sum_nll, self.num_tokens = columns["sum_nll"], columns["num_tokens"]
        self.fingerprint = manifest.fingerprint
        self.corpus_fingerprint = manifest.parents["corpus"].fingerprint

    @classmethod
    def open(cls, path: str | Path, *, check_rows: bool = True) -> Scores:
        """Open a finished folder, its columns mapped; refuses missing or changed ones.

        Rows that are not finite are refused, too, unless whoever reads them checks them
        (``check_rows=False``).
        """
        path = Path(path).absolute()
        if not (path / "manifest.json").exists() and (path / "journal").is_dir():
            raise DataError(f"{path} is incomplete: run the same `score` command again")
        manifest = read_manifest(path / "manifest.json", "scores")
        count = manifest.content["num_instances"]
        columns = {
            name: load_column(path / f"{name}.npy", count, kind, remedy="score again")
            for name, kind in _COLUMNS.items()
        }
        made = _fingerprint(manifest.parents["corpus"].fingerprint, columns)
        if made != manifest.fingerprint:
            raise DataError(
                f"{path} has fingerprint {manifest.fingerprint}, but its columns give {made}: they "
                f"changed since they were written; score again"
            )
        if check_rows:
            first = 0
            for sums, counts in zip(*map(blocks, columns.values()), strict=True):
                check_finite(sums, counts, what=str(path), first_row=first)
                first += len(sums)
        return cls(path, manifest, columns)

    def __len__(self) -> int:
        return len(self.sum_nll)

    def mean_nll(self) -> np.ndarray:
        """float64[N], nats a token; 0 for an instance without a scored token."""
        return self.sum_nll.astype(np.float64) / np.maximum(self.num_tokens, 1)


class ScoreWriter(WindowedWriter):
    """Fills a scores folder; `model` holds facts for the manifest, the rest as `WindowedWriter`."""

    kind, files = "scores", tuple(f"{name}.npy" for name in _COLUMNS)
    window = WINDOW

    def __init__(
        self,
        path: Path,
        *,
        corpus: Corpus,
        config: Mapping[str, Any],
        model: Mapping[str, Any],
        parents: Mapping[str, Parent] = _NO_PARENTS,
        overwrite: bool = False,
    ) -> None:
        self._model = plain(model)
        super().__init__(
            path, corpus=corpus, window=WINDOW, config=config, parents=parents, overwrite=overwrite
        )

    def write_window(self, number: int, sum_nll: np.ndarray, num_tokens: np.ndarray) -> None:
        """Record one window (float32[n] nats, int32[n]) durably; refuses NaN and wrong sizes."""
        rows = self.rows(number)
        if sum_nll.shape != (len(rows),) or num_tokens.shape != (len(rows),):
            raise DataError(
                f"window {number} has {len(rows)} rows, but got {list(sum_nll.shape)} sums and "
                f"{list(num_tokens.shape)} counts"
            )
        sums, counts = sum_nll.astype("<f4"), num_tokens.astype("<i4")
        what = f"{self.path}, window {number} from row {rows.start}"
        check_finite(sums, counts, what=what)
        most = self._corpus.lengths[rows.start : rows.stop] - 1
        if (counts > most).any():
            at = int(np.argmax(counts > most))
            raise DataError(f"{what}: row {at} counts {counts[at]} tokens, it predicts {most[at]}")
        self._note(self._window_name(number), lambda: sums.tobytes() + counts.tobytes())

    def _assemble(self) -> None:
        columns = {name: np.empty(len(self._corpus), kind) for name, kind in _COLUMNS.items()}
        for number in range(self.num_windows):
            rows = self.rows(number)
            part = slice(rows.start, rows.stop)
            columns["sum_nll"][part], columns["num_tokens"][part] = self._read_window(number)
        for name, column in columns.items():
            with atomic_file(self.path / f"{name}.npy") as file:
                np.save(file, column)
        total = int(columns["num_tokens"].sum(dtype=np.int64))
        content = {
            "num_instances": len(self._corpus),
            "num_tokens": total,
            "mean_nll": float(columns["sum_nll"].sum(dtype=np.float64) / max(total, 1)),
            "seq_length": self._corpus.seq_length,
            "tokenizer_fingerprint": self._corpus.manifest.content["tokenizer"]["fingerprint"],
            "hashes": {name: hash_file(self.path / f"{name}.npy") for name in _COLUMNS},
            "model": self._model,
        }
        Manifest(
            kind="scores",
            fingerprint=_fingerprint(self._corpus.fingerprint, columns),
            parents={"corpus": self._corpus.as_parent(self._manifest_path)} | self._parents,
            config=self._config,
            content=content,
        ).write(self._manifest_path)

    def _read_window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        data, count = self._journal.read(self._window_name(number)), len(self.rows(number))
        return np.frombuffer(data, "<f4", count), np.frombuffer(data, "<i4", count, 4 * count)


def _fingerprint(corpus: str, columns: Mapping[str, np.ndarray]) -> str:
    return hash_streams(corpus, *((columns[n].nbytes, blocks(columns[n])) for n in _COLUMNS))
