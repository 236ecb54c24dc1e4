"""Text to corpus: read, encode in batches, pack, write; with counts of everything on the way.

The order of documents is the order of the input, and a batch is only a unit of work: its size and
the number of threads change neither a byte of the corpus nor a count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.core.log import get_logger, progress
from megatron_miniplm.data.packing import (
    DomainCounters,
    EndTable,
    Packed,
    Packer,
    PackingConfig,
)
from megatron_miniplm.data.text import Document, TextReader
from megatron_miniplm.data.tokenizers import Tokenizer
from megatron_miniplm.data.writer import MAX_DOMAINS, CorpusWriter

BATCH_CHARACTERS = 8_000_000


@dataclass
class DomainTexts:
    """What one domain's documents were as text."""

    documents: int = 0
    characters: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of its documents."""


class Preprocessor:
    """One run: documents go through tokenizer and packer into a `CorpusWriter`."""

    def __init__(self, tokenizer: Tokenizer, packing: PackingConfig, writer: CorpusWriter) -> None:
        self.tokenizer, self.packing, self.writer = tokenizer, packing, writer
        self.packer = Packer(
            EndTable.build(tokenizer.token_bytes(), tokenizer.eod_id),
            seq_length=packing.seq_length,
            flush_tails=packing.flush_tails,
            append_eod=packing.append_eod,
            dtype=writer.dtype,
        )
        self._domains: dict[str, int] = {}
        self._texts: list[DomainTexts] = []

    def run(self, reader: TextReader, *, batch_characters: int = BATCH_CHARACTERS) -> Path:
        """Process all documents, finish the corpus, return its manifest's path."""
        megabytes = None if reader.total_bytes is None else reader.total_bytes / 1e6
        done = 0
        with progress("preprocess (MB as stored)", megabytes, "MB") as bar:
            for batch in _batches(reader, batch_characters):
                self._write(self._pack(batch))
                bar.advance((reader.bytes_read - done) / 1e6)
                done = reader.bytes_read
        self._write(self.packer.finish())
        statistics = self._all_statistics(reader)
        self._refuse_empty()
        self._log(statistics)
        return self.writer.finish(list(self._domains), statistics)

    def _pack(self, batch: list[Document]) -> Packed:
        """Instances that a batch of documents completes, in document order."""
        domains = np.zeros(len(batch), np.uint16)
        for number, document in enumerate(batch):
            domains[number] = domain = self._domain(document.domain)
            counts = self._texts[domain]
            counts.documents += 1
            counts.characters += len(document.text)
            counts.text_bytes += _utf8_length(document.text)
        ids, offsets = self.tokenizer.encode_flat([document.text for document in batch])
        return self.packer.add(ids, offsets, domains)

    def _domain(self, name: str) -> int:
        """Number of a domain; they are numbered in the order of their first document."""
        if name not in self._domains:
            if len(self._domains) == MAX_DOMAINS:
                raise DataError(
                    f"more than {MAX_DOMAINS} domains, the last one is {name!r}: is --domain-key "
                    "the key of a label?"
                )
            self._domains[name] = len(self._domains)
            self._texts.append(DomainTexts())
        return self._domains[name]

    def _write(self, packed: Packed) -> None:
        self.writer.add(packed.tokens, packed.lengths, packed.domains)

    def _all_statistics(self, reader: TextReader) -> dict[str, Any]:
        """The manifest's `statistics`: totals, fates of tokens and records, counts per domain."""
        packed = [dataclasses.asdict(counts) for counts in self.packer.domain_counters]
        packed += [dataclasses.asdict(DomainCounters())] * (len(self._texts) - len(packed))
        texts = [dataclasses.asdict(counts) for counts in self._texts]
        domains = [text | tokens for text, tokens in zip(texts, packed, strict=True)]
        of_text = self.packer.text_counters
        return {
            **{name: sum(counts[name] for counts in domains) for name in domains[0]},
            "empty_documents": reader.empty_documents,
            "bad_records": reader.bad_records,
            "documents_without_tokens": of_text.documents_without_tokens,
            "lost_text_bytes": sum(counts.text_bytes for counts in self._texts)
            - of_text.text_bytes_in_tokens,
            "separators_in_text": of_text.separators_in_text,
            "packing": dataclasses.asdict(self.packer.counters),
            "domains": dict(zip(self._domains, domains, strict=True)),
        }

    def _refuse_empty(self) -> None:
        counters = self.packer.counters
        if not counters.instances:
            raise DataError(
                f"{counters.tokens_in} tokens of text fill no instance of "
                f"{self.packing.seq_length + 1}: give more text, a smaller --seq-length, or keep "
                "incomplete instances with --flush-tails"
            )

    def _log(self, statistics: dict[str, Any]) -> None:
        counters = self.packer.counters
        dropped = counters.tokens_in - counters.tokens
        get_logger().info(
            "%d documents of %d domains, %d tokens -> %d instances; %d tokens dropped (%.2f %%), "
            "%d of them in tails; %d empty documents, %d bad records",
            statistics["documents"], len(self._domains), counters.tokens_in, counters.instances,
            dropped, 100 * dropped / counters.tokens_in, counters.dropped_tail_tokens,
            statistics["empty_documents"], statistics["bad_records"],
        )  # fmt: skip
        if statistics["lost_text_bytes"] > 0:
            get_logger().warning(
                "%d bytes of text are in no token: the vocabulary lacks them, or the tokenizer "
                "normalises text", statistics["lost_text_bytes"],
            )  # fmt: skip
        if counters.overlong_documents:
            get_logger().warning(
                "%d documents had more than 2,000 chunks; %d tokens of them are dropped",
                counters.overlong_documents, counters.dropped_overlong_tokens,
            )  # fmt: skip


def _batches(reader: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Consecutive documents of at least `size` characters together (the last batch: the rest)."""
    batch: list[Document] = []
    characters = 0
    for document in reader:
        batch.append(document)
        characters += len(document.text)
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
