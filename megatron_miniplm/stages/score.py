"""``score``: what one model thinks of every instance of a corpus or subset.

Data-parallel ranks take windows of 4,096 rows in turn; each window is written when it is done, so
a killed job continues with the missing ones, under any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megatron_miniplm.core.config import write_run
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import Parent, relative_path
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.filling import FillConfig
from megatron_miniplm.data.scores import ScoreWriter
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.weights import Weights, open_weights
from megatron_miniplm.objectives.lm import score_rows
from megatron_miniplm.parallel.topology import ParallelConfig, Topology, initialize, shutdown


@dataclass(frozen=True, kw_only=True)
class Config:
    """Score every instance: sum of negative log-likelihood (nats) and number of tokens."""

    data_path: str
    """Prefix of the corpus or subset to score."""
    load: str
    """Checkpoint of a run or of Megatron-LM, Hugging Face folder, or GGUF file."""
    output: str
    """Folder of the scores."""
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
    weights = open_weights(Path(config.load))
    # Built first: a model that does not fit leaves no journal behind.
    model = weights.build(corpus, topology, torch.bfloat16 if config.bf16 else torch.float32)
    writer = _open_writer(config, topology, corpus, weights)

    def score(number: int) -> None:
        _score_window(config, topology, corpus, model, writer, number)

    config.filling.fill(writer, topology, "score", score)
    if config.filling.finish(writer, topology):
        write_run(Path(config.output) / "run.json", "score", config)
        get_logger().info("scores of %s instances in %s", f"{len(corpus):,}", config.output)


def _score_window(
    config: Config,
    topology: Topology,
    corpus: Corpus,
    model: ModelChunks,
    writer: ScoreWriter,
    number: int,
) -> None:
    rows = np.asarray(writer.rows(number), dtype=np.int64)
    scored = score_rows(model, corpus, rows, micro_batch_size=config.micro_batch_size)
    if scored is not None and topology.tp_rank == 0:
        sums, counts = scored
        writer.write_window(number, sums.astype(np.float32), counts.astype(np.int32))


def _open_writer(
    config: Config, topology: Topology, corpus: Corpus, weights: Weights
) -> ScoreWriter:
    fingerprint = weights.shared_fingerprint(topology)
    identity = {
        "model": fingerprint,
        "bf16": config.bf16,
        "micro_batch_size": config.micro_batch_size,
        "tensor_model_parallel_size": topology.tp_size,
    }
    output = Path(config.output)
    role = Parent(
        fingerprint=fingerprint, path=relative_path(weights.path, output / "manifest.json")
    )

    def make(overwrite: bool) -> ScoreWriter:
        return ScoreWriter(
            output, corpus=corpus, config=identity, parents={"model": role},
            model={"path": str(weights.path), "family": weights.config.model_family},
            overwrite=overwrite,
        )  # fmt: skip

    return config.filling.open(make, topology)
