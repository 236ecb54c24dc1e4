"""The exact K highest keys of any number of rows, in about one pass and bounded memory.

The result is that of `top_k.top_k`: highest key first, ties to the lower row, nothing non-finite.

1. **Probe**: keys of some million rows, evenly spread, give a bracket that the K-th key lies in,
   all but certainly. (Few rows: the bracket is everything.)
2. **Scan**: one sequential pass over each shard marks rows above the bracket (one bit a row), keeps
   rows inside as candidates (24 bytes each) and counts everything.
3. If the counts say that the K-th key is elsewhere, or the candidates are too many, a pass that
   only counts (65,536 equal ranges of key images) gives a narrower bracket, and 2 is repeated. A
   bracket of one single value needs no candidates, so this ends.
4. **Resolve**: the same histograms over the candidates in memory narrow the bracket to the one
   value of the K-th key; ties are taken in row order.

With several ranks, each holds some shards (in rank order); only histograms and counts are summed,
so the result does not depend on how many there are. A budget may be in rows or in tokens (the
largest K whose rows fit), and strata (domains) have a budget each. Memory: N / 8 bytes, the
candidates and the probe (below 0.6 GB at 1,000,000,000 rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_miniplm._C import KeyScan
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.mapped import all_cores
from megatron_miniplm.data.rows import RowMask
from megatron_miniplm.parallel.ranks import ONE_RANK, Ranks
from megatron_miniplm.selection.key_source import KeySource, ShardColumns

_LARGEST = np.finfo(np.float64).max
_MOST_BUCKETS_LOG2 = 16
_ALL_BUCKETS_LOG2 = 20
_SIGN = np.uint64(1 << 63)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a selection may use; smaller ones make more passes, never another result."""

    direct_rows: int = 1 << 20
    """Up to this many rows, all are candidates and no probe is taken."""
    probe_rows: int = 1 << 19
    """Rows that the probe looks at."""
    probe_block: int = 512
    """Consecutive rows at one place of the probe."""
    max_candidates: int = 1 << 24
    """Candidates kept in memory, 24 bytes each."""
    threads: int = 0
    """Threads of a rank; 0: one a core."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was chosen."""

    masks: Sequence[RowMask]
    """One a shard of this rank."""
    num_kept: int
    """Rows, over all ranks."""
    threshold: float
    """Lowest kept key."""
    passes: int
    """Passes over the columns, the probe not counted."""


@dataclass(kw_only=True)
class _Brackets:
    """One closed bracket of keys a stratum, and the weight of the rows above it."""

    low: np.ndarray
    high: np.ndarray
    above: np.ndarray


def stream_top_k(
    source: KeySource,
    budget: np.ndarray,
    *,
    limits: Limits | None = None,
    ranks: Ranks = ONE_RANK,
) -> Selection:
    """Choose, in each stratum, the longest run of highest-key rows that fits its budget.

    `budget` is int64[num_strata], in rows or in tokens (`KeySource.weigh_tokens`). Refuses broken
    scores and keys by row, and a budget of more rows than there are.
    """
    limits = limits or Limits()
    driver = _Driver(source, np.asarray(budget, np.int64), limits, ranks)
    return driver.run()


class _Driver:
    """One selection: passes over the shards, and what all ranks agree on between them."""

    def __init__(self, source: KeySource, budget: np.ndarray, limits: Limits, ranks: Ranks) -> None:
        self.source, self.budget, self.limits, self.ranks = source, budget, limits, ranks
        self.num_rows = int(ranks.sum(np.array([sum(s.num_rows for s in source.shards)]))[0])
        self.threads = limits.threads or all_cores()
        spare = _ALL_BUCKETS_LOG2 - max(source.num_strata - 1, 0).bit_length()
        self.log2 = max(1, min(_MOST_BUCKETS_LOG2, spare))
        self.passes = 0

    def run(self) -> Selection:
        brackets = self._probe()
        while True:
            scans, totals, overflowed = self._scan(brackets)
            self._refuse_too_many(totals)
            missed = self._correct(brackets, totals)
            if not missed and not overflowed:
                break
            del scans
            self._narrow_by_pass(brackets)
        self._resolve(brackets, scans)
        self._choose(brackets, scans)
        masks = [
            RowMask(bits=scan.mask, num_rows=shard.num_rows)
            for scan, shard in zip(scans, self.source.shards, strict=True)
        ]
        lowest = min((scan.lowest_kept for scan in scans), default=np.inf)
        return Selection(
            masks=masks,
            num_kept=int(self.ranks.sum(np.array([sum(mask.count() for mask in masks)]))[0]),
            threshold=float(min(part[0] for part in self.ranks.gather(np.array([lowest])))),
            passes=self.passes,
        )

    # ---- where the K-th key is, believed ---------------------------------------------------------

    def _probe(self) -> _Brackets:
        strata = self.source.num_strata
        found = _Brackets(
            low=np.full(strata, -_LARGEST),
            high=np.full(strata, _LARGEST),
            above=np.zeros(strata, np.int64),
        )
        if self.num_rows <= self.limits.direct_rows:
            return found
        sample = self.ranks.own(self._sample)
        columns = [self.ranks.gather(column) for column in sample]
        keys, weights, domains = (np.concatenate(parts) for parts in columns)
        order = np.lexsort((-keys, domains)) if strata > 1 else np.argsort(-keys)
        keys, weights, domains = keys[order], weights[order], domains[order]
        bounds = np.searchsorted(domains, np.arange(strata + 1))
        # The sample held ineligible rows, too: what it misses is what it stands for.
        scale = self.num_rows / max(int(self.ranks.sum(np.array([self.sampled]))[0]), 1)
        for d in range(strata):
            part = slice(bounds[d], bounds[d + 1])
            size = part.stop - part.start
            at = int(np.searchsorted(np.cumsum(weights[part]) * scale, self.budget[d]))
            margin = int(3 * size**0.5) + 16  # six standard errors of the median of draws
            if at - margin >= 0:
                found.high[d] = keys[part][min(at, size - 1) - margin]
            if at + margin < size:
                found.low[d] = keys[part][at + margin]
        found.low = np.minimum(found.low, found.high)
        return found

    def _sample(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys, weights and strata of this rank's share of the probe; eligible, finite rows."""
        wanted = self.limits.probe_rows / self.num_rows
        parts: list[tuple[np.ndarray, ...]] = []
        sampled = 0
        for shard in self.source.shards:
            rows = shard.sample(*shard.spread(shard.num_rows * wanted, self.limits.probe_block))
            keys = np.asarray(self.source.keys(rows, 0, rows.num_rows), np.float64)
            use = np.isfinite(keys)  # those that are not are refused by the scan, with their row
            eligible = self.source.eligible_tokens(rows)
            if eligible is not None:
                use &= eligible >= self.source.min_tokens
            strata = self.source.strata_of(rows)
            domains = np.zeros(rows.num_rows, np.uint16) if strata is None else strata
            weights = self.source.weights(rows, 0, rows.num_rows)
            parts.append((keys[use], weights[use], domains[use]))
            sampled += rows.num_rows
        self.sampled = sampled
        empty = (np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.uint16))
        keys, weights, domains = (
            np.concatenate(column) for column in zip(empty, *parts, strict=True)
        )
        return keys, weights, domains

    # ---- passes ----------------------------------------------------------------------------------

    def _scan(self, brackets: _Brackets) -> tuple[list[KeyScan], np.ndarray, bool]:
        """One collecting pass; the scans, summed totals, and whether candidates were too many."""

        def collect() -> list[KeyScan]:
            scans: list[KeyScan] = []
            room = self.limits.max_candidates // self.ranks.size
            for shard in self.source.shards:
                scan = self._pass(shard, brackets, max_candidates=room)
                room -= scan.num_candidates
                scans.append(scan)
            return scans

        scans = self.ranks.own(collect)
        self.passes += 1
        totals = self._summed([scan.totals for scan in scans], (self.source.num_strata, 7))
        overflowed = self.ranks.sum(np.array([sum(scan.overflowed for scan in scans)]))[0] > 0
        return scans, totals, bool(overflowed)

    def _pass(
        self, shard: ShardColumns, brackets: _Brackets, *, max_candidates: int = 0, log2: int = 0
    ) -> KeyScan:
        scan = KeyScan(
            shard.num_rows,
            low=brackets.low.tolist(),
            high=brackets.high.tolist(),
            max_candidates=max_candidates,
            buckets_log2=log2,
        )
        self.source.add(scan, shard, threads=self.threads)
        return scan

    def _refuse_too_many(self, totals: np.ndarray) -> None:
        eligible = totals[:, 1]
        short = np.flatnonzero(eligible < self.budget)
        if len(short) and not self.source.weigh_tokens:
            d = short[0]
            where = f" of domain {self.source.strata[d]}" if self.source.strata else ""
            least = self.source.min_tokens
            why = f": the others have fewer than --min-tokens {least}" if least > 0 else ""
            raise ConfigError(
                f"{self.budget[d]} instances{where} are to be kept, but {eligible[d]} can be "
                f"chosen{why}"
            )

    def _correct(self, brackets: _Brackets, totals: np.ndarray) -> bool:
        """Move brackets that the K-th key is not in; whether there was one."""
        rows, above, inside_rows, inside = totals[:, 1], totals[:, 4], totals[:, 5], totals[:, 6]
        too_low = above > self.budget
        some_below = totals[:, 3] + inside_rows < rows
        too_high = ~too_low & (above + inside < self.budget) & some_below
        old_low, old_high = brackets.low, brackets.high
        with np.errstate(over="ignore"):  # beyond the largest key, where nothing is moved to
            next_up, next_down = np.nextafter(old_high, np.inf), np.nextafter(old_low, -np.inf)
        brackets.low = np.where(too_low, next_up, np.where(too_high, -_LARGEST, old_low))
        brackets.high = np.where(too_low, _LARGEST, np.where(too_high, next_down, old_high))
        brackets.above = above
        return bool((too_low | too_high).any())

    def _narrow_by_pass(self, brackets: _Brackets) -> None:
        """One counting pass over the data, and brackets that are 2**16 times narrower."""
        scans = self.ranks.own(
            lambda: [self._pass(shard, brackets, log2=self.log2) for shard in self.source.shards]
        )
        self.passes += 1
        totals = self._summed([scan.totals for scan in scans], (self.source.num_strata, 7))
        brackets.above = totals[:, 4]
        self._narrow(brackets, [scan.histogram for scan in scans])

    def _resolve(self, brackets: _Brackets, scans: list[KeyScan]) -> None:
        """Narrow every bracket to the one value of the K-th key, by the candidates."""
        while (_images(brackets.low) < _images(brackets.high)).any():
            low, high = brackets.low.tolist(), brackets.high.tolist()
            self._narrow(
                brackets,
                [scan.candidate_histogram(low=low, high=high, log2=self.log2) for scan in scans],
            )

    def _narrow(self, brackets: _Brackets, histograms: list[np.ndarray]) -> None:
        """Cut every bracket to the range that the K-th key is in."""
        counts = self._summed(histograms, (self.source.num_strata, 1 << self.log2))
        low, high = _images(brackets.low), _images(brackets.high)
        for d, row in enumerate(counts):
            from_top = np.cumsum(row[::-1]) + brackets.above[d]
            last = len(row) - 1
            # The first range from the top that reaches the budget; the lowest if none does.
            place = min(int(np.searchsorted(from_top, self.budget[d])), last)
            bucket = last - place
            brackets.above[d] += int(row[bucket + 1 :].sum())
            width = int(high[d]) - int(low[d])
            shift = max(0, width.bit_length() - self.log2)
            # Ranges beyond the bracket are empty; met where the rows above use up the budget.
            start = min(int(low[d]) + (bucket << shift), int(high[d]))
            low[d], high[d] = start, min(start + (1 << shift) - 1, int(high[d]))
        brackets.low, brackets.high = _keys(low), _keys(high)

    # ---- the result ------------------------------------------------------------------------------

    def _choose(self, brackets: _Brackets, scans: list[KeyScan]) -> None:
        """Mark the candidates above the K-th key, and ties by row through all ranks' shards."""
        threshold, left = brackets.low, self.budget - brackets.above
        ties = [np.array(scan.tie_weights(threshold.tolist()), np.int64) for scan in scans]
        mine = self._local_sum(ties, (self.source.num_strata,))
        before = np.zeros_like(mine)
        for part in self.ranks.gather(mine)[: self.ranks.rank]:
            before += part
        for scan, shard, tied in zip(scans, self.source.shards, ties, strict=True):
            scan.choose(
                self.source.choose_rows(shard),
                threshold=threshold.tolist(),
                taken=before.tolist(),
                budget=left.tolist(),
            )
            before = before + tied

    def _summed(self, parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        return self.ranks.sum(self._local_sum(parts, shape))

    @staticmethod
    def _local_sum(parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        total = np.zeros(shape, np.int64)
        for part in parts:
            total += part
        return total


def _images(keys: np.ndarray) -> np.ndarray:
    """uint64 that order as float64 `keys` do (-0.0 as 0.0)."""
    bits = (keys + 0.0).view(np.uint64)
    return np.where(bits >> np.uint64(63), ~bits, bits ^ _SIGN)


def _keys(images: np.ndarray) -> np.ndarray:
    """The float64 that have these images."""
    return np.where(images >> np.uint64(63), images ^ _SIGN, ~images).view(np.float64) + 0.0
