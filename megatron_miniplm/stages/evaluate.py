"""``evaluate``: losses of a model on held-out corpora.

Three numbers, because each answers another question: the mean over instances of per-instance means
(what the paper reports), the mean over all tokens, and bits per byte, which compares models with
different tokenizers.

    bits per byte = sum of NLL over scored tokens / ln 2 / bytes that those tokens stand for

Or of a proxy's predictions: how well they stand for exact scores (`evaluation.proxy`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_miniplm.core.config import print_json, to_flat
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import provenance, write_json
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import training_mask
from megatron_miniplm.evaluation.proxy import ProxyConfig, judge_proxy
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.objectives.lm import LossSummary, summarize_rows
from megatron_miniplm.parallel.topology import ParallelConfig, initialize, shutdown


@dataclass(frozen=True, kw_only=True)
class Config:
    """Evaluate a model: language-modeling loss on held-out corpora; or a proxy's predictions."""

    load: str | None = None
    """Checkpoint of a run or of Megatron-LM, Hugging Face folder, or GGUF file."""
    lm_loss: tuple[str, ...] = ()
    """Prefixes of held-out corpora or subsets."""
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    output: str | None = None
    """Folder for results.json; default: print only."""
    micro_batch_size: int = 16
    """Instances of one forward pass."""
    bf16: bool = False
    """Compute in bfloat16; otherwise fp32."""
    max_instances: int | None = None
    """Use the first so many instances of each corpus; default: all."""
    overwrite: bool = False
    """Replace results.json."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "max_instances"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.proxy == ProxyConfig() and not (self.load and self.lm_loss):
            raise ConfigError("give --load and --lm-loss (a model), or --proxy-scores (a proxy)")
        if self.proxy != ProxyConfig() and (self.load or self.lm_loss):
            raise ConfigError(
                "--load and --lm-loss judge a model, and the flags beside them a proxy's "
                "predictions: run `evaluate` for each"
            )


def run(config: Config) -> None:
    """Print the answer as JSON on stdout, and write OUTPUT/results.json."""
    target = Path(config.output) / "results.json" if config.output else None
    if target is not None and target.exists() and not config.overwrite:
        raise ConfigError(f"{target} exists: pass --overwrite or another --output")
    if config.load is None:
        _publish(config, target, {"proxy": judge_proxy(config.proxy)})
        return
    topology = initialize(config.parallel)
    try:
        weights = open_weights(Path(config.load))
        losses: dict[str, Any] = {}
        for prefix in config.lm_loss:
            corpus = Corpus.open(prefix)
            dtype = torch.bfloat16 if config.bf16 else torch.float32
            model = weights.build(corpus, topology, dtype)
            rows = np.arange(min(len(corpus), config.max_instances or len(corpus)))
            summary = summarize_rows(
                model, corpus, rows, micro_batch_size=config.micro_batch_size, topology=topology
            )
            losses[prefix] = _row(summary, corpus, rows)
            get_logger().info("%s: %s", prefix, losses[prefix])
        results = {
            "model": {
                "path": str(weights.path),
                "fingerprint": weights.shared_fingerprint(topology),
            },
            "lm_loss": losses,
        }
        if topology.rank == 0:
            _publish(config, target, results)
    finally:
        shutdown()


def _publish(config: Config, target: Path | None, results: dict[str, Any]) -> None:
    print_json(results)
    if target is not None:
        write_json(target, {**results, "config": to_flat(config), **provenance()})


def _row(summary: LossSummary, corpus: Corpus, rows: np.ndarray) -> dict[str, Any]:
    num_bytes = scored_bytes(corpus, rows)
    nats = summary.token_mean * summary.num_tokens
    return {
        **asdict(summary),
        "perplexity": math.exp(summary.token_mean),
        "num_bytes": num_bytes,
        "bits_per_byte": nats / math.log(2) / max(num_bytes, 1),
        "corpus": corpus.fingerprint,
    }


def scored_bytes(corpus: Corpus, rows: np.ndarray) -> int:
    """Bytes that the scored target tokens of `rows` stand for; a separator stands for none."""
    sizes = np.array([len(text) for text in corpus.tokenizer().token_bytes()], dtype=np.int64)
    sizes[corpus.eod_id] = 0
    total = 0
    for row in rows:
        ids = torch.from_numpy(corpus.tokens(int(row)).astype(np.int64))
        mask = training_mask(ids[None, :-1], torch.tensor([len(ids) - 1]), eod_id=corpus.eod_id)[0]
        total += int(sizes[ids[1:][mask].numpy()].sum())
    return total
