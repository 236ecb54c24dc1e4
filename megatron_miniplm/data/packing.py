"""Documents to instances: one buffer per domain, cut at sentence ends (spec/algorithms 1.2).

A domain's documents are joined in their order. While its buffer holds `seq_length + 1` tokens, the
first `seq_length + 1` of them are a chunk, and the instance is the chunk up to its last *cut*; the
rest of the chunk stays in the buffer. A chunk without a cut is taken whole. A token is a cut if

- it is the document separator, or
- it is an end-of-sentence token (`EndTable`) with a newline in it, or
- it is an end-of-sentence token, and the two-token text of it and the token after it has a space,
  or no token is after it (which keeps "D.A." and "3.14" whole).

Whether a position is a cut does not depend on the chunk that it falls into. So the last cut at or
before every position comes from one pass of array operations over buffer and document, and a chunk
costs one look-up. An instance takes at least one token, so the number of steps for a document is
bounded by its tokens, also where the only cut of a chunk is its first token.

Not every token ends up in an instance. Each of the following is counted (`PackingCounters`):
instances of one token, instances whose inputs are all separators (they train nothing), the rest of
a document after its 2,000th chunk (a guard against runaway documents), and the tail of each domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_miniplm.core.errors import ConfigError, DataError

MAX_CHUNKS_PER_DOCUMENT = 2000

_ENDS = b".!?;\n"
_BRACKETS = (b"[]", b"()", b"{}", b"<>")

# Bits of EndTable.flags.
_ALWAYS, _MAYBE, _SPACE = 1, 2, 4


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """How documents become instances."""

    seq_length: int = 1024
    """Inputs of an instance, in tokens; an instance holds at most one more, the last label."""
    append_eod: bool = True
    """End every document with the separator."""
    flush_tails: bool = False
    """Keep what is left in each domain's buffer at the end as a last, shorter instance."""

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise ConfigError(f"--seq-length {self.seq_length} must be at least 1")


@dataclass(frozen=True)
class EndTable:
    """What the packer knows of each token: `flags`, uint8[vocabulary]; and the separator's id."""

    flags: np.ndarray
    eod_id: int

    @classmethod
    def build(cls, token_bytes: Sequence[bytes], eod_id: int) -> EndTable:
        """Derive the flags from the bytes that each token stands for.

        End-of-sentence tokens have one of ``. ! ? ;`` or a newline in them and no opening bracket
        without its partner. (The released list tests for a backslash where it means a brace; this
        one does not.)
        """
        flags = np.zeros(len(token_bytes), np.uint8)
        for at, token in enumerate(token_bytes):
            if b" " in token:
                flags[at] |= _SPACE
            if _ends_sentence(token):
                flags[at] |= _ALWAYS if b"\n" in token else _MAYBE
        flags[eod_id] |= _ALWAYS
        return cls(flags, eod_id)

    def cuts(self, ids: np.ndarray) -> np.ndarray:
        """Which positions are cuts (bool, as many as `ids`) when nothing follows the last one."""
        flags = self.flags[ids]
        pair = np.full(len(ids), _SPACE, np.uint8)
        np.bitwise_or(flags[:-1], flags[1:], out=pair[:-1])
        sentence_end = ((flags & _MAYBE) << 1) & pair  # _MAYBE << 1 is _SPACE
        return ((flags & _ALWAYS) | sentence_end) != 0


class Packed(NamedTuple):
    """Instances of one domain: their tokens end to end (int32) and their lengths (int32)."""

    tokens: np.ndarray
    lengths: np.ndarray


@dataclass
class PackingCounters:
    """Where the tokens went: `tokens_in` is the sum of `tokens`, the dropped ones and `pending`."""

    tokens_in: int = 0
    instances: int = 0
    tokens: int = 0
    """Tokens of all instances."""
    pushed_back_tokens: int = 0
    """Tokens after a cut that went back to the buffer (a token may go back more than once)."""
    uncut_instances: int = 0
    """Chunks without any cut, taken whole."""
    dropped_short_tokens: int = 0
    """Tokens of instances of one token, and tails of one token."""
    dropped_separator_instances: int = 0
    dropped_separator_tokens: int = 0
    """Instances, and their tokens, whose inputs are all separators."""
    overlong_documents: int = 0
    dropped_overlong_tokens: int = 0
    """Documents of more than 2,000 chunks, and the tokens dropped from them."""
    dropped_tail_tokens: int = 0
    flushed_tails: int = 0
    pending_tokens: int = 0
    """Tokens still in a buffer; none after `Packer.finish`."""


@dataclass
class _Buffer:
    """Tokens of one domain that wait for more; fewer than a chunk after every `Packer.add`."""

    pieces: list[np.ndarray] = field(default_factory=list)
    size: int = 0


class Packer:
    """Packs documents into instances; the same documents give the same instances, always.

    `seq_length` is the number of inputs: instances have at most one token more.
    """

    def __init__(self, table: EndTable, *, seq_length: int, flush_tails: bool = False) -> None:
        self.table = table
        self.flush_tails = flush_tails
        self.counters = PackingCounters()
        self._longest = seq_length + 1
        self._buffers: dict[int, _Buffer] = {}

    def add(self, domain: int, ids: np.ndarray) -> Packed:
        """Append one document (int32 ids, separator included), return the instances it completes.

        Refuses ids outside the vocabulary.
        """
        self._check(ids)
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

    def finish(self) -> list[tuple[int, Packed]]:
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

    def _check(self, ids: np.ndarray) -> None:
        # Seen as unsigned, a negative id is above every vocabulary too.
        if len(ids) and ids.view(np.uint32).max() >= len(self.table.flags):
            raise DataError(
                f"a document has token ids from {ids.min()} to {ids.max()}, the vocabulary has "
                f"{len(self.table.flags)} tokens; pack with the tokenizer that encoded it"
            )

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
            elif len(bounds) == MAX_CHUNKS_PER_DOCUMENT:
                self.counters.overlong_documents += 1
                self.counters.dropped_overlong_tokens += len(data) - start
                return bounds, len(data)
            else:
                bounds.append((start, end))
            start = end
        return bounds, start

    def _keep(self, data: np.ndarray, bounds: Sequence[tuple[int, int]]) -> Packed:
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
        return Packed(tokens, lengths)


_EMPTY = Packed(np.zeros(0, np.int32), np.zeros(0, np.int32))


def _ends_sentence(token: bytes) -> bool:
    if not any(end in token for end in _ENDS):
        return False
    return not any(pair[0] in token and pair[1] not in token for pair in _BRACKETS)
