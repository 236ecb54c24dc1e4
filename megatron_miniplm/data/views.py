"""Where the instances of tokenised documents lie: the packer's answer as runs of their ``.bin``.

Packing keeps the order of tokens, so an instance is a run of the documents' tokens, and
`packing.Packer` says where it starts. Documents go through it in blocks; memory is a block, or the
longest document if that is longer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.data.documents import TokenizedDocuments
from megatron_miniplm.data.packing import EndTable, Packer, PackingCounters
from megatron_miniplm.data.tokenizers import Tokenizer

BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How tokenised documents become instances."""

    seq_length: int = 1024
    """Inputs of an instance, in tokens; an instance holds at most one more, the last label."""
    sentence_cuts: bool = True
    """End instances at the last sentence end that fits; without, every instance is full."""
    flush_tails: bool = False
    """Keep what is left at the end of each prefix as a last, shorter instance."""

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise ConfigError(f"--seq-length {self.seq_length} must be at least 1")


class Views(NamedTuple):
    """Instances as runs of a ``.bin``: first token (int64[n]) and length in tokens (int32[n])."""

    starts: np.ndarray
    lengths: np.ndarray


@dataclass
class ViewStatistics:
    """What one prefix put into the corpus (the characters of its text are not known)."""

    documents: int
    """Documents with at least one token."""
    documents_without_tokens: int
    tokens: int
    """Tokens of its documents, separators included."""
    text_bytes: int
    """Bytes of text that those tokens stand for; a separator stands for none."""
    instances: int
    packed_tokens: int
    """Tokens of its instances, separators included."""
    packed_text_bytes: int
    """Bytes of text that the tokens of its instances stand for."""


def view_table(tokenizer: Tokenizer, view: ViewConfig) -> EndTable:
    """What the packer needs of each token: no cut anywhere without `sentence_cuts`."""
    table = EndTable.build(tokenizer.token_bytes(), tokenizer.eod_id)
    assert table.byte_lengths is not None, "build() counts text"
    byte_lengths = table.byte_lengths.copy()
    byte_lengths[table.eod_id] = 0
    flags = table.flags if view.sentence_cuts else np.zeros_like(table.flags)
    return dataclasses.replace(table, flags=flags, byte_lengths=byte_lengths)


class ViewPacker:
    """Packs the documents of one prefix where they lie."""

    def __init__(self, documents: TokenizedDocuments, table: EndTable, view: ViewConfig) -> None:
        self.documents = documents
        self._table = table
        self._packer = Packer(
            table, seq_length=view.seq_length, flush_tails=view.flush_tails, keep_tokens=False
        )
        self._documents = 0

    def blocks(self) -> Iterator[tuple[np.ndarray, Views]]:
        """Every token once, in blocks, each with the instances that it completes; then the tail.

        Refuses ids outside the vocabulary and documents that do not end with the separator.
        """
        for begin, ends in self.documents.blocks(BLOCK_TOKENS):
            tokens = self.documents.tokens[begin : ends[-1]]
            self._check(tokens, begin, ends)
            offsets = np.concatenate([[0], ends - begin])
            self._documents += int((np.diff(offsets) > 0).sum())
            domains = np.zeros(len(ends), np.uint16)
            packed = self._packer.add(tokens.astype(np.int32, copy=False), offsets, domains)
            yield tokens, Views(packed.starts, packed.lengths)
            self.documents.release(int(ends[-1]))
        tail = self._packer.finish()
        yield self.documents.tokens[:0], Views(tail.starts, tail.lengths)

    @property
    def counters(self) -> PackingCounters:
        """Where all tokens so far went."""
        return self._packer.counters

    @property
    def statistics(self) -> ViewStatistics:
        """What the prefix put in so far."""
        text, counts = self._packer.text_counters, self._packer.domain_counters[0]
        return ViewStatistics(
            documents=self._documents,
            documents_without_tokens=text.documents_without_tokens,
            text_bytes=text.text_bytes_in_tokens,
            **dataclasses.asdict(counts),
        )

    def _check(self, tokens: np.ndarray, begin: int, ends: np.ndarray) -> None:
        """Refuse wrong ids and document ends, naming the document."""
        known = len(self._table.flags)
        # Seen as unsigned, a negative id is above every vocabulary too.
        unsigned = tokens.view(np.dtype(f"u{tokens.itemsize}"))
        if len(tokens) and unsigned.max() >= known:
            at = int(unsigned.argmax())
            raise DataError(
                f"{self.documents.prefix}: document {self.documents.document_of(begin + at)} holds "
                f"token {tokens[at]}, but the vocabulary has {known}: give the --tokenizer-model "
                f"that encoded it"
            )
        last = ends[np.diff(ends, prepend=begin) > 0] - begin - 1
        lacking = tokens[last] != self._table.eod_id
        if lacking.any():
            at = int(last[np.argmax(lacking)])
            raise DataError(
                f"{self.documents.prefix}: document {self.documents.document_of(begin + at)} ends "
                f"with token {tokens[at]}, not with the separator {self._table.eod_id}. If another "
                f"token ends documents, name it with --eod-token. If none does, it cannot be put "
                f"in without copying: tokenise again with --append-eod, as "
                f"tools/preprocess_data.py does by default, or run miniplm preprocess on the text"
            )
