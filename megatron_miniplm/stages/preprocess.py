"""``preprocess``: text -> corpus."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_miniplm.core.config import to_flat
from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import read_manifest
from megatron_miniplm.data.packing import PackingConfig
from megatron_miniplm.data.parts import Made, PartStore, deal, this_rank
from megatron_miniplm.data.preprocess import Preprocessor, log_statistics, refuse_empty
from megatron_miniplm.data.shards import ShardWriter
from megatron_miniplm.data.sources import expand_inputs
from megatron_miniplm.data.staging import Staging
from megatron_miniplm.data.text import TextConfig, TextReader
from megatron_miniplm.data.tokenizers import Tokenizer, TokenizerConfig
from megatron_miniplm.data.writer import CorpusWriter, commit_corpus


@dataclass(frozen=True, kw_only=True)
class Config:
    """Turn text into a corpus: instances packed at sentence ends, one domain each.

    No BOS token is added, for any family. Under torchrun or srun every process makes the parts that
    fall to it (see --num-parts), and the last one to finish joins them.
    """

    text: TextConfig
    tokenizer: TokenizerConfig
    packing: PackingConfig
    output_prefix: Path
    """The corpus to make: PREFIX.json and the files beside it."""
    workers: int | None = None
    """Threads that encode; default: all cores. They do not change the result."""
    num_parts: int | None = None
    """Parts that the input files are dealt to, packed apart and resumable; default: processes."""
    instances_per_shard: int = 1_000_000
    """Instances in one .bin/.idx pair."""
    overwrite: bool = False
    """Replace a finished corpus at that prefix (one process only)."""

    def __post_init__(self) -> None:
        for flag, value in (("--workers", self.workers), ("--num-parts", self.num_parts)):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} {value} must be at least 1")


def run(config: Config) -> None:
    """Make the corpus; nothing opens unless it is complete, complete parts are kept."""
    rank, size = this_rank()
    count = config.num_parts or size
    flags = {name: value for name, value in to_flat(config).items() if value is not None}
    try:
        if count == size == 1:
            _make_whole(config, flags)
        else:
            _make_parts(config, flags | {"num_parts": count}, range(rank, count, size), size)
    except OSError as error:
        raise DataError(f"cannot make {config.output_prefix}: {error}") from error


def _make_whole(config: Config, flags: Mapping[str, Any]) -> None:
    reader = TextReader(config.text)
    tokenizer = config.tokenizer.load(workers=config.workers)
    tokenizer.load_ahead()
    with CorpusWriter(
        config.output_prefix,
        tokenizer=tokenizer,
        seq_length=config.packing.seq_length,
        config=flags,
        instances_per_shard=config.instances_per_shard,
        overwrite=config.overwrite,
    ) as writer:
        names, statistics = Preprocessor(tokenizer, config.packing, writer).run(reader)
        refuse_empty(statistics, config.packing)
        manifest = writer.finish(names, statistics)
    log_statistics(statistics)
    get_logger().info("corpus: %s", manifest)


def _make_parts(config: Config, flags: Mapping[str, Any], numbers: range, size: int) -> None:
    """Make the parts with these numbers, and join all if they were the last ones."""
    files = deal(expand_inputs(config.text.input), flags["num_parts"])
    if _finished(config, flags, size):
        return
    tokenizer = config.tokenizer.load(workers=config.workers)
    tokenizer.load_ahead()
    store = PartStore(config.output_prefix, files, [_decisive(flags), tokenizer.fingerprint])
    for number in numbers:
        store.make(number, partial(_make_part, config, tokenizer, files[number]))

    def commit(made: Made) -> Path:
        names, statistics = made.result
        refuse_empty(statistics, config.packing)
        with Staging(config.output_prefix, kind="corpus", overwrite=config.overwrite) as staging:
            manifest = commit_corpus(
                staging,
                made.drafts,
                tokenizer=tokenizer,
                seq_length=config.packing.seq_length,
                config=flags,
                domain_names=names,
                statistics=statistics,
            )
        log_statistics(statistics)
        return manifest

    manifest = store.join(commit)
    if manifest is None:
        get_logger().info("parts done; another process joins them when the last one is complete")
    else:
        get_logger().info("corpus: %s", manifest)


def _make_part(config: Config, tokenizer: Tokenizer, files: list[str], folder: Path) -> Made:
    shards = ShardWriter(
        folder,
        vocab_size=tokenizer.vocab_size,
        seq_length=config.packing.seq_length,
        instances_per_shard=config.instances_per_shard,
    )
    try:
        result = Preprocessor(tokenizer, config.packing, shards).run(TextReader(config.text, files))
        return Made(shards.finish(), result)
    finally:
        shards.close()


def _finished(config: Config, flags: Mapping[str, Any], size: int) -> bool:
    """Whether other processes of this run made the corpus already; refuses any other artifact.

    A process that starts late, in a resumed run whose parts were all complete, finds it joined.
    """
    if config.overwrite and size > 1:
        raise ConfigError(
            f"--overwrite with {size} processes: they cannot agree on when the old corpus went; "
            f"remove {config.output_prefix} first"
        )
    path = config.output_prefix.with_name(config.output_prefix.name + ".json")
    if config.overwrite or not path.exists():
        return False
    if size > 1 and _decisive(read_manifest(path).config) == _decisive(flags):
        get_logger().info("corpus: %s is complete already", path)
        return True
    raise ConfigError(
        f"{config.output_prefix} is finished already ({path} exists): choose another prefix, or "
        "pass --overwrite to replace it"
    )


def _decisive(flags: Mapping[str, Any]) -> Any:
    """The flags that decide what is in a corpus, as JSON gives them back."""
    kept = {
        name: value
        for name, value in flags.items()
        if value is not None and name not in ("workers", "overwrite", "output_prefix")
    }
    return json.loads(json.dumps(kept, default=str))
