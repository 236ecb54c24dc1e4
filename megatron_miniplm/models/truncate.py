"""From a teacher's logits to what is kept of them: `data.sparse_logits.SparseLogits`.

Three ways to keep some of V columns, with q the full softmax at temperature 1:

`topk`       of the columns by falling q, the smallest prefix with mass >= p (the column that
             crosses p is in it), then at most k of it (arXiv 2410.16215: top-p-k).
`rs`         R draws with replacement from pi ~ q^t; a column drawn c times weighs c/R * q/pi, so
             that weights are q on average, and so is every gradient that is linear in q.
`head-tail`  the kept of `topk` exactly, and R draws from the rest, of which pi is a distribution.

What is beside it (entropy, standard deviation, log-partitions, label) is of all real columns; the
mass of what is not kept is summed where it is, not subtracted from 1: a teacher that is sure has a
tail of 1e-9, which 1 - 0.999999999 in fp32 would lose.

The draws are keyed by (seed, instance id, position, draw): batch size, layout and resuming do not
change them.

Under TP, candidates, draws and records (`kernels.record`) are gathered: some k + 16 floats a token
and rank, never a row of logits.

Shapes: C tokens of a chunk, v columns of this rank, V real columns over all, K kept at most, R
draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import PADDING_ROW, Batch
from megatron_miniplm.data.sparse_logits import NO_ENTRY, SparseLogits, concatenated
from megatron_miniplm.data.splitmix import mix
from megatron_miniplm.kernels.block_top_k import top_k
from megatron_miniplm.kernels.record import NO_COLUMN
from megatron_miniplm.models.draws import draw
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.teacher_stats import Whole
from megatron_miniplm.parallel.vocab import VocabShard, gather_shards

_FIRST_TRY = 512
"""Columns that are looked at first where far more may be kept: few positions have so many."""


@dataclass(frozen=True, kw_only=True)
class TruncationConfig:
    """What is kept of a teacher's next-token distributions."""

    truncate: Literal["top-p-k", "none"] = "top-p-k"
    """The likeliest tokens up to --top-p, at most --top-k of them; none: all of the vocabulary."""
    top_p: float = 0.95
    """Keep the fewest tokens with this probability together, above 0 to 1."""
    top_k: int = 100
    """Keep at most so many."""
    sampling: Literal["topk", "rs", "head-tail"] = "topk"
    """topk: what --truncate keeps; rs: random draws, unbiased; head-tail: what --truncate keeps and
    draws from the rest, unbiased."""
    sampling_draws: int = 50
    """Draws of a position."""
    sampling_power: float = 1.0
    """Draws are proportional to this power of the probability."""
    sampling_seed: int = 1
    """Seed of the draws."""
    force_gold: bool = False
    """Keep the label, too, where it is not among the kept."""
    kd_temperatures: tuple[float, ...] = ()
    """Store the log-partition at these temperatures: what probabilities at them are divided by."""

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p} must be above 0 and at most 1")
        for name in ("top_k", "sampling_draws"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1"
                )
        if not self.sampling_power > 0:
            raise ConfigError(f"--sampling-power {self.sampling_power} must be above 0")
        for tau in self.kd_temperatures:
            if not 0 < tau < math.inf or tau == 1:
                raise ConfigError(
                    f"--kd-temperatures {tau:g} must be above 0 and not 1, where all is known"
                )
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        exact, draws = ("top_p", "top_k"), ("sampling_draws", "sampling_power", "sampling_seed")
        unused: tuple[str, ...] = ()
        if self.sampling == "topk":
            unused += draws
        if self.sampling == "rs" or self.truncate == "none":
            unused += exact
        if self.sampling == "rs":
            unused += ("truncate",)
        if self.sampling != "topk" and self.truncate == "none":
            raise ConfigError(f"--truncate none leaves nothing for --sampling {self.sampling}")
        for name in unused:
            if getattr(self, name) != getattr(TruncationConfig, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} has no effect with "
                    f"--truncate {self.truncate} --sampling {self.sampling}: leave it out"
                )

    @property
    def draws(self) -> int:
        """Of every position."""
        return 0 if self.sampling == "topk" else self.sampling_draws

    def as_config(self) -> dict[str, object]:
        """What two stores must have in common to be the same, without what has no effect."""
        said: dict[str, object] = {"sampling": self.sampling, "force_gold": self.force_gold}
        if self.sampling != "rs":
            said |= {"truncate": self.truncate, "top_p": self.top_p, "top_k": self.top_k}
        if self.draws:
            said |= {name: getattr(self, f"sampling_{name}") for name in ("draws", "power", "seed")}
        return said | {"kd_temperatures": list(self.kd_temperatures)}


def sparse_logits(
    head: Head, batch: Batch, instance_ids: Sequence[int] | np.ndarray, config: TruncationConfig
) -> list[SparseLogits]:
    """What is kept of each row of the batch, at its trained positions, chunk by chunk.

    `instance_ids` of the rows; a row without an instance has no position. DataError: a logit is not
    finite.
    """
    place = Places.of(batch, instance_ids)

    def kept(part: slice, logits_Cv: torch.Tensor) -> SparseLogits:
        return truncated(logits_Cv, place.rows(part), head.shard, config)

    parts = head.over_logits(place.in_megatron(len(batch.rows_b)), kept)
    return place.by_row(concatenated(parts, taus=config.kd_temperatures))


def instance_ids(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """int64[n]: the root id of each row (int64[n]) of `corpus`; -1 where there is none."""
    column = corpus.id_column
    if column is None:
        return rows
    there = rows != PADDING_ROW
    return np.where(there, column[np.where(there, rows, 0)], PADDING_ROW)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where tokens are: N of them, each at a position of a row of the batch."""

    row_N: torch.Tensor
    """int64, as is the next."""
    position_N: torch.Tensor
    labels_N: torch.Tensor
    ids_b: np.ndarray
    """int64, instance of each row of the batch."""

    @classmethod
    def of(cls, batch: Batch, instance_ids: Sequence[int] | np.ndarray) -> Places:
        """The trained positions of a batch, row by row."""
        row_N, position_N = batch.mask_bs.nonzero(as_tuple=True)
        return cls(
            row_N=row_N, position_N=position_N, labels_N=batch.labels_bs[batch.mask_bs],
            ids_b=np.asarray(instance_ids, dtype=np.int64),
        )  # fmt: skip

    def in_megatron(self, batch_size: int) -> torch.Tensor:
        """Their numbers in Megatron's order, which is that of positions, then rows."""
        return self.position_N * batch_size + self.row_N

    def rows(self, part: slice | torch.Tensor) -> Places:
        """Some of the tokens."""
        return Places(
            row_N=self.row_N[part], position_N=self.position_N[part],
            labels_N=self.labels_N[part], ids_b=self.ids_b,
        )  # fmt: skip

    def by_row(self, logits: SparseLogits) -> list[SparseLogits]:
        """What is known of these tokens, of each row of the batch in the order of positions."""
        row_N, position_N = self.row_N.cpu().numpy(), self.position_N.cpu().numpy()
        order = np.lexsort((position_N, row_N))
        ends = np.searchsorted(row_N[order], np.arange(len(self.ids_b) + 1))
        return [logits.at(order[i:j]) for i, j in pairwise(ends)]

    def uniforms(self, seed: int, draws: int) -> torch.Tensor:
        """[N, R] fp64 in [0, 1): a hash of (seed, instance, position, draw), on the CPU."""
        step = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's: counters become unlike each other
        row_N, position_N = self.row_N.cpu().numpy(), self.position_N.cpu().numpy()
        with np.errstate(over="ignore"):
            key = mix(np.array([seed & (2**64 - 1)], dtype=np.uint64) + step)
            key = mix(key + self.ids_b[row_N].astype(np.uint64) * step)
            key = mix(key + position_N.astype(np.uint64) * step)
            bits = mix(key[:, None] + np.arange(1, draws + 1, dtype=np.uint64) * step)
        return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


class NotFiniteLogitsError(DataError):
    """A model says of some tokens what is no distribution; of all others, `finite_C` is true."""

    def __init__(self, message: str, finite_C: torch.Tensor) -> None:
        super().__init__(message)
        self.finite_C = finite_C


def truncated(
    logits_Cv: torch.Tensor, places: Places, shard: VocabShard, config: TruncationConfig
) -> SparseLogits:
    """What is kept of one chunk of logits, which are changed meanwhile and then as before.

    NotFiniteLogitsError on all TP ranks alike.
    """
    whole = Whole.of(logits_Cv, places.labels_N, shard, config.kd_temperatures)
    _refuse_infinite(whole, places)
    real_Cv = logits_Cv[:, : shard.local_valid]
    ids_CK, log_probs_CK = _exact(real_Cv, places.labels_N, whole, shard, config)
    removed = [_Removed.out_of(real_Cv, ids_CK, shard)]
    if config.draws:
        uniform_CR = places.uniforms(config.sampling_seed, config.draws).to(logits_Cv.device)
        drawn_CR, logits_CR, log_share_CR = draw(
            real_Cv, uniform_CR, whole.maximum, shard, config.sampling_power
        )
        removed.append(_Removed.out_of(real_Cv, drawn_CR, shard))
        ids_CK = torch.cat([ids_CK, drawn_CR], 1)
        log_probs_CK = torch.cat([log_probs_CK, whole.log_probs(logits_CR) + log_share_CR], 1)
    tail_C = whole.mass_left(logits_Cv, places.labels_N, shard)
    for entries in reversed(removed):
        entries.put_back(real_Cv)
    return _in_rows(ids_CK, log_probs_CK, whole, tail_C)


def _refuse_infinite(whole: Whole, places: Places) -> None:
    """NotFiniteLogitsError where a model says something that is no distribution."""
    finite_C = (whole.log_sum + whole.entropy + whole.gold_log_prob + whole.logit_std).isfinite()
    if not bool(finite_C.all()):
        at = int((~finite_C).nonzero()[0])
        raise NotFiniteLogitsError(
            f"the logits of instance {places.ids_b[int(places.row_N[at])]} at position "
            f"{int(places.position_N[at])} are not finite, and {int((~finite_C).sum()) - 1} "
            "more with them: look at the teacher and its precision",
            finite_C,
        )


def _exact(
    real_Cv: torch.Tensor,
    labels_C: torch.Tensor,
    whole: Whole,
    shard: VocabShard,
    config: TruncationConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept for sure: ids [C, K], `NO_ENTRY` where there are fewer, and log-probs, fp64."""
    count = real_Cv.shape[0]
    ids_CK = labels_C.new_empty((count, 0))
    log_probs_CK = whole.maximum.new_empty((count, 0))
    if config.sampling != "rs":
        ids_CK, log_probs_CK = _top_p_k(real_Cv, whole, shard, config)
    if config.force_gold:
        there_C = (ids_CK == labels_C[:, None]).any(1)
        ids_CK = torch.cat([ids_CK, labels_C.masked_fill(there_C, NO_ENTRY)[:, None]], 1)
        log_probs_CK = torch.cat([log_probs_CK, whole.gold_log_prob[:, None]], 1)
    return ids_CK, log_probs_CK


def _top_p_k(
    real_Cv: torch.Tensor, whole: Whole, shard: VocabShard, config: TruncationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    everything = config.truncate == "none"
    most = shard.valid if everything else min(config.top_k, shard.valid)
    top_p = 1.0 if everything else config.top_p
    tried = most if top_p == 1 else min(most, _FIRST_TRY)
    while True:
        logits_CK, ids_CK = _highest(real_Cv, tried, shard)
        log_probs_CK = whole.log_probs(logits_CK)
        mass_CK = log_probs_CK.exp().cumsum(1)
        if tried == most or bool((mass_CK[:, -1] >= top_p).all()):
            break
        tried = min(most, 4 * tried)
    if top_p < 1:  # at 1, only rounding says that mass is complete
        ids_CK[:, 1:].masked_fill_(mass_CK[:, :-1] >= top_p, NO_ENTRY)
    return ids_CK, log_probs_CK


def _highest(real_Cv: torch.Tensor, k: int, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest logits over all ranks, highest first, and their ids."""
    count, width = real_Cv.shape
    mine = min(k, width)
    logits_Ck = real_Cv.new_full((count, k), -torch.inf, dtype=torch.float32)
    ids_Ck = torch.full_like(logits_Ck, NO_ENTRY, dtype=torch.int64)
    if mine:
        logits_Ck[:, :mine], columns_Ck = top_k(real_Cv, mine)
        ids_Ck[:, :mine] = columns_Ck + shard.first
    if shard.group is None:
        return logits_Ck, ids_Ck
    # Rank after rank, so that equal logits are still in the order of their columns.
    logits_Cn = gather_shards(logits_Ck, shard).transpose(0, 1).flatten(1)
    ids_Cn = gather_shards(ids_Ck, shard).transpose(0, 1).flatten(1)
    logits_Ck, places_Ck = top_k(logits_Cn, k)
    return logits_Ck, ids_Cn.gather(1, places_Ck)


@dataclass(frozen=True)
class _Removed:
    """Columns that count for nothing as long as they are removed."""

    rows: torch.Tensor
    columns: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def out_of(cls, real_Cv: torch.Tensor, ids_CK: torch.Tensor, shard: VocabShard) -> _Removed:
        """Remove what this rank has of them."""
        columns_CK = ids_CK - shard.first
        mine_CK = (ids_CK != NO_ENTRY) & (columns_CK >= 0) & (columns_CK < real_Cv.shape[1])
        rows, places = mine_CK.nonzero(as_tuple=True)
        columns = columns_CK[rows, places]
        removed = cls(rows, columns, real_Cv[rows, columns])
        real_Cv[rows, columns] = NO_COLUMN
        return removed

    def put_back(self, real_Cv: torch.Tensor) -> None:
        """Leave the logits as they were."""
        real_Cv[self.rows, self.columns] = self.logits


def _in_rows(
    ids_CK: torch.Tensor, log_probs_CK: torch.Tensor, whole: Whole, tail_C: torch.Tensor
) -> SparseLogits:
    """Off the device: entries of each token by ascending id."""
    absent = torch.iinfo(torch.int32).max
    ids_CK, order_CK = ids_CK.masked_fill(ids_CK == NO_ENTRY, absent).sort(1)
    there_CK = ids_CK != absent

    def column(values: torch.Tensor) -> np.ndarray:
        return values.float().cpu().numpy()

    return SparseLogits(
        counts=there_CK.sum(1).cpu().numpy().astype(np.uint32),
        ids=ids_CK[there_CK].int().cpu().numpy(),
        log_probs=column(log_probs_CK.gather(1, order_CK)[there_CK]),
        gold_log_prob=column(whole.gold_log_prob),
        entropy=column(whole.entropy),
        logit_std=column(whole.logit_std),
        tail_mass=column(tail_C),
        log_partitions={tau: column(z_C) for tau, z_C in whole.log_partitions.items()},
    )
