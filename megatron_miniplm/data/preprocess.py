"""Text to instances: read, encode, pack and write side by side; with counts of everything.

The order of documents is the order of the input, and a batch is only a unit of work: its size and
the number of threads change neither a byte of the result nor a count. Reading and encoding run in a
thread each (`pipeline`), packing and writing in the caller's; the fast tokenizer has threads of its
own. A few batches are in memory at a time, however long the input is.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron_miniplm import _C
from megatron_miniplm.core.errors import DataError
from megatron_miniplm.core.log import get_logger, progress
from megatron_miniplm.data.packing import (
    DomainCounters,
    EndTable,
    Packed,
    Packer,
    PackingConfig,
)
from megatron_miniplm.data.pipeline import Pipeline
from megatron_miniplm.data.shards import MAX_DOMAINS
from megatron_miniplm.data.text import TextBatch, TextReader
from megatron_miniplm.data.tokenizers import Tokenizer

# Small: what is in flight stays near the cores, and little memory is touched.
BATCH_CHARACTERS = 2_000_000
_DEPTH = 2
_SWITCH_SECONDS = 0.0005


class InstanceSink(Protocol):
    """Where instances go: a `ShardWriter`, or a `CorpusWriter`."""

    dtype: np.dtype

    def add(self, tokens: np.ndarray, lengths: np.ndarray, domain: int | np.ndarray) -> None:
        """Append instances."""


@dataclass
class DomainTexts:
    """What one domain's documents were as text."""

    documents: int = 0
    characters: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of its documents."""


class Preprocessed(NamedTuple):
    """What a run put into its sink."""

    domain_names: list[str]
    statistics: dict[str, Any]
    """The manifest's `statistics`: totals, fates of tokens and records, counts per domain."""


class _Encoded(NamedTuple):
    ids: np.ndarray
    offsets: np.ndarray
    domains: np.ndarray
    bytes_read: int


class Preprocessor:
    """One run: documents go through tokenizer and packer into a sink."""

    def __init__(self, tokenizer: Tokenizer, packing: PackingConfig, sink: InstanceSink) -> None:
        self.tokenizer, self.packing, self.sink = tokenizer, packing, sink
        self.packer = Packer(
            EndTable.build(tokenizer.token_bytes(), tokenizer.eod_id),
            seq_length=packing.seq_length,
            flush_tails=packing.flush_tails,
            append_eod=packing.append_eod,
            dtype=sink.dtype,
        )
        self._domains: dict[str, int] = {}
        self._texts: list[DomainTexts] = []

    def run(self, reader: TextReader, *, batch_characters: int = BATCH_CHARACTERS) -> Preprocessed:
        """Process all documents and empty the packer; the sink is left to its owner to finish."""
        megabytes = None if reader.total_bytes is None else reader.total_bytes / 1e6
        done = 0
        with (
            _frequent_switches(),
            progress("preprocess (MB as stored)", megabytes, "MB") as bar,
            Pipeline(depth=_DEPTH) as pipeline,
        ):
            read = pipeline.ahead(reader.batches(batch_characters), name="reader")
            for batch in pipeline.ahead(map(self._encode, read), name="tokenizer"):
                self._write(self.packer.add(batch.ids, batch.offsets, batch.domains))
                bar.advance((batch.bytes_read - done) / 1e6)
                done = batch.bytes_read
        self._write(self.packer.finish())
        return Preprocessed(list(self._domains), self._all_statistics(reader))

    def _encode(self, batch: TextBatch) -> _Encoded:
        """Ids of a batch; counts its texts."""
        ids, offsets = self.tokenizer.encode_flat(batch.texts)
        numbers = map(self._domain, batch.domains)
        domains = np.fromiter(numbers, np.uint16, len(batch.domains))
        # The tokenizer made the UTF-8 form of every text already; here it is only measured.
        characters, sizes = _C.text_sizes(batch.texts)
        for number in np.unique(domains).tolist():
            own, counts = domains == number, self._texts[number]
            counts.documents += int(own.sum())
            counts.characters += int(characters[own].sum())
            counts.text_bytes += int(sizes[own].sum())
        return _Encoded(ids, offsets, domains, batch.bytes_read)

    def _domain(self, name: str) -> int:
        """Number of a domain; they are numbered in the order of their first document."""
        number = self._domains.get(name)
        if number is None:
            number = len(self._domains)
            check_domain_count(number + 1, name)
            self._domains[name] = number
            self._texts.append(DomainTexts())
        return number

    def _write(self, packed: Packed) -> None:
        self.sink.add(packed.tokens, packed.lengths, packed.domains)

    def _all_statistics(self, reader: TextReader) -> dict[str, Any]:
        packed = [dataclasses.asdict(counts) for counts in self.packer.domain_counters]
        packed += [dataclasses.asdict(DomainCounters())] * (len(self._texts) - len(packed))
        texts = [dataclasses.asdict(counts) for counts in self._texts]
        domains = [text | tokens for text, tokens in zip(texts, packed, strict=True)]
        of_text = self.packer.text_counters
        text_bytes = sum(counts.text_bytes for counts in self._texts)
        return {
            **{name: sum(counts[name] for counts in domains) for name in domains[0]},
            "empty_documents": reader.empty_documents,
            "bad_records": reader.bad_records,
            "documents_without_tokens": of_text.documents_without_tokens,
            "lost_text_bytes": text_bytes - of_text.text_bytes_in_tokens,
            "separators_in_text": of_text.separators_in_text,
            "packing": dataclasses.asdict(self.packer.counters),
            "domains": dict(zip(self._domains, domains, strict=True)),
        }


def check_domain_count(count: int, last: str) -> None:
    """Refuse more domains than their numbers have room for."""
    if count > MAX_DOMAINS:
        raise DataError(
            f"more than {MAX_DOMAINS} domains, the last one is {last!r}: is --domain-key the key "
            "of a label?"
        )


def add_statistics(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum of several runs' statistics; domains in the order in which they first appear."""
    total: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        total[name] = add_statistics(values) if isinstance(values[0], Mapping) else sum(values)
    return total


def refuse_empty(statistics: Mapping[str, Any], packing: PackingConfig) -> None:
    """Refuse text that fills no instance."""
    if not statistics["instances"]:
        raise DataError(
            f"{statistics['tokens']} tokens of text fill no instance of {packing.seq_length + 1}: "
            "give more text, a smaller --seq-length, or keep incomplete instances with "
            "--flush-tails"
        )


def log_statistics(statistics: Mapping[str, Any]) -> None:
    """Say what became of the text, and warn of what was lost."""
    counters = statistics["packing"]
    tokens, dropped = counters["tokens_in"], counters["tokens_in"] - counters["tokens"]
    get_logger().info(
        "%d documents of %d domains, %d tokens -> %d instances; %d tokens dropped (%.2f %%), "
        "%d of them in tails; %d empty documents, %d bad records",
        statistics["documents"], len(statistics["domains"]), tokens, counters["instances"],
        dropped, 100 * dropped / tokens, counters["dropped_tail_tokens"],
        statistics["empty_documents"], statistics["bad_records"],
    )  # fmt: skip
    if statistics["lost_text_bytes"] > 0:
        get_logger().warning(
            "%d bytes of text are in no token: the vocabulary lacks them, or the tokenizer "
            "normalises text", statistics["lost_text_bytes"],
        )  # fmt: skip
    if counters["overlong_documents"]:
        get_logger().warning(
            "%d documents had more than 2,000 chunks; %d tokens of them are dropped",
            counters["overlong_documents"], counters["dropped_overlong_tokens"],
        )  # fmt: skip


@contextmanager
def _frequent_switches() -> Iterator[None]:
    """Let threads change more often: at the default of 5 ms the tokenizer waits for the parser."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
