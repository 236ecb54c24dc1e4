"""Bytes by instance id: what a model says of each instance of a corpus, in a folder of shards.

SIGNATURES, to be filled within the hour (branch s1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_miniplm.core.manifest import Manifest, Parent
from megatron_miniplm.data.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one instance has in a store."""

    payload: bytes
    num_positions: int
    num_values: int
    """Kept logits, or numbers of a hidden state."""
    sums: Mapping[str, float] = field(default_factory=dict)
    """Sums over the positions; the manifest has their means (``mean_entropy`` of "entropy")."""


class RecordStore:
    """A finished store; make one with `open`. Any thread may read it.

    Attributes: ``path``, ``manifest``, ``fingerprint``, ``root_fingerprint``,
    ``corpus_fingerprint``, ``ids`` (int64[N], ascending, mapped).
    """

    manifest: Manifest
    ids: np.ndarray

    @classmethod
    def open(cls, path: str | Path) -> RecordStore:
        raise NotImplementedError

    def check_corpus(self, corpus: Corpus) -> None:
        """LineageError where the corpus has another root."""

    def read(self, ids: Sequence[int] | np.ndarray) -> list[memoryview]:
        """Checked payloads, in the order of `ids`. DataError names a missing or damaged one."""
        raise NotImplementedError


class RecordWriter:
    """Fills a store; several processes may fill the same one.

    `config` is what must be equal for two processes to fill one store (teacher, truncation,
    encoding, what is stored); `facts` are for the manifest (vocab_size, taus, teacher step).
    """

    num_windows: int

    def __init__(
        self,
        path: Path,
        *,
        corpus: Corpus,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        parents: Mapping[str, Parent] = {},
        overwrite: bool = False,
    ) -> None:
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        raise NotImplementedError

    def rows(self, number: int) -> range:
        """The corpus rows of one window."""
        raise NotImplementedError

    def todo(self, shard: tuple[int, int] = (0, 1)) -> list[int]:
        raise NotImplementedError

    def write_window(self, number: int, records: Sequence[Record]) -> None:
        """One record a row of `rows(number)`; becomes one shard file."""

    def add_shard(
        self, name: str, ids: np.ndarray, records: Sequence[Record], *, step: int
    ) -> None:
        """A shard of any instances (`pretrain --cache-logits`); of one id, the highest step wins."""

    def rewind(self, step: int) -> None:
        """Remove the shards of later steps than the checkpoint that a run resumed from."""

    def finish(self) -> bool:
        """Make the index and the manifest; False while windows are missing."""
        raise NotImplementedError
