"""The packer in numpy: the definition that `packing.Packer` (C++) must equal; nothing runs on it.

It came first and was itself compared with the released algorithm, word by word (test_packing.py).
Whether a position is a cut does not depend on the chunk that it falls into, so here the last cut at
or before every position comes from one pass of array operations over buffer and document; the C++
packer scans each chunk backwards instead. Tests and benchmarks use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_miniplm.data.packing import MAX_CHUNKS_PER_DOCUMENT, EndTable, PackingCounters


class ReferencePacked(NamedTuple):
    """Instances of one domain: their tokens end to end (int32) and their lengths (int32)."""

    tokens: np.ndarray
    lengths: np.ndarray


@dataclass
class _Buffer:
    """Tokens of one domain that wait for more; fewer than a chunk after every `add`."""

    pieces: list[np.ndarray] = field(default_factory=list)
    size: int = 0


class ReferencePacker:
    """Packs documents into instances; the same documents give the same instances, always.

    `seq_length` is the number of inputs: instances have at most one token more.
    """

    def __init__(
        self,
        table: EndTable,
        *,
        seq_length: int,
        flush_tails: bool = False,
        max_chunks: int = MAX_CHUNKS_PER_DOCUMENT,
    ) -> None:
        self.table, self.max_chunks = table, max_chunks
        self.flush_tails = flush_tails
        self.counters = PackingCounters()
        self._longest = seq_length + 1
        self._buffers: dict[int, _Buffer] = {}

    def add(self, domain: int, ids: np.ndarray) -> ReferencePacked:
        """Append one document (int32 ids, separator included); the instances it completes."""
        buffer = self._buffers.setdefault(domain, _Buffer())
        buffer.size += len(ids)
        self.counters.tokens_in += len(ids)
        self.counters.pending_tokens += len(ids)
        if buffer.size < self._longest:
            buffer.pieces.append(ids.copy())  # a view would keep the caller's whole batch alive
            return _EMPTY
        data = np.concatenate([*buffer.pieces, ids])
        bounds, used = self._cut(data)
        buffer.pieces, buffer.size = [data[used:].copy()], len(data) - used
        self.counters.pending_tokens -= used
        return self._keep(data, bounds)

    def finish(self) -> list[tuple[int, ReferencePacked]]:
        """Empty all buffers; the tails as (domain, instance) if they are to be flushed."""
        tails = []
        for domain, buffer in sorted(self._buffers.items()):
            self.counters.pending_tokens -= buffer.size
            if not self.flush_tails:
                self.counters.dropped_tail_tokens += buffer.size
            elif buffer.size == 1:
                self.counters.dropped_short_tokens += 1
            elif buffer.size > 1:
                packed = self._keep(np.concatenate(buffer.pieces), [(0, buffer.size)])
                self.counters.flushed_tails += len(packed.lengths)
                tails.append((domain, packed))
        self._buffers.clear()
        return [(domain, packed) for domain, packed in tails if len(packed.lengths)]

    def _cut(self, data: np.ndarray) -> tuple[list[tuple[int, int]], int]:
        """(start, end) of every instance in `data` and the number of tokens taken from its front.

        Counts what it passes over: single tokens and the rest of a runaway document.
        """
        positions = np.where(self.table.cuts(data), np.arange(len(data)), -1)
        last_cut = np.maximum.accumulate(positions)
        bounds: list[tuple[int, int]] = []
        start = 0
        while start + self._longest <= len(data):
            end = start + self._longest
            cut = int(last_cut[end - 1])
            if cut < start:
                self.counters.uncut_instances += 1
            else:
                self.counters.pushed_back_tokens += end - (cut + 1)
                end = cut + 1
            if end - start == 1:
                self.counters.dropped_short_tokens += 1
            elif len(bounds) == self.max_chunks:
                self.counters.overlong_documents += 1
                self.counters.dropped_overlong_tokens += len(data) - start
                return bounds, len(data)
            else:
                bounds.append((start, end))
            start = end
        return bounds, start

    def _keep(self, data: np.ndarray, bounds: Sequence[tuple[int, int]]) -> ReferencePacked:
        """The instances of `data` at `bounds`, without those whose inputs are all separators."""
        kept = []
        for start, end in bounds:
            if (
                data[start] == self.table.eod_id
                and (data[start : end - 1] == self.table.eod_id).all()
            ):
                self.counters.dropped_separator_instances += 1
                self.counters.dropped_separator_tokens += end - start
            else:
                kept.append((start, end))
        if not kept:
            return _EMPTY
        lengths = np.array([end - start for start, end in kept], np.int32)
        tokens = np.concatenate([data[start:end] for start, end in kept])
        self.counters.instances += len(kept)
        self.counters.tokens += len(tokens)
        return ReferencePacked(tokens, lengths)


_EMPTY = ReferencePacked(np.zeros(0, np.int32), np.zeros(0, np.int32))
