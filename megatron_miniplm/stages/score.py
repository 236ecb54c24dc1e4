"""``score``: what one model thinks of every instance of a corpus or subset.

A language model's likelihoods, or what a proxy predicts of the difference of two models' (--head
proxy).

Data-parallel ranks take windows of 4,096 rows in turn; each window is written when it is done, so
a killed job continues with the missing ones, under any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from megatron_miniplm.core.config import write_run
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import Parent
from megatron_miniplm.data.columns import ColumnWriter
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.filling import FillConfig
from megatron_miniplm.data.predictions import PredictionWriter
from megatron_miniplm.data.scores import ScoreWriter
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.value_head import TargetScale
from megatron_miniplm.models.weights import Weights, open_proxy, open_weights
from megatron_miniplm.objectives.lm import score_rows
from megatron_miniplm.objectives.regression import predict_rows
from megatron_miniplm.parallel.topology import ParallelConfig, Topology, initialize, shutdown


@dataclass(frozen=True, kw_only=True)
class Config:
    """Score every instance: sum of NLL (nats) and number of tokens, or what a proxy predicts."""

    data_path: str
    """Prefix of the corpus or subset to score."""
    load: str
    """Checkpoint of a run or of Megatron-LM, Hugging Face folder, or GGUF file."""
    output: str
    """Folder of the scores."""
    head: Literal["lm", "proxy"] = "lm"
    """What is asked: likelihoods (lm), or of a checkpoint of `pretrain --objective regression` its
    predictions (proxy)."""
    micro_batch_size: int = 16
    """Instances of one forward pass."""
    bf16: bool = False
    """Compute in bfloat16 (softmax and sums stay fp32/fp64); otherwise fp32."""
    filling: FillConfig = field(default_factory=FillConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ConfigError(f"--micro-batch-size {self.micro_batch_size} must be at least 1")


def run(config: Config) -> None:
    """Score what is not scored yet; the artifact is complete when every window is there."""
    topology = initialize(config.parallel)
    try:
        _score(config, topology)
    finally:
        shutdown()


def _score(config: Config, topology: Topology) -> None:
    corpus = Corpus.open(config.data_path)
    kind: type[ColumnWriter]
    ask: Callable[[ModelChunks, np.ndarray], Sequence[np.ndarray] | None]
    if config.head == "lm":
        weights, kind = open_weights(Path(config.load)), ScoreWriter
        ask = partial(_likelihoods, config, corpus)
    else:
        weights, scale = open_proxy(Path(config.load))
        kind, ask = PredictionWriter, partial(_predictions, config, corpus, scale)
    # Built first: a model that does not fit leaves no journal behind.
    model = weights.build(corpus, topology, torch.bfloat16 if config.bf16 else torch.float32)
    writer = _open_writer(kind, config, topology, corpus, weights)

    def score(number: int) -> None:
        said = ask(model, np.asarray(writer.rows(number), dtype=np.int64))
        if said is not None and topology.tp_rank == 0:
            writer.write_window(number, *said)

    config.filling.fill(writer, topology, "score", score)
    if config.filling.finish(writer, topology):
        write_run(Path(config.output) / "run.json", "score", config)
        get_logger().info("scores of %s instances in %s", f"{len(corpus):,}", config.output)


def _likelihoods(
    config: Config, corpus: Corpus, model: ModelChunks, rows: np.ndarray
) -> Sequence[np.ndarray] | None:
    return score_rows(model, corpus, rows, micro_batch_size=config.micro_batch_size)


def _predictions(
    config: Config, corpus: Corpus, scale: TargetScale, model: ModelChunks, rows: np.ndarray
) -> Sequence[np.ndarray] | None:
    found = predict_rows(model, corpus, rows, scale, micro_batch_size=config.micro_batch_size)
    return None if found is None else [found]


def _open_writer(
    kind: type[ColumnWriter], config: Config, topology: Topology, corpus: Corpus, weights: Weights
) -> ColumnWriter:
    fingerprint = weights.shared_fingerprint(topology)
    identity = {
        "model": fingerprint,
        "bf16": config.bf16,
        "micro_batch_size": config.micro_batch_size,
        "tensor_model_parallel_size": topology.tp_size,
    }
    output = Path(config.output)
    role = Parent.of(fingerprint, weights.path, named_in=output / "manifest.json")

    def make(overwrite: bool) -> ColumnWriter:
        return kind(
            output, corpus=corpus, config=identity, parents={"model": role},
            model={
                "path": str(weights.path), "family": weights.config.model_family,
                **({"targets": asdict(weights.targets)} if weights.targets else {}),
            },
            overwrite=overwrite,
        )  # fmt: skip

    return config.filling.open(make, topology)
