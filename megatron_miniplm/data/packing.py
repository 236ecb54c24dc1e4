"""Documents to instances: one buffer per domain, cut at sentence ends, as MiniPLM's code does.

A domain's documents are joined in their order. While its buffer holds `seq_length + 1` tokens, the
first `seq_length + 1` of them are a chunk, and the instance is the chunk up to its last *cut*; the
rest of the chunk stays in the buffer. A chunk without a cut is taken whole. A token is a cut if

- it is the document separator, or
- it is an end-of-sentence token (`EndTable`) with a newline in it, or
- it is an end-of-sentence token, and the two-token text of it and the token after it has a space,
  or no token is after it (which keeps "D.A." and "3.14" whole).

The work is in C++ (csrc/pack.cpp) and linear in the tokens, also where the only cut of a chunk is
its first token. The same rules in numpy are packing_reference.py, which the tests compare it to.

Not every token ends up in an instance. Each of the following is counted (`PackingCounters`):
instances of one token, instances whose inputs are all separators (they train nothing), the rest of
a document after its 2,000th chunk (a guard against runaway documents), and the tail of each domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from megatron_miniplm import _C
from megatron_miniplm.core.errors import ConfigError, DataError

MAX_CHUNKS_PER_DOCUMENT = 2000

_LONGEST_TOKEN = 65_535
_BRACKETS = (("[", "]"), ("(", ")"), ("{", "}"), ("<", ">"))
_TELLING = " .!?;\n[](){}<>"  # what decides whether a token ends a sentence

# Bits of EndTable.flags, as in csrc/pack.h.
ALWAYS, MAYBE, SPACE = 1, 2, 4


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
    """What the packer knows of each token, and the separator's id."""

    flags: np.ndarray
    """uint8[vocabulary]: `ALWAYS`, `MAYBE`, `SPACE`."""
    eod_id: int
    byte_lengths: np.ndarray | None = None
    """uint16[vocabulary]: bytes of text that a token stands for; None: text is not counted."""

    @classmethod
    def build(cls, token_bytes: Sequence[bytes], eod_id: int) -> EndTable:
        """Derive the table from the bytes that each token stands for.

        End-of-sentence tokens have one of ``. ! ? ;`` or a newline in them and no opening bracket
        without its partner. (The released list tests for a backslash where it means a brace; this
        one does not.) Refuses tokens of more than 65,535 bytes.
        """
        lengths = np.fromiter(map(len, token_bytes), np.int64, len(token_bytes))
        found = _bytes_in(token_bytes, lengths)
        ends_sentence = (found & _END) != 0
        for opening, closing in _BRACKETS:
            ends_sentence &= ((found & _bit(opening)) == 0) | ((found & _bit(closing)) != 0)
        flags = np.where(found & _bit(" "), np.uint8(SPACE), np.uint8(0))
        flags |= np.where(found & _bit("\n"), np.uint8(ALWAYS), np.uint8(MAYBE)) * ends_sentence
        flags[eod_id] |= ALWAYS
        if len(lengths) and lengths.max() > _LONGEST_TOKEN:
            raise DataError(
                f"token {lengths.argmax()} stands for {lengths.max()} bytes of text; at most "
                f"{_LONGEST_TOKEN} can be counted: is it a token?"
            )
        return cls(flags, eod_id, lengths.astype(np.uint16))

    def cuts(self, ids: np.ndarray) -> np.ndarray:
        """Which positions are cuts (bool, as many as `ids`) when nothing follows the last one."""
        flags = self.flags[ids]
        pair = np.full(len(ids), SPACE, np.uint8)
        np.bitwise_or(flags[:-1], flags[1:], out=pair[:-1])
        sentence_end = ((flags & MAYBE) << 1) & pair  # MAYBE << 1 is SPACE
        return ((flags & ALWAYS) | sentence_end) != 0


class Packed(NamedTuple):
    """Instances in the order in which they were completed."""

    tokens: np.ndarray
    """Their tokens end to end, of the packer's dtype; empty with ``keep_tokens=False``."""
    lengths: np.ndarray
    """int32[n], tokens."""
    domains: np.ndarray
    """uint16[n]."""
    starts: np.ndarray
    """int64[n]: where an instance starts among all tokens that its domain was given, separators
    included; its tokens lie there end to end."""


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
class TextCounters:
    """What the documents' own ids were, appended separators apart."""

    documents_without_tokens: int = 0
    separators_in_text: int = 0
    text_bytes_in_tokens: int = 0
    """Bytes of text that the ids stand for."""


@dataclass
class DomainCounters:
    """What one domain put in and got out."""

    tokens: int = 0
    """Tokens of its documents, separators included."""
    instances: int = 0
    packed_tokens: int = 0
    """Tokens of its instances, separators included."""
    packed_text_bytes: int = 0
    """Bytes of text that the tokens of its instances stand for; a separator stands for none."""


class Packer:
    """Packs documents into instances; the same documents give the same instances, always.

    `seq_length` is the number of inputs: instances have at most one token more. With `append_eod`
    the packer itself ends every document with the separator; documents without a token are counted
    and get none. `dtype` (uint16 or int32) is that of the tokens returned. Threads may share one.
    """

    def __init__(
        self,
        table: EndTable,
        *,
        seq_length: int,
        flush_tails: bool = False,
        append_eod: bool = False,
        keep_tokens: bool = True,
        dtype: np.dtype | type = np.int32,
        max_chunks: int = MAX_CHUNKS_PER_DOCUMENT,
    ) -> None:
        self.table = table
        byte_lengths = table.byte_lengths
        if byte_lengths is None:
            byte_lengths = np.zeros(len(table.flags), np.uint16)
        try:
            self._native = _C.Packer(
                flags=table.flags,
                byte_lengths=byte_lengths,
                eod_id=table.eod_id,
                seq_length=seq_length,
                max_chunks=max_chunks,
                bytes_per_token=np.dtype(dtype).itemsize,
                append_eod=append_eod,
                flush_tails=flush_tails,
                keep_tokens=keep_tokens,
            )
        except ValueError as error:
            raise ConfigError(f"cannot pack: {error}") from error

    def add(self, ids: np.ndarray, offsets: np.ndarray, domains: np.ndarray) -> Packed:
        """Append documents, return the instances that they complete.

        Document i is ``ids[offsets[i]:offsets[i + 1]]`` (int32[total], int64[n + 1]), its domain
        ``domains[i]`` (uint16[n]). Refuses, before anything changes, ids outside the vocabulary.
        """
        try:
            return Packed(*self._native.add(ids, offsets, domains))
        except ValueError as error:
            raise DataError(f"cannot pack: {error}") from error

    def finish(self) -> Packed:
        """Empty all buffers, in the order of the domains; the tails if they are to be flushed."""
        return Packed(*self._native.finish())

    @property
    def counters(self) -> PackingCounters:
        """Where all tokens so far went."""
        counts = self._native.counters()
        return PackingCounters(**{one.name: counts[one.name] for one in fields(PackingCounters)})

    @property
    def text_counters(self) -> TextCounters:
        """What the documents' own ids were."""
        counts = self._native.counters()
        return TextCounters(**{one.name: counts[one.name] for one in fields(TextCounters)})

    @property
    def domain_counters(self) -> list[DomainCounters]:
        """Counts for each domain number up to the highest so far."""
        return [DomainCounters(**counts) for counts in self._native.domain_counters()]


def _bit(character: str) -> np.uint32:
    return np.uint32(1 << _TELLING.index(character))


_END = np.bitwise_or.reduce([_bit(end) for end in ".!?;\n"])


def _bytes_in(token_bytes: Sequence[bytes], lengths: np.ndarray) -> np.ndarray:
    """uint32[vocabulary]: a `_bit` for each telling character that a token has in it."""
    bit_of = np.zeros(256, np.uint32)
    for character in _TELLING:
        bit_of[ord(character)] = _bit(character)
    bits = np.append(bit_of[np.frombuffer(b"".join(token_bytes), np.uint8)], np.uint32(0))
    # reduceat takes one element where a run is empty.
    starts = np.cumsum(lengths) - lengths
    return np.where(lengths > 0, np.bitwise_or.reduceat(bits, starts), np.uint32(0))
