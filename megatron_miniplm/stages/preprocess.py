"""``preprocess``: text -> corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_miniplm.core.config import to_flat
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.data.packing import PackingConfig
from megatron_miniplm.data.preprocess import Preprocessor
from megatron_miniplm.data.text import TextConfig, TextReader
from megatron_miniplm.data.tokenizers import TokenizerConfig
from megatron_miniplm.data.writer import CorpusWriter


@dataclass(frozen=True, kw_only=True)
class Config:
    """Turn JSONL text into a corpus: instances packed at sentence ends, one domain each.

    No BOS token is added, for any family.
    """

    text: TextConfig
    tokenizer: TokenizerConfig
    packing: PackingConfig
    output_prefix: Path
    """The corpus to make: PREFIX.json and the files beside it."""
    workers: int | None = None
    """Threads that encode; default: all cores. They do not change the result."""
    instances_per_shard: int = 1_000_000
    """Instances in one .bin/.idx pair."""
    overwrite: bool = False
    """Replace a finished corpus at that prefix."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers {self.workers} must be at least 1")


def run(config: Config) -> None:
    """Make the corpus; nothing is there unless it is complete."""
    reader = TextReader(config.text)
    tokenizer = config.tokenizer.load(workers=config.workers)
    flags = {name: value for name, value in to_flat(config).items() if value is not None}
    with CorpusWriter(
        config.output_prefix,
        tokenizer=tokenizer,
        seq_length=config.packing.seq_length,
        config=flags,
        instances_per_shard=config.instances_per_shard,
        overwrite=config.overwrite,
    ) as writer:
        manifest = Preprocessor(tokenizer, config.packing, writer).run(reader)
    get_logger().info("corpus: %s", manifest)
