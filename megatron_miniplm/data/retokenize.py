"""A corpus or subset in another tokenizer: ids -> bytes -> text -> ids.

An instance is split at its separators; each piece is the bytes of its tokens, special tokens left
out, read as UTF-8, and encoded by itself; the pieces are joined by the new separator. Words are not
joined across instances: what is split in the source stays split.

Repacked, the text of each domain streams through `packing.Packer` again: nothing is cut off, save
for the single tokens that packing drops and counts. An instance may be *followed*: the next one of
its domain is the one that continues it (`continuity`). Then no separator comes between the two, and
a character split by their border goes to the second. Otherwise a separator ends an instance that
stops inside a document, because texts that were never neighbours must not look like one.

One to one, row i is row i of the source, and tokens beyond the sequence length are cut off.

What cannot be kept is counted (`ConversionCounters`): parts of a character at the edges of text
become U+FFFD or are dropped; special tokens stand for no text.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from megatron_miniplm.core.log import progress
from megatron_miniplm.data.continuity import followed
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.packing import DomainCounters, EndTable, Packed, Packer
from megatron_miniplm.data.tokenizers import Tokenizer

BrokenCharacters = Literal["replace", "drop"]

WINDOW = 2048
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


class InstanceSink(Protocol):
    """Where instances go: a `CorpusWriter`."""

    def add(self, tokens: np.ndarray, lengths: np.ndarray, domain: int | np.ndarray) -> None:
        """Append instances."""


@dataclass
class ConversionCounters:
    """What went in, and what a tokenizer's text cannot say."""

    source_instances: int = 0
    source_tokens: int = 0
    source_text_bytes: int = 0
    """Bytes of text that the source's tokens stand for; separators stand for none."""
    text_bytes: int = 0
    """Bytes of text that were encoded; U+FFFD has three."""
    text_bytes_in_tokens: int = 0
    """Bytes of text that the new ids stand for, before packing or cutting."""
    special_tokens: int = 0
    """Special tokens of the source other than the separator; they are left out."""
    broken_characters: int = 0
    broken_instances: int = 0
    """Places with bytes that are no UTF-8, mostly parts of a character at the edge of an instance;
    and the instances that have one."""
    separators_in_text: int = 0
    """Texts of the new separator in the source's text, which became separators."""
    added_separators: int = 0
    """Separators after text that stops inside a document (--repack)."""
    truncated_instances: int = 0
    truncated_tokens: int = 0
    """Instances that were too long in the new tokenizer, and tokens cut off (--no-repack)."""
    padded_instances: int = 0
    """Instances of fewer than 2 tokens that separators filled up to 2 (--no-repack)."""


class Instances(NamedTuple):
    """Consecutive instances of the source."""

    tokens: Sequence[np.ndarray]
    domains: np.ndarray
    """uint16[n]."""
    followed: np.ndarray
    """bool[n]: whether the next of the source's instances of the domain continues this one."""


class Converted(NamedTuple):
    """Instances in the new tokenizer, end to end."""

    ids: np.ndarray
    """int32."""
    offsets: np.ndarray
    """int64[n + 1]."""


class Converter:
    """Converts instances from `old` to `new`; `counters` tells what happened."""

    def __init__(self, old: Tokenizer, new: Tokenizer, *, broken: BrokenCharacters) -> None:
        self.old, self.new, self.broken = old, new, broken
        self.counters = ConversionCounters()
        self._bytes, new_bytes = old.token_bytes(), new.token_bytes()
        self._old_space, self._new_space = (
            _adds_space(old, self._bytes),
            _adds_space(new, new_bytes),
        )
        self._special = np.zeros(len(self._bytes), bool)
        for at in old.special_ids():
            if at < len(self._bytes):
                self._bytes[at], self._special[at] = b"", True
        self._special[old.eod_id] = False
        self.table = EndTable.build(new_bytes, new.eod_id)
        """For packing what comes out."""
        assert self.table.byte_lengths is not None, "build() counts text"
        self.byte_lengths = self.table.byte_lengths.astype(np.int64)
        """int64[new vocabulary]: bytes of text that a token stands for."""
        self._held: dict[int, bytes] = {}  # of a domain: the start of a character

    def convert(self, instances: Instances, *, end_fragments: bool) -> Converted:
        """Convert instances in their order.

        `end_fragments`: a separator ends an instance that stops inside a document, unless it is
        followed.
        """
        texts: list[str] = []
        separator: list[bool] = []  # whether one comes after the text
        counts = []
        for tokens, domain, followed_by in zip(
            instances.tokens, instances.domains.tolist(), instances.followed.tolist(), strict=True
        ):
            pieces = self._pieces(tokens, domain, followed_by)
            texts += pieces
            ended = tokens[-1] == self.old.eod_id
            added = end_fragments and not ended and not followed_by
            separator += [True] * (len(pieces) - 1) + [added]
            self.counters.added_separators += added
            counts.append(len(pieces))
        ids, offsets = self.new.encode_flat(texts)
        self.counters.text_bytes += sum(len(text.encode()) for text in texts)
        self.counters.text_bytes_in_tokens += int(self.byte_lengths[ids].sum())
        self.counters.separators_in_text += int((ids == self.new.eod_id).sum())
        return self._join(ids, offsets, np.array(separator), np.array(counts))

    def _join(
        self, ids: np.ndarray, offsets: np.ndarray, separator: np.ndarray, counts: np.ndarray
    ) -> Converted:
        """Pieces to instances: a separator after each piece that has one."""
        ends = np.cumsum(np.diff(offsets) + separator)
        joined = np.full(int(ends[-1]), self.new.eod_id, np.int32)
        of_text = np.ones(len(joined), bool)
        of_text[ends[separator] - 1] = False
        joined[of_text] = ids
        return Converted(joined, np.concatenate([[0], ends[np.cumsum(counts) - 1]]))

    def _pieces(self, tokens: np.ndarray, domain: int, followed_by: bool) -> list[str]:
        """The texts between separators; the last one is empty if the instance ends with one."""
        self.counters.source_instances += 1
        self.counters.source_tokens += len(tokens)
        self.counters.special_tokens += int(self._special[tokens].sum())
        table, broken_before = self._bytes, self.counters.broken_characters
        bounds = [-1, *np.flatnonzero(tokens == self.old.eod_id).tolist(), len(tokens)]
        flat = tokens.tolist()
        parts = [
            b"".join([table[at] for at in flat[start + 1 : stop]])
            for start, stop in itertools.pairwise(bounds)
        ]
        self.counters.source_text_bytes += sum(map(len, parts))
        parts[0] = self._held.pop(domain, b"") + parts[0]
        if followed_by:
            parts[-1], self._held[domain] = _split_character(parts[-1])
        pieces = [
            self._without_space(self._decode(part), starts_document=number > 0)
            for number, part in enumerate(parts)
        ]
        self.counters.broken_instances += self.counters.broken_characters > broken_before
        return pieces

    def _decode(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            text = raw.decode(errors="replace")
            found = text.count("\N{REPLACEMENT CHARACTER}") - raw.count(_REPLACEMENT)
            self.counters.broken_characters += found
            return text if self.broken == "replace" else raw.decode(errors="ignore")

    def _without_space(self, text: str, *, starts_document: bool) -> str:
        """Take away the space that SentencePiece-like tokenizers put before a text.

        The old one put it at the start of a document; the new one will put it anywhere, so it is
        taken from a piece that goes on with a word of its own.
        """
        taken = self._old_space if starts_document else self._new_space
        return text[1:] if taken and text.startswith(" ") else text


def _adds_space(tokenizer: Tokenizer, table: Sequence[bytes]) -> bool:
    """Whether a text is encoded with a space before it."""
    return b"".join(table[at] for at in tokenizer.encode_flat(["a"])[0]) == b" a"


def _split_character(raw: bytes) -> tuple[bytes, bytes]:
    """The bytes without the start of a character at their end, and that start."""
    for size in range(1, min(4, len(raw) + 1)):
        lead = raw[-size]
        if lead >= 0xC0:
            length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return (raw[:-size], raw[-size:]) if length > size else (raw, b"")
        if lead < 0x80:
            break
    return raw, b""


class Retokenizer:
    """One run: a corpus or subset through a `Converter` into a sink."""

    def __init__(
        self,
        source: Corpus,
        tokenizer: Tokenizer,
        *,
        seq_length: int,
        broken: BrokenCharacters = "replace",
    ) -> None:
        self.source, self.tokenizer, self.seq_length = source, tokenizer, seq_length
        self.converter = Converter(source.tokenizer(), tokenizer, broken=broken)

    def repack(
        self, sink: InstanceSink, *, end_fragments: bool = True, flush_tails: bool = True
    ) -> dict[str, Any]:
        """Stream the text of each domain through the packer; returns the statistics.

        `end_fragments`: as in `Converter.convert`.
        """
        packer = Packer(self.converter.table, seq_length=self.seq_length, flush_tails=flush_tails)
        for window in self._windows(followed(self.source)):
            converted = self.converter.convert(window, end_fragments=end_fragments)
            _write(sink, packer.add(*converted, window.domains))
        _write(sink, packer.finish())
        counts = packer.domain_counters
        counts += [DomainCounters()] * (len(self.source.domain_names) - len(counts))
        return self._statistics(counts) | {"packing": dataclasses.asdict(packer.counters)}

    def one_to_one(self, sink: InstanceSink) -> dict[str, Any]:
        """Write row i of the source as row i; returns the statistics."""
        counts = [DomainCounters() for _ in self.source.domain_names]
        for window in self._windows(np.zeros(len(self.source), bool)):
            converted = self.converter.convert(window, end_fragments=False)
            tokens, lengths = self._fit(converted)
            sink.add(tokens, lengths, window.domains)
            self._count(counts, window.domains, converted, tokens, lengths)
        return self._statistics(counts)

    def _windows(self, continued: np.ndarray) -> Iterator[Instances]:
        """All instances in order; `continued` (bool[N]) says which ones are followed."""
        total = len(self.source)
        with progress("retokenize (instances)", total, "instances") as bar:
            for begin in range(0, total, WINDOW):
                rows = slice(begin, min(begin + WINDOW, total))
                yield Instances(
                    self.source.gather(range(rows.start, rows.stop)),
                    np.ascontiguousarray(self.source.domains[rows]),
                    continued[rows],
                )
                bar.advance(rows.stop - begin)

    def _fit(self, converted: Converted) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and lengths (int32) of instances of 2 to ``seq_length + 1`` tokens."""
        counters, longest = self.converter.counters, self.seq_length + 1
        lengths = np.diff(converted.offsets)
        over = np.maximum(lengths - longest, 0)
        counters.truncated_instances += int((over > 0).sum())
        counters.truncated_tokens += int(over.sum())
        place = np.arange(len(converted.ids)) - np.repeat(converted.offsets[:-1], lengths)
        tokens, lengths = converted.ids[place < longest], lengths - over
        missing = np.maximum(2 - lengths, 0)
        counters.padded_instances += int((missing > 0).sum())
        where = np.repeat(np.cumsum(lengths), missing)
        tokens = np.insert(tokens, where, self.tokenizer.eod_id)
        return tokens, (lengths + missing).astype(np.int32)

    def _count(
        self,
        counts: list[DomainCounters],
        domains: np.ndarray,
        converted: Converted,
        tokens: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        """Add a window to the counts of its domains."""
        sizes = self.converter.byte_lengths[tokens] * (tokens != self.tokenizer.eod_id)
        text = np.concatenate([[0], np.cumsum(sizes)])
        ends = np.cumsum(lengths, dtype=np.int64)
        per_instance = text[ends] - text[ends - lengths]
        for number in np.unique(domains).tolist():
            own, count = domains == number, counts[number]
            count.tokens += int(np.diff(converted.offsets)[own].sum())
            count.instances += int(own.sum())
            count.packed_tokens += int(lengths[own].sum(dtype=np.int64))
            count.packed_text_bytes += int(per_instance[own].sum())

    def _statistics(self, counts: list[DomainCounters]) -> dict[str, Any]:
        """The manifest's `statistics`, named as those of `preprocess` where possible."""
        domains = [dataclasses.asdict(count) for count in counts]
        return {
            **{name: sum(one[name] for one in domains) for name in domains[0]},
            **dataclasses.asdict(self.converter.counters),
            "domains": dict(zip(self.source.domain_names, domains, strict=True)),
        }


def _write(sink: InstanceSink, packed: Packed) -> None:
    if len(packed.lengths):
        sink.add(packed.tokens, packed.lengths, packed.domains)
