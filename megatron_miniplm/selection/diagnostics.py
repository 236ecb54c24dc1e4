"""What a selection did, as facts for its manifest: is it degenerate, and what does it prefer?

The difference degenerates when one of its halves dominates: with too large a teacher the ranking
follows the reference alone. Two rank correlations and the ratio of variances show it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.selection.registry import SelectorInput

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
BINS = 64
_MAX_RANKED = 1_000_000
_TAIL = 0.001


def describe(
    corpus: Corpus, keys: np.ndarray, kept: np.ndarray, inputs: SelectorInput
) -> dict[str, Any]:
    """Facts on keeping rows `kept` (int64[K]) of `corpus` by `keys` (float64[N]), JSON-ready."""
    is_kept = np.zeros(len(keys), bool)
    is_kept[kept] = True
    kept_keys = keys[kept]
    return {
        "num_kept": len(kept),
        "threshold": float(kept_keys.min()),
        "quantiles": {"all": _quantiles(keys), "kept": _quantiles(kept_keys)},
        "histogram": _histogram(keys, kept_keys),
        "domains": _domains(corpus, is_kept),
        "mean_length": {
            "all": float(corpus.lengths.mean()),
            "kept": float(corpus.lengths[is_kept].mean()),
            "dropped": float(corpus.lengths[~is_kept].mean()) if len(kept) < len(keys) else None,
        },
        "spearman": {
            "reference_nll": spearman(keys, inputs.reference_scores),
            "teacher_log_prob": spearman(keys, _negated(inputs.teacher_scores)),
        },
        "variance_ratio": _variance_ratio(inputs),
    }


def spearman(keys: np.ndarray, other: np.ndarray | None) -> float | None:
    """Rank correlation, on an even sample of at most a million rows; None where undefined."""
    if other is None or len(keys) < 2:
        return None
    sample = np.linspace(0, len(keys) - 1, min(len(keys), _MAX_RANKED)).astype(np.int64)
    ranks = _ranks(keys[sample]), _ranks(other[sample])
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """float64[N]: 1 for the lowest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _negated(column: np.ndarray | None) -> np.ndarray | None:
    return None if column is None else -column


def _quantiles(keys: np.ndarray) -> dict[str, float]:
    values = np.quantile(keys, QUANTILES)
    return {str(at): float(value) for at, value in zip(QUANTILES, values, strict=True)}


def _histogram(keys: np.ndarray, kept: np.ndarray) -> dict[str, list[Any]]:
    """Counts over the middle 99.8 %; the tails are counted in the outermost bins."""
    low, high = np.quantile(keys, (_TAIL, 1 - _TAIL))
    counts, edges = np.histogram(np.clip(keys, low, high), BINS, (low, high))
    kept_counts, _ = np.histogram(np.clip(kept, low, high), BINS, (low, high))
    return {"edges": edges.tolist(), "all": counts.tolist(), "kept": kept_counts.tolist()}


def _domains(corpus: Corpus, is_kept: np.ndarray) -> dict[str, dict[str, float]]:
    size = len(corpus.domain_names)
    total = np.bincount(corpus.domains, minlength=size)
    kept = np.bincount(corpus.domains[is_kept], minlength=size)
    return {
        name: {"instances": int(total[at]), "kept": int(kept[at]), "share": kept[at] / total[at]}
        for at, name in enumerate(corpus.domain_names)
        if total[at]
    }


def _variance_ratio(inputs: SelectorInput) -> float | None:
    """Variance of log p over that of log p_ref."""
    if inputs.teacher_scores is None or inputs.reference_scores is None:
        return None
    reference = float(inputs.reference_scores.var())
    return float(inputs.teacher_scores.var()) / reference if reference else None
