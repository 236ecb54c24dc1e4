"""``pretrain --cache-logits``: what a model says of its training data, stored while it is trained.

The loss makes the logits of every position anyway; before the gradient takes their place, what is
kept of them (`models.truncate`) is taken aside, so the store costs no forward pass (the online
logits of arXiv 2410.16215). Each source of the data has a store, and each data-parallel rank writes
shards of the instances that it trained on. A shard is named by the update after which it was
written; all that was seen is in shards before a checkpoint is, and a run that goes on from a
checkpoint removes the later ones, so that a store is complete whenever and however often its run
was killed. A checkpoint whose shards cannot be written is one that cannot be saved: training goes
on, and the next save writes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_miniplm.core.errors import ConfigError, DataError, MiniPLMError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import Parent, read_json
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.filling import FillConfig
from megatron_miniplm.data.instances import PADDING_ROW, Batch
from megatron_miniplm.data.logit_codec import Encoding, encode
from megatron_miniplm.data.record_store import Record, RecordStore
from megatron_miniplm.data.record_writer import RecordWriter, awaits_assembly
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
from megatron_miniplm.training.resume import Counters, Parents, decisive

OWNER = "run"
"""In the run.json of a store: the folder of the run that fills it."""
_SHARD_BYTES = 256 << 20
"""Encoded logits after which a shard is written without a checkpoint."""
_MOST_WAITING = 2
"""Micro-batches that wait as they were said: training waits for the oldest to be encoded."""


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """Storing the logits of the model that is trained."""

    cache_logits: tuple[str, ...] = ()
    """Folder of a logit store to fill with what the model says of its training data while it is
    trained; complete when the run is. One for each corpus of --train-data-path, in their order."""
    truncation: TruncationConfig = field(default_factory=TruncationConfig)
    encoding: Encoding = field(default_factory=Encoding)

    def __post_init__(self) -> None:
        if self.cache_logits:
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
        """Refuse other than one store for each source."""
        folders = {Path(path).resolve() for path in self.cache_logits}
        if self.cache_logits and not len(folders) == len(self.cache_logits) == len(data.sources):
            raise ConfigError(
                f"--cache-logits {' '.join(self.cache_logits)} is {len(folders)} folders, but "
                f"--train-data-path has {len(data.sources)} corpora: give one for each, in their "
                "order"
            )

    def awaits_assembly(self, step: int) -> bool:
        """Whether a run that ended with update `step` has left a store to be completed."""
        return any(awaits_assembly(Path(path), step) for path in self.cache_logits)


def run_identity(
    flags: Mapping[str, Any], parents: Parents, *, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides how a model is trained: its sources, and the flags that may not change.

    Two runs of one identity say the same of their data, update by update. Flags at their defaults
    are not in it, so that a run goes on where a later version has more of them.
    """
    said = {name: value for name, value in decisive(flags).items() if value != defaults.get(name)}
    sources = {role: fingerprint for role, (fingerprint, _) in parents.items()}
    return sources | {f"--{name.replace('_', '-')}": value for name, value in said.items()}


@dataclass(frozen=True)
class _Seen:
    """What was said of the rows of a micro-batch."""

    update: int
    ids: np.ndarray
    """int64[n], root ids of the rows that have a record."""
    lost: np.ndarray
    """Those that have none."""
    records: Future[list[Record]]


class _Store:
    """Of one source: its store, and what this rank has seen of it and not yet written."""

    writer: RecordWriter

    def __init__(self, path: Path, number: int, corpus: Corpus) -> None:
        self.path, self.number, self.corpus = path, number, corpus
        self.seen: list[_Seen] = []
        self.step = 0
        """Of the latest shard."""

    def write(self, rank: int, step: int, *, if_empty: bool) -> str:
        """Write what was seen, as the shard of this rank and update; what is in the way."""
        seen = self.seen
        if not seen and not (if_empty and self.step < step):
            return ""
        try:
            self.writer.add_shard(
                f"{rank:05d}",
                _joined(each.ids for each in seen),
                [record for each in seen for record in each.records.result()],
                step=step,
                updates=_joined(np.full(len(each.ids), each.update) for each in seen),
                lost=_joined(each.lost for each in seen),
            )
        except (OSError, MiniPLMError) as error:
            return f"the logits of {step} updates could not be saved: {error}"
        self.seen, self.step = [], step
        return ""

    def assemble(self) -> None:
        """Complete the store, and say what it lacks."""
        with writing(self.path):
            if not self.writer.finish_seen():
                raise DataError(f"nothing of the run is in {self.path}: it was removed")
        if lost := RecordStore.open(self.path).manifest.content["num_lost"]:
            get_logger().warning(
                "%s lacks %d instances that were trained on: their logits were not finite",
                self.path, lost,
            )  # fmt: skip


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])


class LogitCapture:
    """Takes what is said of every micro-batch aside and writes it into shards.

    Every rank has one; the first TP rank of the last pipeline stage writes. First `open`, then
    `go_on`; `watched` and `seal` are for the step and the save. `close` in any case. Attributes:
    ``filling``, the stores that are not complete yet, known once it is open.
    """

    def __init__(self, config: CaptureConfig, *, data: Blend, topology: Topology) -> None:
        self.config, self.data, self.topology = config, data, topology
        self.writes = topology.is_last_stage and topology.tp_rank == 0
        self.filling = [
            _Store(Path(path), number, source.corpus)
            for number, (path, source) in enumerate(
                zip(config.cache_logits, data.sources, strict=True)
            )
        ]
        self._held = ExitStack()
        self._pool = ThreadPoolExecutor(1)
        self._encoding: deque[list[_Seen]] = deque()
        self._size = self._update = 0

    def open(
        self,
        facts: Mapping[str, Any],
        flags: Mapping[str, Any],
        parents: Parents,
        *,
        defaults: Mapping[str, Any],
        begins: bool,
        overwrite: bool,
    ) -> None:
        """Start the stores or join them, for this run alone (a collective).

        `flags`, of which `defaults` are known, and `parents` are the run's, which `begins` or goes
        on. Refuses a store of another run, finished or not; of one that begins, `overwrite`
        replaces it.
        """
        overwrite = overwrite and begins
        self.topology.from_rank0(self._hold)
        identity = {
            "what": "logits",
            "teacher": run_identity(flags, parents, defaults=defaults),
            **self.config.truncation.as_config(),
            "encoding": self.config.encoding.as_config(),
        }
        for store in self.filling:
            self._open(store, identity, facts, parents, overwrite=overwrite)
            if begins and not overwrite:
                owned = partial(_refuse_owned, store.path, Path(flags["save"]).absolute())
                self.topology.from_rank0(owned)
        # Asked once: collectives follow from it.
        finished = self.topology.from_rank0(lambda: [s.writer.finished for s in self.filling])
        for store, is_finished in zip(self.filling, finished, strict=True):
            if is_finished:
                get_logger().info("%s is complete: nothing is added to it", store.path)
        self.filling = [s for s, done in zip(self.filling, finished, strict=True) if not done]

    def _open(
        self,
        store: _Store,
        identity: Mapping[str, Any],
        facts: Mapping[str, Any],
        parents: Parents,
        *,
        overwrite: bool,
    ) -> None:
        # What the run is made of; a store's own "teacher" would be the model that it is of.
        roles = {
            f"run's {role}": Parent.of(fingerprint, source, named_in=store.path / "manifest.json")
            for role, (fingerprint, source) in parents.items()
            if fingerprint != store.corpus.fingerprint
        }

        def make(overwrite: bool) -> RecordWriter:
            return RecordWriter(
                store.path, corpus=store.corpus, config=identity,
                facts={"vocab_size": store.corpus.vocab_size, **facts}, parents=roles,
                overwrite=overwrite,
            )  # fmt: skip

        store.writer = FillConfig(overwrite=overwrite).open(make, self.topology)

    def _hold(self) -> None:
        for store in self.filling:
            with writing(store.path):
                store.path.mkdir(parents=True, exist_ok=True)
                self._held.enter_context(exclusive(store.path / ".lock", wait=False))

    def go_on(self, counters: Counters) -> None:
        """Leave only what the run had seen where it goes on from (a collective)."""
        self.counters, self._update = counters, counters.iteration
        for store in self.filling:
            store.step = counters.iteration
        self.topology.from_rank0(self._rewind)

    def _rewind(self) -> None:
        at = self.counters.iteration
        for store in self.filling:
            if at and at not in store.writer.steps():
                raise ConfigError(
                    f"--cache-logits {store.path} has nothing of update {at}, from where the run "
                    "goes on: it was moved or removed, or the run went on without it; restore it, "
                    "or leave --cache-logits out"
                )
        for store in self.filling:
            store.writer.rewind(at)

    def watched(self, head: Head, batch: Batch) -> Head:
        """The head of a micro-batch, of which the loss shows its logits."""
        if not self.filling:
            return head
        self._begin_update()
        length = batch.tokens_bs.shape[1]
        row_bs, position_bs = (
            torch.arange(count, device=batch.tokens_bs.device)
            for count in batch.tokens_bs.shape
        )  # fmt: skip
        sources_b, ids_b = self._located(batch)
        # Megatron's order: positions, then rows.
        places = Places(
            row_N=row_bs.repeat(length),
            position_N=position_bs.repeat_interleave(len(row_bs)),
            labels_N=batch.labels_bs.t().flatten(),
            ids_b=ids_b,
        )
        trained_N = self.data.whole_mask(batch).t().flatten()
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
            if part.stop == len(trained_N) and self.writes:
                self._take(places, sources_b, tokens, parts, lost_b)

        return replace(head, watch=watch)

    def _located(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Of each row its source and root id, int64[b] each; -1 where there is none."""
        rows_b = batch.rows_b.cpu().numpy()
        ids_b = np.full_like(rows_b, PADDING_ROW)
        sources_b = np.full_like(rows_b, PADDING_ROW)
        there = np.flatnonzero(rows_b != PADDING_ROW)
        sources_b[there], own_rows = self.data.locate(rows_b[there])
        for number, source in enumerate(self.data.sources):
            mine = sources_b[there] == number
            ids_b[there[mine]] = instance_ids(source.corpus, own_rows[mine])
        return sources_b, ids_b

    def _take(
        self,
        places: Places,
        sources_b: np.ndarray,
        tokens: Sequence[torch.Tensor],
        parts: Sequence[SparseLogits],
        lost_b: np.ndarray,
    ) -> None:
        """Encode what was said of a whole micro-batch, aside."""
        kept = concatenated(parts, taus=self.config.truncation.kd_temperatures)
        at_N = torch.cat([*tokens]) if tokens else places.row_N[:0]
        rows = places.rows(at_N).by_row(kept)
        while len(self._encoding) >= _MOST_WAITING:
            self._count_oldest()
        taken: list[_Seen] = []
        for store in self.filling:
            mine_b = sources_b == store.number
            if not mine_b.any():
                continue
            there = np.flatnonzero(mine_b & ~lost_b)
            records = self._pool.submit(self._encoded, [rows[at] for at in there])
            lost = places.ids_b[mine_b & lost_b]
            taken.append(_Seen(self._update, places.ids_b[there], lost, records))
            store.seen.append(taken[-1])
        self._encoding.append(taken)

    def _encoded(self, rows: Sequence[SparseLogits]) -> list[Record]:
        vocab = self.data.language.vocab_size
        return [encode(row, self.config.encoding, vocab_size=vocab) for row in rows]

    def _count_oldest(self) -> None:
        """Wait until a micro-batch is encoded. Shards do not depend on who is faster: all wait."""
        for each in self._encoding.popleft():
            if each.records.exception() is None:  # whoever writes them says it
                self._size += sum(len(record.payload) for record in each.records.result())

    def _begin_update(self) -> None:
        """Write shards of what earlier updates left, where it is much."""
        done = self.counters.iteration
        problem = ""
        if self._size >= _SHARD_BYTES and self._update <= done:
            problem = self._written(done, if_empty=False)
        if problem:
            get_logger().error("%s; what was seen is kept for the next save", problem)
        self._update = done + 1

    def seal(self, iteration: int) -> None:
        """Write what was seen until this update, before its checkpoint is there (a collective).

        Of every store there is a shard, be it empty: a run that goes on looks for it.
        `SaveFailedError` on every rank if one could not: what was seen is kept for the next time.
        """
        first = self.writes and self.topology.dp_rank == 0
        problems = self.topology.gather(self._written(iteration, if_empty=first))
        for rank, problem in enumerate(problems):
            if problem:
                raise SaveFailedError(f"rank {rank}: {problem}")

    def _written(self, iteration: int, *, if_empty: bool) -> str:
        """Write what was seen until this update; what is in the way."""
        while self._encoding:
            self._count_oldest()
        self._size = 0  # a failed shard is tried again at the next save, or when there is as much
        rank = self.topology.dp_rank
        problems = [store.write(rank, iteration, if_empty=if_empty) for store in self.filling]
        return "; ".join(filter(None, problems))

    def finish(self) -> None:
        """Complete the stores (a collective), once the run is."""
        self.topology.gather(None)  # everybody has sealed
        for store in self.filling:
            self.topology.from_rank0(store.assemble)

    def close(self) -> None:
        """Leave what is not sealed: the run goes on before it."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._held.close()


def _refuse_owned(path: Path, save: Path) -> None:
    """Refuse that a run begins in `save` where the same run elsewhere has checkpoints."""
    if not (path / "run.json").exists():
        return
    owner = Path(read_json(path / "run.json").get(OWNER, save))
    if owner != save and latest_checkpoint(owner) is not None:
        raise ConfigError(
            f"{path} is of the run in {owner}, but a run begins in {save}: go on with that, "
            "choose another --cache-logits, or pass --overwrite"
        )
