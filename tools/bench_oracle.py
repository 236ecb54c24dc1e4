"""Documents of token ids, and the instances that the packer and its numpy definition make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from bench_text import Text

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.indexed import read_index
from megatron_miniplm.data.packing import EndTable, Packed, Packer
from megatron_miniplm.data.packing_reference import ReferencePacker
from megatron_miniplm.data.tokenizers import Tokenizer

_BATCH = 2000


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Token ids of documents, a separator after each."""

    ids: np.ndarray
    """int32[total]."""
    offsets: np.ndarray
    """int64[documents + 1]."""
    domains: np.ndarray
    """uint16[documents], numbered in the order of their first document."""


@dataclass(frozen=True, kw_only=True)
class Instances:
    """Packed instances."""

    tokens: np.ndarray
    """int32[total], end to end."""
    lengths: np.ndarray
    """int32[instances]."""

    def equal(self, other: Instances) -> bool:
        """Whether these are the same instances in the same order."""
        same_lengths = np.array_equal(self.lengths, other.lengths)
        return same_lengths and np.array_equal(self.tokens, other.tokens)


def numbered(names: Sequence[str]) -> np.ndarray:
    """uint16[n]: domains by number, in the order in which they first come."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.uint16)


def documents_of_text(text: Text, tokenizer: Tokenizer) -> Documents:
    """Encode a text as `preprocess` does."""
    ids, lengths, names = [], [], []
    for _, group in groupby(enumerate(text.records()), key=lambda item: item[0] // _BATCH):
        records = [record for _, record in group]
        flat, offsets = tokenizer.encode_flat([document for document, _ in records])
        ids.append(np.insert(flat, offsets[1:], tokenizer.eod_id))
        lengths.append(np.diff(offsets) + 1)
        names += [domain for _, domain in records]
    ends = np.cumsum(np.concatenate(lengths), dtype=np.int64)
    return Documents(
        ids=np.concatenate(ids), offsets=np.append(np.int64(0), ends), domains=numbered(names)
    )


def documents_of_prefix(prefix: Path, names: Sequence[str]) -> Documents:
    """What a stock prefix holds, which has a separator after every document."""
    index = read_index(prefix.with_name(prefix.name + ".idx"))
    ids = np.fromfile(prefix.with_name(prefix.name + ".bin"), index.dtype).astype(np.int32)
    offsets = np.append(np.int64(0), np.cumsum(index.lengths, dtype=np.int64))
    return Documents(ids=ids, offsets=offsets, domains=numbered(names))


def instances_of(corpus: Corpus) -> Instances:
    """All instances of a root corpus that `preprocess` wrote."""
    tokens = [np.frombuffer(shard.tokens, corpus.dtype) for shard in corpus.opened_shards]
    return Instances(tokens=np.concatenate(tokens).astype(np.int32), lengths=corpus.lengths)


def packed_batches(table: EndTable, documents: Documents, *, seq_length: int) -> Iterator[Packed]:
    """What the packer makes, a batch of documents at a time, as `preprocess` does."""
    packer = Packer(table, seq_length=seq_length)
    for first in range(0, len(documents.domains), _BATCH):
        last = min(first + _BATCH, len(documents.domains))
        start, end = documents.offsets[[first, last]]
        offsets = documents.offsets[first : last + 1] - start
        yield packer.add(documents.ids[start:end], offsets, documents.domains[first:last])


def pack(table: EndTable, documents: Documents, *, seq_length: int) -> Instances:
    """All that the packer makes."""
    packed = list(packed_batches(table, documents, seq_length=seq_length))
    return Instances(
        tokens=np.concatenate([each.tokens for each in packed]),
        lengths=np.concatenate([each.lengths for each in packed]),
    )


def pack_with_oracle(table: EndTable, documents: Documents, *, seq_length: int) -> Instances:
    """The packer's definition in numpy; a document of nothing but its separator is left out."""
    packer = ReferencePacker(table, seq_length=seq_length)
    bounds = zip(documents.offsets[:-1], documents.offsets[1:], documents.domains, strict=True)
    packed = [
        packer.add(int(domain), documents.ids[start:end])
        for start, end, domain in bounds
        if end - start > 1
    ]
    return Instances(
        tokens=np.concatenate([each.tokens for each in packed]),
        lengths=np.concatenate([each.lengths for each in packed]),
    )
