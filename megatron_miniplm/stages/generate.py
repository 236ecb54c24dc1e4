"""``generate``: corpus and teacher -> corpus of the teacher's continuations (SeqKD).

Data-parallel ranks take windows of 512 rows in turn; each is written when it is done, so a killed
job continues with the missing ones, under any number of ranks. Micro-batches are cut by rows alone
and draws depend on the seed, the instance id and the position, so the corpus is the same bytes for
any number of data-parallel ranks and any interruption.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import Progress, get_logger, progress
from megatron_miniplm.core.manifest import Parent, read_manifest
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.filling import FillConfig
from megatron_miniplm.data.generated import GenerationWriter, ShortInstances
from megatron_miniplm.data.staging import with_suffix
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.generate import Prompts, generate, refuse_layout
from megatron_miniplm.models.sampling import Sampler, SamplingConfig
from megatron_miniplm.models.weights import Weights, open_weights
from megatron_miniplm.parallel.topology import ParallelConfig, Topology, initialize, shutdown


@dataclass(frozen=True, kw_only=True)
class Config:
    """Continue the beginning of every instance with a model: the corpus that SeqKD trains on."""

    data_path: str
    """Prefix of the corpus or subset whose instances are continued."""
    load: str
    """Checkpoint of a run or of Megatron-LM, Hugging Face folder, or GGUF file."""
    output_prefix: Path
    """The corpus to make: PREFIX.json and the files beside it."""
    prompt_length: int = 768
    """Tokens of an instance that the model is given; it writes as many as the instance has more."""
    short_instances: ShortInstances = "fraction"
    """An instance without more tokens than that: fraction takes 3/4 of it as the prompt, copy
    leaves it as it is."""
    after_eos: Literal["stop", "continue"] = "stop"
    """When the model writes the separator: end the instance there, or let it go on with another
    document, so that the instance keeps its length."""
    micro_batch_size: int = 16
    """Instances that are continued together."""
    bf16: bool = False
    """Compute in bfloat16 (probabilities stay fp32); otherwise fp32."""
    instances_per_shard: int = 1_000_000
    """Instances in one .bin/.idx pair."""
    filling: FillConfig = field(default_factory=FillConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for name in ("prompt_length", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1"
                )
        refuse_layout(
            pp_size=self.parallel.pipeline_model_parallel_size,
            sequence_parallel=self.parallel.sequence_parallel,
        )


def run(config: Config) -> None:
    """Continue what is not continued yet; the corpus is there when every window is."""
    topology = initialize(config.parallel)
    try:
        _generate(config, topology)
    finally:
        shutdown()


def _generate(config: Config, topology: Topology) -> None:
    source = Corpus.open(config.data_path)
    source.refuse_to_be_replaced(config.output_prefix)
    weights = open_weights(Path(config.load))
    # Built first: a model that does not fit leaves no windows behind.
    model = weights.build(source, topology, torch.bfloat16 if config.bf16 else torch.float32)
    writer = _open_writer(config, topology, source, weights)
    mine = config.filling.windows(writer, topology)
    rows = sum(len(writer.rows(number)) for number in mine)
    with progress("generate (this rank)", rows, "instances") as bar:
        for number in mine:
            started = time.monotonic()
            instances = _continue_window(config, source, model, writer, number, bar)
            if topology.tp_rank == 0:
                writer.write_window(number, instances)
            _say_rate(writer, number, instances, time.monotonic() - started)
    if config.filling.finish(writer, topology):
        _say_counts(writer)


def _open_writer(
    config: Config, topology: Topology, source: Corpus, weights: Weights
) -> GenerationWriter:
    """Rank 0 makes the folder of windows, then the others join it."""
    fingerprint = weights.shared_fingerprint(topology)
    manifest = with_suffix(config.output_prefix, ".json")
    parents = {
        "source": source.as_parent(manifest),
        "model": Parent.of(fingerprint, weights.path, named_in=manifest),
    }
    identity = {
        "model": fingerprint,
        "after_eos": config.after_eos,
        "micro_batch_size": config.micro_batch_size,
        "bf16": config.bf16,
        "tensor_model_parallel_size": topology.tp_size,
        **asdict(config.sampling),
    }

    def make() -> GenerationWriter:
        return GenerationWriter(
            config.output_prefix, source=source, prompt_length=config.prompt_length,
            short_instances=config.short_instances, identity=identity, parents=parents,
            instances_per_shard=config.instances_per_shard, overwrite=config.filling.overwrite,
        )  # fmt: skip

    made: list[GenerationWriter] = []
    topology.from_rank0(lambda: made.append(make()))
    return made[0] if made else make()


def _continue_window(
    config: Config,
    source: Corpus,
    model: ModelChunks,
    writer: GenerationWriter,
    number: int,
    bar: Progress,
) -> list[np.ndarray]:
    """The instances of a window, in the order of its rows."""
    rows = writer.rows(number)
    done: dict[int, np.ndarray] = {}
    sampler = Sampler(config.sampling)
    for batch in _batches(writer, rows, config.micro_batch_size):
        prompts = Prompts(
            tokens=[source.tokens(row)[: writer.prompts[row]] for row in batch.tolist()],
            ids=source.ids[batch],
            limits=source.lengths[batch].astype(np.int64),
        )
        stop_id = source.eod_id if config.after_eos == "stop" else None
        found = generate([model], prompts, sampler, stop_id=stop_id)
        tokens, lengths = found.tokens_bs.cpu().numpy(), found.lengths_b.tolist()
        for row, ids, length in zip(batch.tolist(), tokens, lengths, strict=True):
            done[row] = ids[:length]
        bar.advance(len(batch))
    return [done[row] for row in rows.tolist()]


def _batches(writer: GenerationWriter, rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Rows of a window with prompts of like lengths together."""
    order = np.lexsort((rows, writer.source.lengths[rows], writer.prompts[rows]))
    for start in range(0, len(rows), size):
        yield rows[order[start : start + size]]


def _say_rate(
    writer: GenerationWriter, number: int, instances: list[np.ndarray], seconds: float
) -> None:
    written = sum(map(len, instances)) - int(writer.prompts[writer.rows(number)].sum())
    get_logger().info(
        "window %d: %s tokens written, %s tokens/s on this rank",
        number, f"{written:,}", f"{written / max(seconds, 1e-9):,.0f}",
    )  # fmt: skip


def _say_counts(writer: GenerationWriter) -> None:
    counts = read_manifest(writer.path).content["statistics"]
    get_logger().info(
        "%s instances: %s tokens of prompts, %s written; %s ended early, %s were short",
        *(f"{counts[name]:,}" for name in ("instances", "prompt_tokens", "generated_tokens",
                                           "ended_early", "short_instances")),
    )  # fmt: skip
    get_logger().info("corpus: %s", writer.path)
