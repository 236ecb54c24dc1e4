"""Instances as text beside what both models think of them (the paper's Tables 10-12)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.predictions import Predictions
from megatron_miniplm.data.scores import Scores
from megatron_miniplm.selection.split import uniform_keys

Order = Literal["top", "bottom", "borderline", "random"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One instance, to be read by a person."""

    id: int
    """Row in the root corpus."""
    domain: str
    num_tokens: int
    """Length of the instance."""
    kept: bool | None
    """Whether it is in the subset; None without one."""
    teacher_log_prob: float | None
    """log p, nats a token."""
    reference_log_prob: float | None
    """log p_ref, nats a token."""
    difference: float | None
    """r = log p - log p_ref, nats a token."""
    predicted_difference: float | None
    """The same as a proxy predicts it, nats."""
    text: str


def pick_rows(
    keys: np.ndarray, count: int, *, order: Order, threshold: float, seed: int
) -> np.ndarray:
    """int64[min(count, N)] rows, the one that fits `order` best first; ties by row.

    top: highest keys; bottom: lowest; borderline: nearest to `threshold`; random: by `seed`.
    """
    if order == "random":
        rank = uniform_keys(np.arange(len(keys)), seed, purpose="examples")
    else:
        rank = {"top": -keys, "bottom": keys, "borderline": np.abs(keys - threshold)}[order]
    return np.argsort(rank, kind="stable")[:count]


def read_examples(
    corpus: Corpus,
    rows: np.ndarray,
    *,
    scores: Mapping[str, Scores],
    kept: np.ndarray | None,
    proxy: Predictions | None = None,
) -> list[Example]:
    """The instances at `rows`; `scores` by role, `kept` as bool[N] over the corpus."""
    tokenizer = corpus.tokenizer()
    log_probs = {role: -found.mean_nll() for role, found in scores.items()}

    def example(row: int) -> Example:
        teacher, reference = (_at(log_probs.get(role), row) for role in ("teacher", "reference"))
        difference = None if teacher is None or reference is None else teacher - reference
        return Example(
            id=int(corpus.ids[row]),
            domain=corpus.domain_names[corpus.domains[row]],
            num_tokens=int(corpus.lengths[row]),
            kept=None if kept is None else bool(kept[row]),
            teacher_log_prob=teacher,
            reference_log_prob=reference,
            difference=difference,
            predicted_difference=_at(None if proxy is None else proxy.difference, row),
            text=tokenizer.decode(corpus.tokens(row)),
        )

    return [example(int(row)) for row in rows]


def _at(column: np.ndarray | None, row: int) -> float | None:
    return None if column is None else float(column[row])
