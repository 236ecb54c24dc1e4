"""A logit store as text: what comes next at some positions, and what the teacher expected."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import make_batch
from megatron_miniplm.data.logit_codec import decode
from megatron_miniplm.data.record_store import RecordStore

_CONTEXT, _LIKELIEST = 12, 8


@dataclass(frozen=True, kw_only=True)
class StoredPosition:
    """One trained position, to be read by a person."""

    position: int
    """In the instance, from 0."""
    context: str
    """The last tokens up to this position's."""
    gold: str
    """The token that follows."""
    gold_log_prob: float
    entropy: float
    """Of the teacher's full distribution, nats."""
    num_kept: int
    tail_mass: float
    likeliest: tuple[tuple[str, float], ...]
    """Kept tokens and their log-probs, the likeliest first."""


def stored_positions(
    store: RecordStore, corpus: Corpus, *, instance_id: int, count: int
) -> list[StoredPosition]:
    """The first `count` trained positions of one instance of the corpus that the store is of."""
    store.check_corpus(corpus)
    (payload,) = store.read([instance_id])
    logits, tokenizer = decode(payload), corpus.tokenizer()
    row = int(np.searchsorted(corpus.ids, instance_id))
    tokens = corpus.tokens(row)
    mask_bs = make_batch(corpus, [row], length=corpus.seq_length).mask_bs
    trained = np.flatnonzero(mask_bs[0].numpy())
    if len(trained) != len(logits):
        raise DataError(
            f"instance {instance_id} trains {len(trained)} positions, but {store.path} has "
            f"{len(logits)} of it: cache the logits again"
        )
    ends = np.cumsum(logits.counts.astype(np.int64))
    shown = []
    for at, position in enumerate(trained[:count].tolist()):
        kept = slice(int(ends[at]) - int(logits.counts[at]), int(ends[at]))
        ids, log_probs = logits.ids[kept], logits.log_probs[kept]
        best = np.argsort(-log_probs, kind="stable")[:_LIKELIEST]
        shown.append(
            StoredPosition(
                position=position,
                context=tokenizer.decode(tokens[max(0, position + 1 - _CONTEXT) : position + 1]),
                gold=tokenizer.decode(tokens[position + 1 : position + 2]),
                gold_log_prob=float(logits.gold_log_prob[at]),
                entropy=float(logits.entropy[at]),
                num_kept=len(ids),
                tail_mass=float(logits.tail_mass[at]),
                likeliest=tuple(
                    (tokenizer.decode(ids[i : i + 1]), float(log_probs[i])) for i in best
                ),
            )
        )
    return shown
