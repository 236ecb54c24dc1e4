"""What one model thinks of every instance of one corpus: files, and the journal that fills them.

A finished folder holds ``sum_nll.npy`` (float32[N], nats), ``num_tokens.npy`` (int32[N]) and
``manifest.json``; row i is row i of the scored corpus or subset. While incomplete it holds
``journal/``: the identity of the job and one file for each finished window of 4,096 rows, so that
any number of processes fill it and any of them may be killed. A window file is the two columns'
bytes and their 16-byte xxh3 digest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import xxhash

from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.core.manifest import (
    Manifest,
    Parent,
    atomic_file,
    hash_file,
    read_json,
    read_manifest,
)
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.mapped import blocks, hash_streams, load_column
from megatron_miniplm.data.staging import exclusive

WINDOW = 4096
_COLUMNS = {"sum_nll": np.dtype(np.float32), "num_tokens": np.dtype(np.int32)}
_OURS = ("manifest.json", *(f"{name}.npy" for name in _COLUMNS), "run.json", "journal")
_DIGEST_BYTES = 16
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


class ScoreWriter:
    """Fills a scores folder window by window; several processes may fill the same one.

    `config` is what must be equal for two processes to fill one folder (the model's identity, the
    precision, ...); `model` holds facts for the manifest. `overwrite` removes what is there: with
    several processes, one passes it, before the others start.
    """

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
        self.path, self._corpus = Path(path).absolute(), corpus
        self._journal = self.path / "journal"
        self._config, self._model = _plain(config), _plain(model)
        self._parents = dict(parents)
        self.num_windows = -(-len(corpus) // self.window)
        self._refuse_foreign()
        if overwrite:
            self._remove_old()
        self._join()

    @property
    def finished(self) -> bool:
        """Whether the artifact is complete, by this process or another."""
        return (self.path / "manifest.json").exists()

    def rows(self, number: int) -> range:
        """The rows of one window."""
        start = number * self.window
        return range(start, min(start + self.window, len(self._corpus)))

    def todo(self, shard: tuple[int, int] = (0, 1)) -> list[int]:
        """Windows not yet written, of those that fall to job i of n (``shard = (i, n)``)."""
        i, n = shard
        if not 0 <= i < n:
            raise ConfigError(f"--shard {i}/{n}: job i of n needs 0 <= i < n")
        if self.finished:
            return []
        written = set(os.listdir(self._journal))
        return [
            w for w in range(i, self.num_windows, n) if self._window_path(w).name not in written
        ]

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
        data = sums.tobytes() + counts.tobytes()
        with atomic_file(self._window_path(number)) as file:
            file.write(data + xxhash.xxh3_128(data).digest())

    def finish(self) -> bool:
        """Assemble the artifact if every window is there; False while other jobs still run."""
        try:
            if self.todo():
                return False
            with exclusive(self._journal / "lock", wait=True):
                if not self.finished:
                    self._assemble()
        except FileNotFoundError:
            # Another process finished between two of these lines and took the journal away.
            if not self.finished:
                raise
        shutil.rmtree(self._journal, ignore_errors=True)
        return True

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
        manifest_path = self.path / "manifest.json"
        Manifest(
            kind="scores",
            fingerprint=_fingerprint(self._corpus.fingerprint, columns),
            parents={"corpus": self._corpus.as_parent(manifest_path)} | self._parents,
            config=self._config,
            content=content,
        ).write(manifest_path)

    def _window_path(self, number: int) -> Path:
        return self._journal / f"{number:08d}.window"

    def _read_window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        path, count = self._window_path(number), len(self.rows(number))
        raw = path.read_bytes()
        data, digest = raw[:-_DIGEST_BYTES], raw[-_DIGEST_BYTES:]
        if len(data) != 8 * count or xxhash.xxh3_128(data).digest() != digest:
            path.unlink()
            raise DataError(
                f"{path} is corrupt ({len(raw)} bytes, wrong checksum) and was removed: run the "
                f"same `score` command again to fill it"
            )
        return np.frombuffer(data, "<f4", count), np.frombuffer(data, "<i4", count, 4 * count)

    def _identity(self) -> dict[str, Any]:
        return {
            "corpus": self._corpus.fingerprint,
            "num_instances": len(self._corpus),
            "window": self.window,
            "config": self._config,
        }

    def _join(self) -> None:
        """Start the folder, or check that the one there is of the same job."""
        if self.finished:
            manifest = read_manifest(self.path / "manifest.json", "scores")
            found = self._identity() | {
                "corpus": manifest.parents["corpus"].fingerprint,
                "config": dict(manifest.config),
            }
            self._refuse_other(found, "finished already")
            return
        self._journal.mkdir(parents=True, exist_ok=True)
        path = self._journal / "identity.json"
        # Linking is atomic and fails where the name exists: of several starters, one writes it.
        draft = self._journal / f".identity.{os.uname().nodename}.{os.getpid()}"
        draft.write_text(json.dumps(self._identity(), indent=1))
        try:
            os.link(draft, path)
        except FileExistsError:
            self._refuse_other(read_json(path), "being filled")
        finally:
            draft.unlink()

    def _refuse_other(self, found: Mapping[str, Any], state: str) -> None:
        mine = self._identity()
        if found == mine:
            return
        flat_mine, flat_found = mine | mine["config"], dict(found) | found["config"]
        names = [name for name in flat_mine | flat_found if name != "config"]
        differing = [
            f"{name} is {flat_found.get(name)!r} there and {flat_mine.get(name)!r} here"
            for name in names
            if flat_found.get(name) != flat_mine.get(name)
        ]
        raise LineageError(
            f"{self.path} is {state} by another job: {'; '.join(differing)}. Choose another "
            f"--output, or pass --overwrite"
        )

    def _refuse_foreign(self) -> None:
        present = self.path.iterdir() if self.path.is_dir() else ()
        foreign = [path for path in present if path.name not in _OURS and path.name[0] != "."]
        if foreign:
            raise ConfigError(
                f"{self.path} holds something else than scores ({foreign[0].name}): choose another "
                f"--output"
            )

    def _remove_old(self) -> None:
        """Remove earlier scores, the manifest first."""
        for name in _OURS:
            if name != self._journal.name:
                (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self._journal, ignore_errors=True)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a JSON file."""
    return dict(json.loads(json.dumps(dict(values), default=str)))


def _fingerprint(corpus: str, columns: Mapping[str, np.ndarray]) -> str:
    return hash_streams(corpus, *((columns[n].nbytes, blocks(columns[n])) for n in _COLUMNS))
