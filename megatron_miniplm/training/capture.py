"""``pretrain --cache-logits``: what a model says of its training data, stored while it is trained.

The loss makes the logits of every position anyway; before the gradient takes their place, what is
kept of them (`models.truncate`) is taken aside, so the store costs no forward pass (the online
logits of arXiv 2410.16215). Each data-parallel rank writes shards of the instances that it trained
on. A shard is named by the update after which it was written; all that was seen is in shards before
a checkpoint is, and a run that goes on from a checkpoint removes the later ones, so that a store is
complete whenever and however often its run was killed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import hash_parts
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.filling import FillConfig
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.data.logit_codec import Encoding, encode
from megatron_miniplm.data.record_store import Record, RecordWriter
from megatron_miniplm.data.sparse_logits import SparseLogits, concatenated
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.truncate import Places, TruncationConfig, instance_ids, truncated
from megatron_miniplm.parallel.topology import Topology
from megatron_miniplm.training.resume import MAY_CHANGE, MAY_CHANGE_BY_SAMPLES, Counters

_SHARD_BYTES = 256 << 20
"""Kept logits, before they are encoded, after which a shard is written without a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """Storing the logits of the model that is trained."""

    cache_logits: str | None = None
    """Folder of a logit store to fill with what the model says of its training data while it is
    trained; complete when the run is."""
    truncation: TruncationConfig = field(default_factory=TruncationConfig)
    encoding: Encoding = field(default_factory=Encoding)

    def __post_init__(self) -> None:
        if self.cache_logits is not None:
            return
        for part in (self.truncation, self.encoding):
            for item in fields(part):
                value = getattr(part, item.name)
                if value != item.default:
                    raise ConfigError(
                        f"--{item.name.replace('_', '-')} {value} has no effect without "
                        "--cache-logits: leave it out"
                    )

    def check(self, data: Blend) -> None:
        """Refuse data of which one store cannot be."""
        if self.cache_logits is not None and len(data.sources) > 1:
            raise ConfigError(
                f"--cache-logits {self.cache_logits} is a store of one corpus, but "
                f"--train-data-path has {len(data.sources)}: train on one, or use the verb "
                "cache-logits for each"
            )


def run_fingerprint(flags: Mapping[str, Any]) -> str:
    """Of what decides how a model is trained: the run's flags (flat) but for those that may change.

    Two runs of one fingerprint say the same of their data, update by update.
    """
    decisive = {
        name: value
        for name, value in flags.items()
        if name not in MAY_CHANGE | MAY_CHANGE_BY_SAMPLES | {"cache_logits"}
    }
    return hash_parts(json.dumps(decisive, sort_keys=True, default=str))


class LogitCapture:
    """Takes what is said of every micro-batch aside and writes it into shards.

    Every rank has one; the first TP rank of the last pipeline stage writes. First `open`, then
    `go_on`; `watched` and `seal` are for the step and the save.
    """

    def __init__(self, config: CaptureConfig, *, corpus: Corpus, topology: Topology) -> None:
        self.config, self.corpus, self.topology = config, corpus, topology
        self._pool = ThreadPoolExecutor(1)
        self._seen: list[tuple[np.ndarray, Future[list[Record]]]] = []
        self._size = self._step = 0

    def open(self, facts: Mapping[str, Any], flags: Mapping[str, Any], *, overwrite: bool) -> None:
        """Start the store or join it (a collective); `flags` are the run's."""
        config = self.config
        assert config.cache_logits is not None, "there is no store to open"
        path = Path(config.cache_logits)
        identity = {
            "what": "logits",
            "teacher": run_fingerprint(flags),
            **config.truncation.as_config(),
            "encoding": config.encoding.as_config(),
        }
        facts = {"vocab_size": self.corpus.vocab_size, **facts}

        def make(overwrite: bool) -> RecordWriter:
            return RecordWriter(
                path, corpus=self.corpus, config=identity, facts=facts, overwrite=overwrite
            )

        self.writer = FillConfig(overwrite=overwrite).open(make, self.topology)

    def go_on(self, counters: Counters) -> None:
        """Leave only what the run had seen where it goes on from (a collective)."""
        self.counters = counters
        self.topology.from_rank0(self._rewind)
        self._step = self.counters.iteration

    def _rewind(self) -> None:
        at = self.counters.iteration
        if self.writer.finished:
            return
        self.writer.rewind(at)
        if at and not list(self.writer.path.glob("shards/step-*")):
            raise ConfigError(
                f"--cache-logits {self.writer.path} has nothing of the first {at} updates of the "
                "run: it was moved or removed; restore it, or leave --cache-logits out"
            )

    def watched(self, head: Head, batch: Batch) -> Head:
        """The head of a micro-batch, of which the loss shows its logits."""
        if self.writer.finished:
            return head
        self._begin_update()
        length = batch.tokens_bs.shape[1]
        row_bs, position_bs = (
            torch.arange(count, device=batch.tokens_bs.device)
            for count in batch.tokens_bs.shape
        )  # fmt: skip
        # Megatron's order: positions, then rows.
        places = Places(
            row_N=row_bs.repeat(length),
            position_N=position_bs.repeat_interleave(len(row_bs)),
            labels_N=batch.labels_bs.t().flatten(),
            ids_b=instance_ids(self.corpus, batch),
        )
        parts: list[SparseLogits] = []

        def watch(part: slice, logits_Cv: torch.Tensor) -> None:
            try:
                kept = truncated(logits_Cv, places.rows(part), head.shard, self.config.truncation)
            except DataError as error:  # whether training goes on is for its guard to say
                get_logger().warning("not stored: %s", error)
                return
            parts.append(kept)
            if sum(map(len, parts)) == len(places.row_N) and self.topology.tp_rank == 0:
                self._take(batch, places, parts)

        return replace(head, watch=watch)

    def _take(self, batch: Batch, places: Places, parts: Sequence[SparseLogits]) -> None:
        """Encode what was said of a whole micro-batch, aside."""
        kept = concatenated(parts, taus=self.config.truncation.kd_temperatures)
        trained_N = batch.mask_bs.t().flatten().nonzero().flatten()
        rows = places.rows(trained_N).by_row(kept.at(trained_N.cpu().numpy()))
        there = np.flatnonzero(places.ids_b >= 0)
        self._size += sum(rows[at].nnz for at in there) * 8

        def encoded() -> list[Record]:
            encoding, vocab = self.config.encoding, self.corpus.vocab_size
            return [encode(rows[at], encoding, vocab_size=vocab) for at in there]

        self._seen.append((places.ids_b[there], self._pool.submit(encoded)))

    def _begin_update(self) -> None:
        """Write a shard of what earlier updates left, where it is much."""
        if self._size >= _SHARD_BYTES and self._step < self.counters.iteration + 1:
            self.seal(self.counters.iteration)
        self._step = self.counters.iteration + 1

    def seal(self, iteration: int) -> None:
        """Write what was seen until this update, before its checkpoint is there."""
        if not self._seen:
            return
        ids = np.concatenate([ids for ids, _ in self._seen])
        records = [record for _, future in self._seen for record in future.result()]
        name = f"{self.topology.dp_rank:05d}"
        self.writer.add_shard(name, ids, records, step=iteration)
        self._seen, self._size = [], 0

    def finish(self) -> None:
        """Complete the store (a collective), once the run is."""
        self.topology.gather(None)  # everybody has sealed
        self.topology.from_rank0(self.writer.finish_seen)

    def close(self) -> None:
        """Leave what is not sealed: the run goes on before it."""
        self._pool.shutdown(wait=False, cancel_futures=True)
