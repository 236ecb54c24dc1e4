"""``pretrain --cache-logits``: what a model says of its training data, stored while it is trained.

The loss makes the logits of every position anyway; before the gradient takes their place, what is
kept of them (`models.truncate`) is taken aside, so the store costs no forward pass (the online
logits of arXiv 2410.16215). Each data-parallel rank writes shards of the instances that it trained
on. A shard is named by the update after which it was written; all that was seen is in shards before
a checkpoint is, and a run that goes on from a checkpoint removes the later ones, so that a store is
complete whenever and however often its run was killed. A checkpoint whose shards cannot be written
is one that cannot be saved: training goes on, and the next save writes them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_miniplm.core.errors import ConfigError, DataError, MiniPLMError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import Parent, hash_parts, read_json, relative_path
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.filling import FillConfig
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.data.logit_codec import Encoding, encode
from megatron_miniplm.data.record_store import Record, RecordStore, RecordWriter
from megatron_miniplm.data.sparse_logits import SparseLogits, concatenated
from megatron_miniplm.data.staging import exclusive, writing
from megatron_miniplm.models.checkpoint import SaveFailedError, latest_checkpoint
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.truncate import (
    NotFiniteLogitsError,
    Places,
    TruncationConfig,
    instance_ids,
    truncated,
)
from megatron_miniplm.parallel.topology import Topology
from megatron_miniplm.training.resume import MAY_CHANGE, MAY_CHANGE_BY_SAMPLES, Counters, Parents

OWNER = "run"
"""In the run.json of a store: the folder of the run that fills it."""
_SHARD_BYTES = 256 << 20
"""Encoded logits after which a shard is written without a checkpoint."""
_MOST_WAITING = 2
"""Micro-batches that wait as they were said: training waits for the oldest to be encoded."""


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


def run_fingerprint(flags: Mapping[str, Any], parents: Parents) -> str:
    """Of what decides how a model is trained: its sources, and the flags that may not change.

    Two runs of one fingerprint say the same of their data, update by update.
    """
    may_change = MAY_CHANGE
    if flags.get("train_samples") is not None:
        may_change |= MAY_CHANGE_BY_SAMPLES
    decisive = {name: value for name, value in flags.items() if name not in may_change}
    sources = {role: fingerprint for role, (fingerprint, _) in parents.items()}
    return hash_parts(json.dumps([decisive, sources], sort_keys=True, default=str))


@dataclass(frozen=True)
class _Seen:
    """What was said of the rows of a micro-batch."""

    update: int
    ids: np.ndarray
    """int64[n], root ids of the rows that have a record."""
    lost: np.ndarray
    """Those that have none."""
    records: Future[list[Record]]


class LogitCapture:
    """Takes what is said of every micro-batch aside and writes it into shards.

    Every rank has one; the first TP rank of the last pipeline stage writes. First `open`, then
    `go_on`; `watched` and `seal` are for the step and the save. `close` in any case.
    """

    def __init__(self, config: CaptureConfig, *, corpus: Corpus, topology: Topology) -> None:
        self.config, self.corpus, self.topology = config, corpus, topology
        self._held = ExitStack()
        self._pool = ThreadPoolExecutor(1)
        self._seen: list[_Seen] = []
        self._encoding: deque[_Seen] = deque()
        self._size = self._update = 0

    def open(
        self,
        facts: Mapping[str, Any],
        flags: Mapping[str, Any],
        parents: Parents,
        *,
        begins: bool,
        overwrite: bool,
    ) -> None:
        """Start the store or join it, for this run alone (a collective).

        `flags` and `parents` are the run's, which `begins` or goes on. Refuses a store of another
        run, finished or not; of one that begins, `overwrite` replaces it.
        """
        config = self.config
        assert config.cache_logits is not None, "there is no store to open"
        path = Path(config.cache_logits)
        overwrite = overwrite and begins
        self.topology.from_rank0(lambda: self._hold(path))
        identity = {
            "what": "logits",
            "teacher": run_fingerprint(flags, parents),
            **config.truncation.as_config(),
            "encoding": config.encoding.as_config(),
        }
        # What the run is made of; a store's own "teacher" would be the model that it is of.
        roles = {
            f"run's {role}": Parent(
                fingerprint=fingerprint, path=relative_path(source, path / "manifest.json")
            )
            for role, (fingerprint, source) in parents.items()
            if role != "corpus"
        }
        facts = {"vocab_size": self.corpus.vocab_size, **facts}

        def make(overwrite: bool) -> RecordWriter:
            return RecordWriter(
                path, corpus=self.corpus, config=identity, facts=facts, parents=roles,
                overwrite=overwrite,
            )  # fmt: skip

        self.writer = FillConfig(overwrite=overwrite).open(make, self.topology)
        if begins and not overwrite:
            save = Path(flags["save"]).absolute()
            self.topology.from_rank0(lambda: self._refuse_owned(path, save))
        # Asked once: collectives follow from it.
        self.finished = self.topology.from_rank0(lambda: self.writer.finished)
        if self.finished:
            get_logger().info("%s is complete: nothing is added to it", path)

    def _hold(self, path: Path) -> None:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(exclusive(path / ".lock", wait=False))

    def _refuse_owned(self, path: Path, save: Path) -> None:
        """Refuse that a run begins in `save` where the same run elsewhere has checkpoints."""
        if not (path / "run.json").exists():
            return
        owner = Path(read_json(path / "run.json").get(OWNER, save))
        if owner != save and latest_checkpoint(owner) is not None:
            raise ConfigError(
                f"{path} is of the run in {owner}, but a run begins in {save}: go on with that, "
                "choose another --cache-logits, or pass --overwrite"
            )

    def go_on(self, counters: Counters) -> None:
        """Leave only what the run had seen where it goes on from (a collective)."""
        self.counters, self._update = counters, counters.iteration
        if not self.finished:
            self.topology.from_rank0(self._rewind)

    def _rewind(self) -> None:
        at = self.counters.iteration
        if at and at not in self.writer.steps():
            raise ConfigError(
                f"--cache-logits {self.writer.path} has nothing of update {at}, from where the run "
                "goes on: it was moved or removed, or the run went on without it; restore it, or "
                "leave --cache-logits out"
            )
        self.writer.rewind(at)

    def watched(self, head: Head, batch: Batch) -> Head:
        """The head of a micro-batch, of which the loss shows its logits."""
        if self.finished:
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
        trained_N = batch.mask_bs.t().flatten()
        tokens: list[torch.Tensor] = []
        parts: list[SparseLogits] = []
        lost_b = np.zeros(len(row_bs), dtype=bool)

        def watch(part: slice, logits_Cv: torch.Tensor) -> None:
            here = trained_N[part].nonzero().flatten()
            while len(here):
                # Most chunks are trained on throughout: no copy.
                logits = logits_Cv if len(here) == len(logits_Cv) else logits_Cv[here]
                at = places.rows(part).rows(here)
                try:
                    kept = truncated(logits, at, head.shard, self.config.truncation)
                except NotFiniteLogitsError as error:  # whether training goes on is its guard's
                    get_logger().warning("not stored: %s", error)
                    lost_b[at.row_N[~error.finite_C].cpu().numpy()] = True
                    here = here[error.finite_C]
                    continue
                tokens.append(here + part.start)
                parts.append(kept)
                break
            if part.stop == len(trained_N) and self.topology.tp_rank == 0:
                self._take(places, tokens, parts, lost_b)

        return replace(head, watch=watch)

    def _take(
        self,
        places: Places,
        tokens: Sequence[torch.Tensor],
        parts: Sequence[SparseLogits],
        lost_b: np.ndarray,
    ) -> None:
        """Encode what was said of a whole micro-batch, aside."""
        kept = concatenated(parts, taus=self.config.truncation.kd_temperatures)
        at_N = torch.cat([*tokens]) if tokens else places.row_N[:0]
        rows = places.rows(at_N).by_row(kept)
        is_there_b = places.ids_b >= 0
        there = np.flatnonzero(is_there_b & ~lost_b)

        def encoded() -> list[Record]:
            encoding, vocab = self.config.encoding, self.corpus.vocab_size
            return [encode(rows[at], encoding, vocab_size=vocab) for at in there]

        lost = places.ids_b[is_there_b & lost_b]
        while len(self._encoding) >= _MOST_WAITING:
            self._count_oldest()
        records = self._pool.submit(encoded)
        self._seen.append(_Seen(self._update, places.ids_b[there], lost, records))
        self._encoding.append(self._seen[-1])

    def _count_oldest(self) -> None:
        """Wait until a micro-batch is encoded. Shards do not depend on who is faster: all wait."""
        records = self._encoding.popleft().records
        if records.exception() is None:  # whoever writes them says it
            self._size += sum(len(record.payload) for record in records.result())

    def _begin_update(self) -> None:
        """Write a shard of what earlier updates left, where it is much."""
        done = self.counters.iteration
        if self._size >= _SHARD_BYTES and self._update <= done:
            if problem := self._written(done):
                get_logger().error("%s; what was seen is kept for the next save", problem)
            self._size = 0  # of what is asked for again only when there is as much more
        self._update = done + 1

    def seal(self, iteration: int) -> None:
        """Write what was seen until this update, before its checkpoint is there (a collective).

        `SaveFailedError` on every rank if one could not: what was seen is kept for the next time.
        """
        problems = self.topology.gather(self._written(iteration))
        for rank, problem in enumerate(problems):
            if problem:
                raise SaveFailedError(f"rank {rank}: {problem}")

    def _written(self, iteration: int) -> str:
        """Write what was seen until this update; what is in the way."""
        seen = self._seen
        if not seen:
            return ""
        while self._encoding:
            self._count_oldest()
        try:
            self.writer.add_shard(
                f"{self.topology.dp_rank:05d}",
                np.concatenate([each.ids for each in seen]),
                [record for each in seen for record in each.records.result()],
                step=iteration,
                updates=np.repeat([each.update for each in seen], [len(e.ids) for e in seen]),
                lost=np.concatenate([each.lost for each in seen]),
            )
        except (OSError, MiniPLMError) as error:
            return f"the logits of {iteration} updates could not be saved: {error}"
        self._seen, self._size = [], 0
        return ""

    def finish(self) -> None:
        """Complete the store (a collective), once the run is, and say what it lacks."""
        if self.finished:
            return
        self.topology.gather(None)  # everybody has sealed
        self.topology.from_rank0(self._assemble)

    def _assemble(self) -> None:
        with writing(self.writer.path):
            if not self.writer.finish_seen():
                raise DataError(f"nothing of the run is in {self.writer.path}: it was removed")
        if lost := RecordStore.open(self.writer.path).manifest.content["num_lost"]:
            get_logger().warning(
                "%s lacks %d instances that were trained on: their logits were not finite",
                self.writer.path, lost,
            )  # fmt: skip

    def close(self) -> None:
        """Leave what is not sealed: the run goes on before it."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._held.close()
