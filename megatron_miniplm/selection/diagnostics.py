"""What a selection did, as facts for its manifest: is it degenerate, and what does it prefer?

The difference degenerates when one of its halves dominates: with too large a teacher the ranking
follows the reference alone. Two rank correlations and the ratio of variances show it.

Domains and lengths are counted exactly, shard by shard. What needs keys (quantiles, histogram,
correlations) is computed from about a million rows, spread evenly; up to that many, from all.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_miniplm._C import tally_rows
from megatron_miniplm.data.mapped import all_cores
from megatron_miniplm.data.rows import RowMask
from megatron_miniplm.parallel.ranks import ONE_RANK, Ranks
from megatron_miniplm.selection.key_source import KeySource, ShardColumns
from megatron_miniplm.selection.streaming import Selection

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
BINS = 60
LENGTH_BINS = 40
SAMPLED_ROWS = 1 << 20
_BLOCK = 256
_TAIL = 0.001


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Exact counts of all rows; the last axis is [dropped, kept]."""

    domains: np.ndarray
    """int64[D, 2, 2]: rows, then tokens, of each domain."""
    lengths: np.ndarray
    """int64[L + 1, 2]: rows of each length."""


def tally(
    shards: Sequence[ShardColumns],
    masks: Sequence[RowMask] | None,
    *,
    num_domains: int,
    longest: int,
    ranks: Ranks = ONE_RANK,
) -> Tally:
    """Count all ranks' shards (a collective); without `masks`, every row counts as dropped."""

    def count(number: int) -> tuple[np.ndarray, np.ndarray]:
        shard = shards[number]
        assert shard.lengths is not None, "counting needs lengths"
        return tally_rows(
            shard.lengths,
            domains=None if shard.domains is None else shard.domains(),
            mask=None if masks is None else masks[number].bits,
            num_domains=num_domains,
            longest=longest,
        )

    def count_all() -> list[tuple[np.ndarray, np.ndarray]]:
        with ThreadPoolExecutor(all_cores()) as pool:
            return list(pool.map(count, range(len(shards))))

    domains = np.zeros((num_domains, 2, 2), np.int64)
    lengths = np.zeros((longest + 1, 2), np.int64)
    for by_domain, by_length in ranks.own(count_all):
        domains += by_domain
        lengths += by_length
    return Tally(domains=ranks.sum(domains), lengths=ranks.sum(lengths))


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Rows of all shards, spread evenly; all of them where they are few."""

    keys: np.ndarray
    kept: np.ndarray
    teacher: np.ndarray | None
    reference: np.ndarray | None


def describe(
    source: KeySource,
    selection: Selection,
    counts: Tally,
    domain_names: Sequence[str],
    ranks: Ranks = ONE_RANK,
) -> dict[str, Any]:
    """Facts on a selection, JSON-ready, on every rank (a collective)."""
    total = int(counts.lengths.sum())
    sample = _gather(ranks.own(lambda: _sample(source, selection.masks, total)), ranks)
    kept_keys = sample.keys[sample.kept]
    return {
        "num_kept": selection.num_kept,
        "tokens_kept": int(counts.domains[:, 1, 1].sum()),
        "threshold": selection.threshold,
        "passes": selection.passes,
        "sampled_rows": len(sample.keys),
        "quantiles": {"all": _quantiles(sample.keys), "kept": _quantiles(kept_keys)},
        "histogram": _histogram(sample.keys, kept_keys, selection.threshold),
        "domains": _domains(counts.domains, domain_names),
        "lengths": _lengths(counts.lengths),
        "mean_length": _mean_lengths(counts.lengths),
        "spearman": {
            "reference_nll": spearman(sample.keys, sample.reference),
            "teacher_log_prob": spearman(sample.keys, _negated(sample.teacher)),
        },
        "variance_ratio": _variance_ratio(sample),
    }


def spearman(keys: np.ndarray, other: np.ndarray | None) -> float | None:
    """Rank correlation of two columns (float64[N]); None where it is undefined."""
    if other is None or len(keys) < 2:
        return None
    ranks = _ranks(keys), _ranks(other)
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _sample(source: KeySource, masks: Sequence[RowMask], total: int) -> _Sample:
    """This rank's part of the sample; it depends on the shards, not on who holds them."""
    parts: list[tuple[np.ndarray, ...]] = []
    for shard, mask in zip(source.shards, masks, strict=True):
        if total <= SAMPLED_ROWS:
            starts, size = [0], shard.num_rows
        else:
            starts, size = shard.spread(shard.num_rows / total * SAMPLED_ROWS, _BLOCK)
        rows = shard.sample(starts, size)
        inputs = source.inputs(rows, 0, rows.num_rows)
        places = (np.array(starts)[:, None] + np.arange(size)).ravel()
        none = np.zeros(0)
        parts.append((
            source.selector(inputs),
            mask.are_chosen(places),
            none if inputs.teacher_scores is None else inputs.teacher_scores,
            none if inputs.reference_scores is None else inputs.reference_scores,
        ))  # fmt: skip
    empty = (np.zeros(0), np.zeros(0, bool), np.zeros(0), np.zeros(0))
    keys, kept, teacher, reference = (np.concatenate(c) for c in zip(empty, *parts, strict=True))
    return _Sample(keys=keys, kept=kept, teacher=teacher, reference=reference)


def _gather(mine: _Sample, ranks: Ranks) -> _Sample:
    """All ranks' parts, in the order of the shards."""
    parts = ranks.gather(mine)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    keys = joined("keys")
    teacher, reference = (c if len(c) == len(keys) else None for c in map(joined, _ROLES))
    return _Sample(keys=keys, kept=joined("kept"), teacher=teacher, reference=reference)


_ROLES = ("teacher", "reference")


def _ranks(values: np.ndarray) -> np.ndarray:
    """float64[N]: 1 for the lowest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _negated(column: np.ndarray | None) -> np.ndarray | None:
    return None if column is None else -column


def _quantiles(keys: np.ndarray) -> dict[str, float] | None:
    """None if the sample met none of these rows."""
    if not len(keys):
        return None
    values = np.quantile(keys, QUANTILES)
    return {str(at): float(value) for at, value in zip(QUANTILES, values, strict=True)}


def _histogram(keys: np.ndarray, kept: np.ndarray, threshold: float) -> dict[str, list[Any]]:
    """Counts over the middle 99.8 %, an edge at the threshold; tails in the outermost."""
    low, high = np.quantile(keys, (_TAIL, 1 - _TAIL))
    step = max(float(high - low), 1e-6) / BINS
    pivot = float(np.clip(threshold, low, high))
    first, last = np.floor((low - pivot) / step), np.ceil((high - pivot) / step)
    edges = pivot + step * np.arange(min(first, 0), max(last, 1) + 1)

    def counts(values: np.ndarray) -> list[int]:
        inside = np.clip(values, edges[0], edges[-1])
        return np.histogram(inside, edges)[0].tolist()

    return {"edges": edges.tolist(), "all": counts(keys), "kept": counts(kept)}


def _domains(counts: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each domain that has instances."""
    return {
        name: {
            "instances": int(rows.sum()),
            "kept": int(rows[1]),
            "share": int(rows[1]) / int(rows.sum()),
            "tokens": int(tokens.sum()),
            "tokens_kept": int(tokens[1]),
        }
        for name, (rows, tokens) in zip(names, counts, strict=True)
        if rows.sum()
    }


def _lengths(counts: np.ndarray) -> dict[str, list[int]]:
    """Rows by length, in equal ranges of tokens: edges[i] <= length < edges[i + 1]."""
    width = -(-len(counts) // LENGTH_BINS)
    edges = np.arange(0, len(counts) + width, width)
    dropped, kept = np.add.reduceat(counts, edges[:-1]).T
    return {
        "edges": edges.tolist(), "all": (dropped + kept).tolist(), "kept": kept.tolist(),
    }  # fmt: skip


def _mean_lengths(counts: np.ndarray) -> dict[str, float | None]:
    tokens = np.arange(len(counts))

    def mean(rows: np.ndarray) -> float | None:
        return float(tokens @ rows / rows.sum()) if rows.sum() else None

    return {
        "all": mean(counts.sum(1)), "kept": mean(counts[:, 1]), "dropped": mean(counts[:, 0]),
    }  # fmt: skip


def _variance_ratio(sample: _Sample) -> float | None:
    """Variance of log p over that of log p_ref."""
    if sample.teacher is None or sample.reference is None:
        return None
    reference = float(sample.reference.var())
    return float(sample.teacher.var()) / reference if reference else None
