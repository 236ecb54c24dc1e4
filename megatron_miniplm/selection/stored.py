"""Choosing what a logit store has a record of: what a student can learn from it.

The store of a teacher in training (``pretrain --cache-logits``) holds what that run saw, each
instance as its latest update found it. A range of updates is the early or the late part of the
teacher's run (the online logits of arXiv 2410.16215).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.data.rows import RowMask

STORED = "stored"
"""In the place of a selector: it ranks nothing."""
_BLOCK_ROWS = 1 << 20
"""Rows that are looked up at a time; a multiple of 8, so that their bits are whole bytes."""


def stored_masks(
    corpus: Corpus, store: RecordStore, *, first_update: int | None, last_update: int | None
) -> list[RowMask]:
    """Of each shard of `corpus`, the rows with a record of these updates (both included).

    Refuses a store of another root, updates where the teacher was not in training, and those of
    which there is no record.
    """
    store.check_corpus(corpus)
    chosen = np.ones(len(store), dtype=bool)
    for flag, bound, inside in (
        ("--first-update", first_update, np.greater_equal),
        ("--last-update", last_update, np.less_equal),
    ):
        if bound is None:
            continue
        if store.updates is None:
            raise ConfigError(
                f"{flag} {bound}, but {store.path} does not say at which update its teacher was: "
                "leave it out, or give a store of `pretrain --cache-logits`"
            )
        chosen &= inside(store.updates, bound)
    masks = [
        _mask(corpus, store, chosen, slice(int(start), int(stop)))
        for start, stop in pairwise(corpus.shard_starts)
    ]
    if store.updates is not None and len(store) and not any(mask.count() for mask in masks):
        first, last = store.updates.min(), store.updates.max()
        raise ConfigError(
            f"{store.path} has no instance of {corpus.prefix} that was seen last in updates "
            f"{first_update or first} to {last_update or last}: it has updates {first} to {last}"
        )
    return masks


def _mask(corpus: Corpus, store: RecordStore, chosen: np.ndarray, part: slice) -> RowMask:
    column = corpus.id_column
    bits = [np.zeros(0, np.uint8)]
    for start in range(part.start, part.stop, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, part.stop)
        ids = np.arange(start, stop) if column is None else np.asarray(column[start:stop])
        at = store.find(ids)
        here = np.flatnonzero(at >= 0)
        bits.append(RowMask.of_rows(here[chosen[at[here]]], stop - start).bits)
    return RowMask(bits=np.concatenate(bits), num_rows=part.stop - part.start)
