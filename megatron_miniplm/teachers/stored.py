"""A teacher that was asked before: its likeliest next tokens, or hidden states, read from a disk.

A store answers by instance id, so micro-batches, ranks, order, epochs and resumes are free, and
several corpora have a store each. Reading and decoding are done by the loader's threads, with the
batch itself; the last pipeline stage alone reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_miniplm.core.errors import ConfigError, LineageError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import Manifest
from megatron_miniplm.data.blend import Source
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.hidden_codec import (
    HiddenEncoding,
    HiddenStates,
    decode_hidden,
    encode_hidden,
)
from megatron_miniplm.data.instances import PADDING_ROW, Batch, make_batch
from megatron_miniplm.data.logit_codec import decode
from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.data.sparse_logits import COLUMNS, PaddedLogits, pad
from megatron_miniplm.models.signal import SignalFacts, TeacherSignal
from megatron_miniplm.models.weights import Weights
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import Topology
from megatron_miniplm.teachers.hidden_states import OutputMatrix, spread, teacher_of
from megatron_miniplm.teachers.teacher import TEACHERS, Ahead, Ask, Lesson, Signals, Teacher

_FLAG = "--logits-path"


@dataclass(frozen=True, kw_only=True)
class StoredConfig:
    """A teacher whose opinion was stored (--teacher stored)."""

    logits_path: tuple[str, ...] = ()
    """Folders that `cache-logits` filled: one for every corpus of --train-data-path, in any
    order."""
    logits_teacher: str = ""
    """Of stores of hidden states: the teacher that they are of, whose output matrix is needed;
    default: where the store says that it lies."""


@TEACHERS.register("stored")
class StoredTeacher(Teacher):
    """Logit stores, one for each source of the data."""

    Config = StoredConfig
    num_parameters = 0
    flops_per_token = 0.0

    def __init__(self, config: StoredConfig, lesson: Lesson) -> None:
        if not config.logits_path:
            raise ConfigError(f"--teacher stored needs {_FLAG}: folders that cache-logits filled")
        self.data = lesson.data
        opened = [RecordStore.open(path) for path in config.logits_path]
        self.stores = [_store_of(source, opened) for source in lesson.data.sources]
        for store in opened:
            if store not in self.stores:
                raise ConfigError(
                    f"{_FLAG} {store.path} is used by no corpus of --train-data-path: leave it out"
                )
        count = len(self.stores)
        self.parents = {
            f"logits {number} of {count}" if count > 1 else "logits": (s.fingerprint, s.path)
            for number, s in enumerate(self.stores, 1)
        }
        self.what = _common(self.stores, "what")
        self.facts = SignalFacts(stored=True)
        self.weights: Weights | None = None
        self.matrix: OutputMatrix | None = None
        if self.what == "logits":
            self.facts = _facts(self.stores)
            if config.logits_teacher:
                raise ConfigError(
                    f"--logits-teacher {config.logits_teacher} has no effect on stores of logits, "
                    "only of hidden states: leave it out"
                )
        else:
            _common(self.stores, "teacher")
            _common(self.stores, "encoding")
            self.weights = teacher_of(self.stores[0], config.logits_teacher, lesson.layout)
            encoding = HiddenEncoding(**self.stores[0].manifest.config["encoding"])
            none = torch.zeros(0, self.weights.config.hidden_size)
            self.no_states = decode_hidden(encode_hidden(none, encoding).payload)
        self.width, self.dtype = lesson.student.padded_vocab_size, lesson.dtype
        self.beside = self._memory()
        self.reads = True

    def verify(self) -> None:
        """Read the first instance of every source, and the teacher of hidden states.

        Sizes were checked, and records have checksums.
        """
        if self.weights is not None:
            self.weights.verify()
        start = 0
        for source in self.data.sources:
            self.read_ahead(make_batch(self.data, [start], length=self.data.language.seq_length))
            start += len(source.corpus)

    def load(self, topology: Topology) -> None:
        """Only the last pipeline stage has a loss."""
        self.reads = topology.is_last_stage
        if self.weights is not None:
            self.weights.check_files(topology)
        if self.weights is not None and self.reads:
            self.matrix = OutputMatrix(
                self.weights, topology, width=self.width, dtype=self.dtype,
                valid=self.data.language.vocab_size,
            )  # fmt: skip
        for store in dict.fromkeys(self.stores):
            content = store.manifest.content
            get_logger().info(
                "stored teacher %s (%s): %s instances, %s trained positions, %.1f bytes each",
                store.path, store.fingerprint, f"{len(store):,}", f"{content['num_tokens']:,}",
                content["bytes_per_token"],
            )  # fmt: skip

    def _memory(self) -> Signals:
        """What is stored of a token, and what the loss makes of it."""
        if self.weights is None:
            # Ids and log-probs, then ids and weights in the order of the loss, 4 bytes each.
            entries = 16 * max(_most_kept(store.manifest) for store in self.stores)
            columns = 4 * (len(COLUMNS) + len(self.facts.temperatures))
            return Signals(token_bytes=entries + columns, dtype=self.dtype)
        width, states = self.weights.config.hidden_size, self.no_states
        stored = width * states.numbers.element_size() + (0 if states.scale is None else 4)
        # Beside them in the type of the matrix, and that in Megatron's order.
        return Signals(
            token_bytes=stored + 2 * width * self.dtype.itemsize, matrix_width=width,
            dtype=self.dtype,
        )  # fmt: skip

    def read_ahead(self, batch: Batch) -> PaddedLogits | HiddenStates | None:
        """What is stored of each instance; DataError names one that is missing or damaged."""
        if not self.reads:
            return None
        rows = batch.rows_b.numpy()
        found: list[Any] = [None] * len(rows)
        there = np.flatnonzero(rows != PADDING_ROW)
        sources, own_rows = self.data.locate(rows[there])
        for number in np.unique(sources):
            mine = sources == number
            ids = _ids(self.data.sources[number].corpus, own_rows[mine])
            for at, payload in zip(there[mine], self.stores[number].read(ids), strict=True):
                found[at] = decode(payload) if self.what == "logits" else decode_hidden(payload)
        mask_bs = self.data.whole_mask(batch)
        if self.what == "logits":
            return pad(mask_bs, found)
        return spread(mask_bs, found, like=self.no_states)

    def __call__(self, batches: Sequence[Batch], ahead: Sequence[Ahead | None]) -> list[Ask]:
        """What was read ahead, moved when it is asked for; hidden states with the output matrix."""
        return [partial(self._signal, each) for each in ahead]

    def _signal(self, read: Ahead | None) -> TeacherSignal | None:
        if isinstance(read, HiddenStates) and self.matrix is not None:
            return self.matrix.head(read.to(platform.device()))
        return read.to(platform.device()) if isinstance(read, PaddedLogits) else None


def _store_of(source: Source, stores: Sequence[RecordStore]) -> RecordStore:
    """The store of a source; refuses what is of another corpus, tokenizer or vocabulary."""
    corpus = source.corpus
    of_root = [store for store in stores if store.root_fingerprint == corpus.root_fingerprint]
    if not of_root:
        there = ", ".join(f"{store.path} is of {store.root_fingerprint}" for store in stores)
        raise LineageError(
            f"{_FLAG} has no logits of {corpus.prefix}, whose root corpus is "
            f"{corpus.root_fingerprint}: {there}; add the store of that corpus, or cache its logits"
        )
    short = []
    for store in of_root:
        _check_language(store, corpus)
        missing = next(_missing(store, corpus), None)
        if missing is None:
            return store
        short.append(f"{store.path} has no instance {missing}")
    raise LineageError(
        f"{_FLAG} has not all instances of {corpus.prefix}: {'; '.join(short)}. Cache the logits "
        "of all that is trained on, or train on the subset that was cached (`select --selector "
        "stored` makes it)"
    )


def _check_language(store: RecordStore, corpus: Corpus) -> None:
    content = store.manifest.content
    for what, theirs, ours in (
        ("tokenizer", content["tokenizer_fingerprint"],
         corpus.manifest.content["tokenizer"]["fingerprint"]),
        ("vocabulary size", content["vocab_size"], corpus.vocab_size),
    ):  # fmt: skip
        if theirs != ours:
            raise LineageError(
                f"{store.path} has {what} {theirs}, but {corpus.prefix} has {ours}: cache the "
                "logits of a teacher with the corpus's tokenizer"
            )


def _missing(store: RecordStore, corpus: Corpus) -> Iterator[int]:
    """Instances of the corpus that the store does not hold."""
    if store.corpus_fingerprint == corpus.fingerprint and len(store) == len(corpus):
        return
    for start in range(0, len(corpus), 1 << 20):
        ids = _ids(corpus, np.arange(start, min(start + (1 << 20), len(corpus))))
        yield from ids[store.find(ids) < 0].tolist()


def _ids(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """Root ids of some rows."""
    column = corpus.id_column
    return rows if column is None else np.asarray(column[rows])


def _common(stores: Sequence[RecordStore], name: str) -> str:
    """What all stores were made with; refuses stores that one loss cannot be right for."""
    found = {str(store.manifest.config[name]) for store in stores}
    if len(found) > 1:
        raise LineageError(
            f"{_FLAG}: the stores were made with {name} {' and '.join(sorted(found))}, and one "
            "loss cannot be right for both: cache them alike"
        )
    return found.pop()


def _most_kept(manifest: Manifest) -> int:
    """Entries of a position, at most."""
    config, vocab = manifest.config, int(manifest.content["vocab_size"])
    exact = 0 if config["sampling"] == "rs" else config["top_k"]
    if config.get("truncate") == "none":
        return vocab
    return min(vocab, exact + config.get("draws", 0) + config["force_gold"])


def _facts(stores: Sequence[RecordStore]) -> SignalFacts:
    """Of all stores of logits together."""
    sampling = _common(stores, "sampling")
    contents = [store.manifest.content for store in dict.fromkeys(stores)]
    positions = sum(content["num_tokens"] for content in contents)
    taus = [set(store.manifest.config["kd_temperatures"]) for store in stores]
    return SignalFacts(
        sparse=True,
        stored=True,
        temperatures=frozenset(set.intersection(*taus)),
        sampled=sampling != "topk",
        mean_logit_std=sum(c["mean_logit_std"] * c["num_tokens"] for c in contents)
        / max(positions, 1),
    )
