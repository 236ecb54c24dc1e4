"""Which instances continue one another: the order of text inside a corpus and its subsets.

A domain's instances are its text in order. So instance j goes on where i stops if it is the next of
the same domain in the *root* corpus (single tokens that packing dropped between the two apart). In
an adopted corpus the text of a prefix, which is a shard, takes the place of a domain's.
"""

from __future__ import annotations

import numpy as np

from megatron_miniplm.data.corpus import Corpus

BLOCK_ROWS = 1 << 20


def followed(corpus: Corpus) -> np.ndarray:
    """bool[N]: whether the corpus or subset also has the instance that continues this one."""
    root = corpus.root()
    result = np.zeros(len(corpus), bool)
    num_texts = max(len(root.domain_names), len(root.shards))
    counts = np.zeros(num_texts, np.int64)  # root instances of each text so far
    last_rank = np.full(num_texts, -2)  # of its last instance in `corpus`: its number in the text
    last_row = np.zeros(num_texts, np.int64)
    for begin in range(0, len(root), BLOCK_ROWS):
        texts = _texts(root, begin, min(begin + BLOCK_ROWS, len(root)))
        ranks = counts[texts] + _occurrence(texts)
        counts += np.bincount(texts, minlength=num_texts)
        first, stop = np.searchsorted(corpus.ids, [begin, begin + len(texts)])
        chosen = corpus.ids[first:stop] - begin
        order = np.argsort(texts[chosen], kind="stable")
        text, rank, row = texts[chosen][order], ranks[chosen][order], first + order
        heads = np.diff(text, prepend=-1) != 0
        before = np.where(heads, last_rank[text], np.roll(rank, 1))
        row_before = np.where(heads, last_row[text], np.roll(row, 1))
        result[row_before[rank == before + 1]] = True
        tails = np.diff(text, append=-1) != 0
        last_rank[text[tails]], last_row[text[tails]] = rank[tails], row[tails]
    return result


def _texts(root: Corpus, begin: int, stop: int) -> np.ndarray:
    """int64: the number of the text that each of the rows `begin` to `stop` belongs to."""
    if "adopted" in root.manifest.content:
        rows = np.arange(begin, stop)
        return np.searchsorted(root.shard_starts, rows, side="right") - 1
    return root.domains[begin:stop].astype(np.int64)


def _occurrence(values: np.ndarray) -> np.ndarray:
    """int64: how many equal values stand before each one."""
    order = np.argsort(values, kind="stable")
    heads = np.flatnonzero(np.diff(values[order], prepend=-1) != 0)
    sizes = np.diff(heads, append=len(values))
    result = np.empty(len(values), np.int64)
    result[order] = np.arange(len(values)) - np.repeat(heads, sizes)
    return result
