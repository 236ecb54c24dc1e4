"""Checks every byte of a corpus or subset, where opening one checks sizes, indices and ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_miniplm._C import first_difference
from megatron_miniplm.core.errors import MiniPLMError
from megatron_miniplm.core.log import progress
from megatron_miniplm.core.manifest import hash_file
from megatron_miniplm.data.corpus import Corpus, Shard
from megatron_miniplm.data.mapped import drop_pages
from megatron_miniplm.data.staging import with_suffix

_BLOCK_BYTES = 1 << 26
_BLOCK_ROWS = 1 << 16


def verify(prefix: str | Path) -> list[str]:
    """What is wrong with the artifact at PREFIX, one sentence a problem; empty if it is intact.

    Checked, beyond `Corpus.open`: the hash of every ``.bin``, token ids against the vocabulary,
    lengths against the sequence length, the domain column and the tokenizer; for a subset also
    that every instance is its parent's, pointer by pointer (token by token if materialised).
    """
    try:
        corpus = Corpus.open(prefix)
        return list(_problems(corpus))
    except MiniPLMError as error:
        return [str(error)]


def _problems(corpus: Corpus) -> Iterator[str]:
    shortest, longest = int(corpus.lengths.min()), int(corpus.lengths.max())
    if shortest < 2 or longest > corpus.seq_length + 1:
        yield (
            f"{corpus.prefix} has instances of {shortest} to {longest} tokens, outside 2 to "
            f"{corpus.seq_length + 1}"
        )
    with progress("verify", sum(len(shard.tokens) for shard in corpus.opened_shards), "B") as bar:
        for shard in corpus.opened_shards:
            yield from _shard_problems(shard, corpus)
            bar.advance(len(shard.tokens))
    corpus.tokenizer()
    if int(corpus.domains.max()) >= len(corpus.domain_names):
        yield f"{corpus.prefix}: domain {corpus.domains.max()} has no name"
    if corpus.kind == "subset":
        yield from _lineage_problems(corpus)


def _shard_problems(shard: Shard, corpus: Corpus) -> Iterator[str]:
    path = with_suffix(shard.prefix, ".bin")
    found = hash_file(path)
    if found != shard.facts["bin_hash"]:
        yield f"{path} has hash {found}, but had {shard.facts['bin_hash']} when it was written"
    step = _BLOCK_BYTES // corpus.dtype.itemsize
    tokens = shard.tokens.view(corpus.dtype)
    highest = max(int(tokens[at : at + step].max()) for at in range(0, len(tokens), step))
    if highest >= corpus.vocab_size:
        yield f"{path} holds token {highest}, but the vocabulary has {corpus.vocab_size}"


def _lineage_problems(subset: Corpus) -> Iterator[str]:
    """Every instance of a subset must be, byte for byte, where its parent has it."""
    parent = subset.parent()
    assert parent is not None, "a subset has a parent"
    rows = np.searchsorted(parent.ids, subset.ids)
    if rows[-1] >= len(parent) or not np.array_equal(parent.ids[rows], subset.ids):
        yield f"{subset.prefix} holds instances that its parent {parent.prefix} does not have"
        return
    if not np.array_equal(parent.lengths[rows], subset.lengths):
        yield f"{subset.prefix} holds instances of another length than in {parent.prefix}"
    if subset.manifest.content.get("materialized", False):
        yield from _token_problems(subset, parent, rows)
    elif not np.array_equal(_pointers(parent)[rows], _pointers(subset)):
        yield f"{subset.prefix} points at other tokens than {parent.prefix} does"


def _token_problems(subset: Corpus, parent: Corpus, rows: np.ndarray) -> Iterator[str]:
    """The tokens of a materialised subset must be those that its parent has."""
    starts = [subset.shard_starts, np.searchsorted(rows, parent.shard_starts)]
    bounds = np.unique(np.concatenate([*starts, np.arange(0, len(rows), _BLOCK_ROWS)]))
    for begin, stop in itertools.pairwise(bounds.tolist()):
        different = _first_difference(subset, parent, begin, rows[begin:stop])
        if different >= 0:
            yield (
                f"instance {subset.ids[begin + different]} of {subset.prefix} has other tokens "
                f"than in {parent.prefix}; it may not be the only one"
            )
            return


def _first_difference(subset: Corpus, parent: Corpus, begin: int, rows: np.ndarray) -> int:
    """The first i where row `begin` + i is not the parent's row `rows`[i], or -1.

    All of them are in one shard of the subset, and in one of the parent.
    """
    mine, first = subset.locate(begin)
    theirs, local = parent.locate(int(rows[0]))
    different = first_difference(
        lengths=mine.index.lengths,
        pointers=mine.index.pointers,
        tokens=mine.tokens,
        first=first,
        other_lengths=theirs.index.lengths,
        other_pointers=theirs.index.pointers,
        other_tokens=theirs.tokens,
        other_rows=rows - (int(rows[0]) - local),
        bytes_per_token=subset.dtype.itemsize,
    )
    drop_pages(mine.tokens)
    drop_pages(theirs.tokens)
    return different


def _pointers(corpus: Corpus) -> np.ndarray:
    return np.concatenate([shard.index.pointers for shard in corpus.opened_shards])
