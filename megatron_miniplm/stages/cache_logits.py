"""``cache-logits``: what a teacher says of every instance of a corpus, into a store.

As in ``score``, data-parallel ranks take windows of rows in turn and micro-batches are cut by rows
alone, so any number of ranks, kills and resumes give the same bytes. Each micro-batch is encoded by
a thread while the next ones are computed, and a window is written by another while the next one is:
what a rank holds are the encoded bytes of two windows.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from megatron_miniplm.core.config import compose, part_of, print_json, write_run
from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import Parent
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.filling import FillConfig
from megatron_miniplm.data.hidden_codec import HiddenEncoding, encode_hidden
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.data.logit_codec import Encoding, encode
from megatron_miniplm.data.record_store import Record, RecordStore
from megatron_miniplm.data.record_writer import RecordWriter
from megatron_miniplm.data.sparse_logits import SparseLogits
from megatron_miniplm.data.staging import writing
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.forward import forward_rows
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.truncate import (
    Places,
    TruncationConfig,
    instance_ids,
    sparse_logits,
)
from megatron_miniplm.models.weights import Weights, open_weights
from megatron_miniplm.parallel.topology import ParallelConfig, Topology, initialize, shutdown

_INDEX_BYTES = 32
"""What an instance takes in the index."""


@dataclass(frozen=True, kw_only=True)
class LogitConfig:
    """Next-token distributions, cut down (--what logits)."""

    truncation: TruncationConfig = field(default_factory=TruncationConfig)
    encoding: Encoding = field(default_factory=Encoding)


Kept = compose("Kept", {"logits": LogitConfig, "hidden": HiddenEncoding})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Store what a teacher says of every instance, for `pretrain --teacher stored`."""

    data_path: str
    """Prefix of the corpus or subset that students will train on."""
    load: str
    """Teacher: checkpoint of a run or of Megatron-LM, Hugging Face folder, or GGUF file."""
    output: str = ""
    """Folder of the store."""
    micro_batch_size: int = 16
    """Instances of one forward pass; at most those of a window (64, or a million tokens)."""
    bf16: bool = False
    """Compute in bfloat16 (softmax and sums stay fp32/fp64); otherwise fp32."""
    what: Literal["logits", "hidden"] = "logits"
    """logits: next-token distributions, cut down; hidden: final hidden states, from which the
    teacher's output matrix makes all logits."""
    estimate: bool = False
    """Write nothing: say what the store would take, by encoding some instances."""
    estimate_instances: int = 64
    """Instances that --estimate encodes, evenly over the corpus."""
    json: bool = False
    """With --estimate: answer in JSON."""
    kept: Kept = field(default_factory=Kept)  # type: ignore[valid-type]
    filling: FillConfig = field(default_factory=FillConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "estimate_instances"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)} must be at least 1")
        if not self.output and not self.estimate:
            raise ConfigError("--output is needed: the folder of the store (or --estimate)")
        idle = {
            "--output": self.output, "--overwrite": self.filling.overwrite,
            "--shard": self.filling.job != (0, 1),
        } if self.estimate else {
            "--json": self.json,
            "--estimate-instances": self.estimate_instances != type(self).estimate_instances,
        }  # fmt: skip
        if given := [flag for flag, value in idle.items() if value]:
            why = "writes nothing" if self.estimate else "is what makes use of it"
            raise ConfigError(f"{', '.join(given)} has no effect: --estimate {why}; leave it out")


def run(config: Config) -> None:
    """Store what is not stored yet; the artifact is complete when every window is there."""
    topology = initialize(config.parallel)
    try:
        corpus = Corpus.open(config.data_path)
        if not len(corpus):
            raise DataError(f"{corpus.prefix} holds no instances: there is nothing to store")
        weights = open_weights(Path(config.load))
        source = _source(config, corpus, weights)
        # Built first: a model that does not fit leaves no journal behind.
        model = weights.build(corpus, topology, torch.bfloat16 if config.bf16 else torch.float32)
        job = _Job(
            config=config, topology=topology, corpus=corpus, weights=weights, model=model,
            source=source,
        )  # fmt: skip
        if config.estimate:
            job.estimate()
        else:
            job.fill()
    finally:
        shutdown()


class _Source(Protocol):
    """What is stored: said by the teacher of a micro-batch, and made into records."""

    def __call__(self, head: Head, batch: Batch) -> Sequence[Any]:
        """Of each row."""

    def record(self, said: Any) -> Record:
        """Of one row, as bytes; any thread may ask."""

    def identity(self) -> dict[str, Any]:
        """What two stores must have in common, in the store's config."""

    def facts(self) -> dict[str, Any]:
        """What readers need to know, in the store's content."""


@dataclass(frozen=True)
class _Logits:
    """Next-token distributions, cut down."""

    corpus: Corpus
    config: LogitConfig

    def __call__(self, head: Head, batch: Batch) -> list[SparseLogits]:
        ids = instance_ids(self.corpus, batch.rows_b.cpu().numpy())
        return sparse_logits(head, batch, ids, self.config.truncation)

    def record(self, said: SparseLogits) -> Record:
        return encode(said, self.config.encoding, vocab_size=self.corpus.vocab_size)

    def identity(self) -> dict[str, Any]:
        return self.config.truncation.as_config() | {"encoding": self.config.encoding.as_config()}

    def facts(self) -> dict[str, Any]:
        return {"vocab_size": self.corpus.vocab_size}


@dataclass(frozen=True)
class _Hidden:
    """Final hidden states."""

    corpus: Corpus
    encoding: HiddenEncoding
    width: int

    def __call__(self, head: Head, batch: Batch) -> list[torch.Tensor]:
        places = Places.of(batch, batch.rows_b.cpu().numpy())
        hidden_Nh = head.hidden_of(places.in_megatron(len(batch.rows_b)))
        return list(hidden_Nh.cpu().split(batch.mask_bs.sum(1).tolist()))

    def record(self, said: torch.Tensor) -> Record:
        return encode_hidden(said, self.encoding)

    def identity(self) -> dict[str, Any]:
        return {"encoding": asdict(self.encoding)}

    def facts(self) -> dict[str, Any]:
        return {"vocab_size": self.corpus.vocab_size, "hidden_size": self.width}


def _source(config: Config, corpus: Corpus, weights: Weights) -> _Source:
    own = part_of(config.kept, config.what, "--what")
    if config.what == "hidden":
        return _Hidden(corpus, own, weights.config.hidden_size)
    return _Logits(corpus, own)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A teacher ready to speak, and where it is written down."""

    config: Config
    topology: Topology
    corpus: Corpus
    weights: Weights
    model: ModelChunks
    source: _Source

    def fill(self) -> None:
        """Write the windows that are missing."""
        config, filling, topology = self.config, self.config.filling, self.topology
        writer = filling.open(self._writer(), topology)
        written: list[Future[None]] = []

        def store(number: int) -> None:
            rows = np.asarray(writer.rows(number))
            records = self._records(rows, pool, most=writer.window)
            if records is not None:
                while written:
                    written.pop().result()
                written.append(pool.submit(writer.write_window, number, records))

        with ThreadPoolExecutor(2) as pool:
            filling.fill(writer, topology, "cache-logits", store)
            for future in written:
                future.result()
        if filling.finish(writer, topology):
            with writing(writer.path):
                write_run(Path(config.output) / "run.json", "cache-logits", config)
            content = RecordStore.open(config.output).manifest.content
            get_logger().info(
                "%s of %s instances, %s positions in %s: %s bytes, %.1f a position",
                config.what, f"{content['num_instances']:,}", f"{content['num_tokens']:,}",
                config.output, f"{content['num_bytes']:,}", content["bytes_per_token"],
            )  # fmt: skip

    def estimate(self) -> None:
        """Encode some instances, and say what all of them would take."""
        count = min(self.config.estimate_instances, len(self.corpus))
        rows = np.linspace(0, len(self.corpus) - 1, count).round().astype(np.int64)
        mine = rows[self.topology.dp_rank :: self.topology.dp_size]
        records: list[Record] | None = None
        started = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            if len(mine):
                # The first forward pass makes kernels, buffers and connections: it is not counted.
                first = mine[: self.config.micro_batch_size]
                self._records(first, pool, most=len(first))
                started = time.monotonic()
                records = self._records(mine, pool, most=len(mine))
        seconds = time.monotonic() - started
        sizes = [
            (int(length), len(record.as_bytes(0)) + _INDEX_BYTES, record.num_positions,
             record.num_values)
            for length, record in zip(self.corpus.lengths[mine], records or (), strict=False)
        ]  # fmt: skip
        parts = self.topology.gather((sizes, seconds))
        if self.topology.rank == 0:
            found = Estimate.of(
                np.array([each for part, _ in parts for each in part]), self.corpus,
                seconds=max(took for _, took in parts),
            )  # fmt: skip
            if self.config.json:
                print_json(asdict(found))
            else:
                sys.stdout.write(found.text())

    def _records(
        self, rows: np.ndarray, pool: ThreadPoolExecutor, *, most: int
    ) -> list[Record] | None:
        """What the teacher says of `rows`, encoded; None where another rank has it."""
        encoding: deque[Future[list[Record]]] = deque()

        def say(head: Head, batch: Batch) -> list[tuple[Future[list[Record]], int] | None]:
            said = self.source(head, batch)
            if self.topology.tp_rank != 0:
                return [None] * len(said)
            if len(encoding) > 1:  # no more than two micro-batches wait as they were said
                encoding.popleft().result()
            encoding.append(pool.submit(lambda: [self.source.record(each) for each in said]))
            return [(encoding[-1], at) for at in range(len(said))]

        said = forward_rows(
            self.model, self.corpus, rows, say,
            # More than there are would be rows without an instance.
            micro_batch_size=min(self.config.micro_batch_size, most),
        )  # fmt: skip
        if said is None or self.topology.tp_rank != 0:
            return None
        return [future.result()[at] for future, at in filter(None, said)]

    def _writer(self) -> Callable[[bool], RecordWriter]:
        """What opens --output for this teacher."""
        config, weights, output = self.config, self.weights, Path(self.config.output)
        fingerprint = weights.shared_fingerprint(self.topology)
        identity = {
            "what": config.what,
            "teacher": fingerprint,
            "bf16": config.bf16,
            "micro_batch_size": config.micro_batch_size,
            "tensor_model_parallel_size": self.topology.tp_size,
            **self.source.identity(),
        }
        facts = {
            "teacher": {"path": str(weights.path), "family": weights.config.model_family},
            "teacher_iteration": weights.iteration,
            **self.source.facts(),
        }
        role = Parent.of(fingerprint, weights.path, named_in=output / "manifest.json")

        def make(overwrite: bool) -> RecordWriter:
            return RecordWriter(
                output, corpus=self.corpus, config=identity, facts=facts,
                parents={"teacher": role}, overwrite=overwrite,
            )  # fmt: skip

        return make


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a store would take, from instances that were really encoded."""

    num_instances: int
    """Instances that were encoded, evenly over the corpus; the next four are means over them."""
    kept_per_token: float
    """Numbers of a trained position: kept logits, or the hidden width."""
    bytes_per_value: float
    bytes_per_token: float
    """Of a trained position; all that is written is counted."""
    total_tokens: int
    """Trained positions of the whole corpus."""
    total_bytes: int
    total_bytes_error: int | None
    """One standard error of it; of one instance nobody knows."""
    total_seconds: float
    """With as many ranks as have made the estimate, starting up not counted."""

    @classmethod
    def of(cls, sizes: np.ndarray, corpus: Corpus, *, seconds: float) -> Estimate:
        """`sizes`: int[n, 4], of each instance its tokens, bytes, positions and values."""
        count = len(sizes)
        tokens, size, positions, values = sizes.sum(0).tolist()
        scale = corpus.num_tokens / tokens
        # Of a ratio estimator: what bytes deviate from being proportional to tokens.
        deviation = sizes[:, 1] - sizes[:, 0] * (size / tokens)
        unseen = max(0.0, 1 - count / len(corpus))
        error = None if unseen else 0.0
        if count > 1:
            error = float(deviation.std(ddof=1)) * math.sqrt(count * unseen)
        return cls(
            num_instances=count,
            kept_per_token=values / max(positions, 1),
            bytes_per_value=size / max(values, 1),
            bytes_per_token=size / max(positions, 1),
            total_tokens=round(positions * scale),
            total_bytes=round(size * scale),
            total_bytes_error=None if error is None else round(error * scale),
            total_seconds=seconds * scale,
        )

    def text(self) -> str:
        """For people."""
        error = self.total_bytes_error
        within = "unknown" if error is None else f"{error / 1e9:.3f}"
        return (
            f"{self.num_instances} instances were encoded: {self.kept_per_token:.1f} numbers a "
            f"position, {self.bytes_per_value:.2f} bytes each\n"
            f"a position: {self.bytes_per_token:.1f} bytes\n"
            f"the corpus: {self.total_tokens:,} positions, {self.total_bytes / 1e9:.3f} GB "
            f"(+- {within})\n"
            f"it takes about {self.total_seconds / 3600:.2f} hours with these ranks\n"
        )
