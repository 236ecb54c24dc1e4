"""Where keys come from at scale: columns of shards, and a selector that is asked block by block.

The built-in selectors are also known to the native scan (``_C.KeyScan``), which computes the same
float64 keys, bit for bit. Any other selector is evaluated here on blocks of rows: a selector is a
row-wise function of its input, which the contract suite checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from megatron_miniplm._C import KeyRows, KeyScan
from megatron_miniplm.core.errors import DataError, LineageError
from megatron_miniplm.data.mapped import BLOCK_ROWS, drop_pages, mapping_of
from megatron_miniplm.data.scores import check_finite
from megatron_miniplm.selection.baselines import RANDOM_PURPOSE, random, reference, teacher
from megatron_miniplm.selection.difference import difference
from megatron_miniplm.selection.registry import Selector, SelectorInput
from megatron_miniplm.selection.split import mixer_start

_NATIVE: dict[Selector, int] = {difference: 0, teacher: 1, reference: 2, random: 3}
_GIVEN = 4
_PLACES_KEPT = 64  # a fault may map as much as 2 MiB around a place


@dataclass(frozen=True, kw_only=True)
class ScoreColumns:
    """One model's scores of the rows of a shard."""

    sum_nll: np.ndarray
    """float32[n], nats."""
    num_tokens: np.ndarray
    """int32[n], scored tokens."""

    def nll(self, part: slice, *, per_token: bool) -> np.ndarray:
        """float64 negative log-likelihoods of some rows: a token's on average, or the sum."""
        sums = self.sum_nll[part].astype(np.float64)
        return sums / np.maximum(self.num_tokens[part], 1) if per_token else sums


@dataclass(frozen=True, kw_only=True)
class ShardColumns:
    """What is known of the rows of one shard; columns may be mapped files of any size."""

    num_rows: int
    first_row: int = 0
    """Row of the corpus that the shard starts with, for messages."""
    teacher: ScoreColumns | None = None
    reference: ScoreColumns | None = None
    predicted: np.ndarray | None = None
    """float32[n], the difference that a proxy predicts, nats."""
    ids: np.ndarray | None = None
    """int64[n] root ids; None: ``first_id`` and so on."""
    first_id: int = 0
    lengths: np.ndarray | None = None
    """int32[n] tokens of each instance, maybe unaligned; needed for a budget in tokens."""
    domains: Callable[[], np.ndarray] | None = None
    """Gives uint16[n], the domain of each row; needed for strata."""

    def spread(self, rows: float, size: int) -> tuple[list[int], int]:
        """Where to take about `rows` rows evenly, and how many (at most `size`) at each place."""
        size = min(size, self.num_rows)
        count = min(max(1, round(rows / max(size, 1))), max(self.num_rows, 1))
        return [i * (self.num_rows - size) // max(count - 1, 1) for i in range(count)], size

    def sample(self, starts: Sequence[int], size: int) -> ShardColumns:
        """Copies of `size` rows from each of `starts`, as a shard of their own."""

        def scores(of: ScoreColumns | None) -> ScoreColumns | None:
            return of and ScoreColumns(
                sum_nll=_gather(of.sum_nll, starts, size),
                num_tokens=_gather(of.num_tokens, starts, size),
            )

        def domains() -> np.ndarray:
            assert self.domains is not None
            column = self.domains()
            return np.concatenate([column[start : start + size] for start in starts])

        ids = [self.ids_of(slice(start, start + size)) for start in starts]
        return ShardColumns(
            num_rows=len(starts) * size,
            first_row=self.first_row,
            teacher=scores(self.teacher),
            reference=scores(self.reference),
            predicted=None if self.predicted is None else _gather(self.predicted, starts, size),
            ids=np.concatenate([np.zeros(0, np.int64), *ids]),
            lengths=None if self.lengths is None else _gather(self.lengths, starts, size),
            domains=None if self.domains is None else domains,
        )

    def ids_of(self, part: slice) -> np.ndarray:
        """int64 root ids of some rows."""
        if self.ids is not None:
            return self.ids[part]
        return np.arange(part.start, part.stop, dtype=np.int64) + self.first_id


@dataclass(frozen=True, kw_only=True)
class KeySource:
    """Shards and the rule that gives their rows keys; rows in the order of the shards."""

    shards: Sequence[ShardColumns]
    selector: Selector
    seed: int = 0
    """Seed of selectors that draw."""
    per_token: bool = True
    """Score by the mean over tokens, else by the sum."""
    min_tokens: int = 0
    """Rows with fewer scored tokens are never chosen."""
    weigh_tokens: bool = False
    """A row weighs its tokens against the budget, else 1."""
    strata: Sequence[str] = ()
    """Names of the domains, if each is chosen from on its own."""

    @property
    def num_strata(self) -> int:
        """Into how many parts rows fall that are chosen from on their own."""
        return max(1, len(self.strata))

    def strata_of(self, shard: ShardColumns) -> np.ndarray | None:
        """uint16[n], the stratum of each row; None: all are in the only one."""
        if not self.strata:
            return None
        assert shard.domains is not None, "strata need domains"
        return shard.domains()

    def inputs(self, shard: ShardColumns, start: int, stop: int) -> SelectorInput:
        """What selectors see of some rows."""
        part = slice(start, stop)
        columns = {
            f"{role}_scores": scores.nll(part, per_token=self.per_token)
            for role, scores in (("teacher", shard.teacher), ("reference", shard.reference))
            if scores is not None
        }
        if shard.predicted is not None:
            columns["proxy_scores"] = shard.predicted[part].astype(np.float64)
        return SelectorInput(ids=shard.ids_of(part), seed=self.seed, **columns)

    def keys(self, shard: ShardColumns, start: int, stop: int) -> np.ndarray:
        """float64[stop - start] keys of some rows, as the selector itself gives them."""
        return self.selector(self.inputs(shard, start, stop))

    def weights(self, shard: ShardColumns, start: int, stop: int) -> np.ndarray:
        """int64[stop - start]: what rows weigh against the budget."""
        if self.weigh_tokens:
            assert shard.lengths is not None, "a budget in tokens needs lengths"
            return shard.lengths[start:stop].astype(np.int64)
        return np.ones(stop - start, np.int64)

    def eligible_tokens(self, shard: ShardColumns) -> np.ndarray | None:
        """int32[n] that --min-tokens looks at: scored tokens, or predicted ones without scores."""
        if self.min_tokens <= 0:
            return None
        for scores in (shard.teacher, shard.reference):
            if scores is not None:
                return np.ascontiguousarray(scores.num_tokens, np.int32)
        assert shard.lengths is not None, "--min-tokens needs scores or lengths"
        return shard.lengths.astype(np.int32) - np.int32(1)

    def add(self, scan: KeyScan, shard: ShardColumns, *, threads: int) -> None:
        """Send every row of `shard` through `scan`; refuses scores and keys that are broken."""
        rule = _NATIVE.get(self.selector, _GIVEN)
        step = BLOCK_ROWS if rule == _GIVEN else max(shard.num_rows, 1)
        eligible, strata = self.eligible_tokens(shard), self.strata_of(shard)
        for start in range(0, shard.num_rows, step):
            part = slice(start, min(start + step, shard.num_rows))
            rows = self._native_rows(shard, part, rule, eligible, strata)
            bad = scan.add(start, rows, threads=threads)
            if bad >= 0:
                self._refuse(shard, bad)

    def choose_rows(self, shard: ShardColumns) -> KeyRows:
        """What `KeyScan.choose` reads: weights and strata of a whole shard."""
        return KeyRows(
            shard.num_rows,
            rule=_NATIVE[random],  # keys are not read again
            weights=shard.lengths if self.weigh_tokens else None,
            strata=self.strata_of(shard),
        )

    def _native_rows(
        self,
        shard: ShardColumns,
        part: slice,
        rule: int,
        eligible: np.ndarray | None,
        strata: np.ndarray | None,
    ) -> KeyRows:
        keys = None
        if rule == _GIVEN:
            self._check_scores(shard, part)
            keys = np.ascontiguousarray(self.keys(shard, part.start, part.stop), np.float64)
        columns: dict[str, np.ndarray] = {}
        for role, scores in (("teacher", shard.teacher), ("reference", shard.reference)):
            if scores is not None:
                columns[f"{role}_sum"] = scores.sum_nll[part]
                columns[f"{role}_tokens"] = scores.num_tokens[part]
            elif rule < _NATIVE[random]:
                self.keys(shard, part.start, part.start)  # names the flag if the rule needs it
        return KeyRows(
            part.stop - part.start,
            rule=rule,
            per_token=self.per_token,
            keys=keys,
            ids=None if shard.ids is None else shard.ids[part],
            first_id=shard.first_id + part.start,
            random_state=mixer_start(self.seed, purpose=RANDOM_PURPOSE),
            eligible_tokens=None if eligible is None else eligible[part],
            least_tokens=max(self.min_tokens, 0),
            weights=shard.lengths[part]
            if self.weigh_tokens and shard.lengths is not None
            else None,
            strata=None if strata is None else strata[part],
            drop_behind=bool(columns) and all(mapping_of(c) for c in columns.values()),
            **columns,
        )

    def _check_scores(self, shard: ShardColumns, part: slice) -> None:
        for role, scores in (("teacher", shard.teacher), ("reference", shard.reference)):
            if scores is not None:
                check_finite(
                    scores.sum_nll[part],
                    scores.num_tokens[part],
                    what=f"the {role} scores",
                    first_row=shard.first_row + part.start,
                )
        if shard.teacher is not None and shard.reference is not None:
            refuse_other_mask(
                shard.teacher.num_tokens[part],
                shard.reference.num_tokens[part],
                first_row=shard.first_row + part.start,
            )

    def _refuse(self, shard: ShardColumns, row: int) -> NoReturn:
        part = slice(row, row + 1)
        self._check_scores(shard, part)
        strata = self.strata_of(shard)
        if strata is not None and strata[row] >= self.num_strata:
            raise DataError(
                f"row {shard.first_row + row} is in domain {strata[row]}, but there are "
                f"{self.num_strata}: the domain column is broken; restore it"
            )
        refuse_key(self.keys(shard, row, row + 1)[0], shard.first_row + row)


def refuse_key(key: float, row: int) -> NoReturn:
    """Say that a row's key is not finite."""
    raise DataError(
        f"the key of row {row} is {key}, which is not finite: nothing can be selected by it; look "
        f"for broken scores"
    )


def refuse_other_mask(teacher: np.ndarray, reference: np.ndarray, *, first_row: int = 0) -> None:
    """Refuse counts of scored tokens (int32[n] each) that differ."""
    differing = np.flatnonzero(teacher != reference)
    if len(differing):
        row = differing[0]
        raise LineageError(
            f"teacher and reference did not score the same tokens: row {first_row + row} has "
            f"{teacher[row]} and {reference[row]}, and {len(differing) - 1} rows near it differ "
            f"as well; score both with one version of this program"
        )


def _gather(column: np.ndarray, starts: Sequence[int], size: int) -> np.ndarray:
    """Copies of `size` values from each of `starts`, without keeping pages of a mapped file."""
    found = np.empty(len(starts) * size, column.dtype)
    for number, start in enumerate(starts):
        found[number * size : (number + 1) * size] = column[start : start + size]
        if number % _PLACES_KEPT == 0 or number == len(starts) - 1:
            drop_pages(column)
    return found
