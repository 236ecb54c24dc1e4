"""``retokenize``: corpus or subset -> corpus in another tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_miniplm.core.config import to_flat
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import read_manifest
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.retokenize import BrokenCharacters, Retokenizer
from megatron_miniplm.data.staging import with_suffix, writing
from megatron_miniplm.data.tokenizers import TokenizerConfig
from megatron_miniplm.data.writer import CorpusWriter


@dataclass(frozen=True, kw_only=True)
class Config:
    """Turn the instances of a corpus or subset into another tokenizer's: a new corpus.

    Scores belong to the tokenizer that they were made with: select first, retokenize what is kept.
    """

    data_path: Path
    """Prefix of the corpus or subset."""
    tokenizer: TokenizerConfig
    output_prefix: Path
    """The corpus to make: PREFIX.json and the files beside it."""
    seq_length: int | None = None
    """Inputs of an instance, in tokens; default: as many as in the source."""
    repack: bool = True
    """Pack the text of each domain anew, nothing is cut off; --no-repack: row i from row i."""
    end_fragments: bool = True
    """With --repack, put a separator after an instance that stops inside a document, unless the
    source's next instance of its domain continues it."""
    flush_tails: bool = True
    """With --repack, keep what is left of each domain at the end as a last, shorter instance."""
    broken_characters: BrokenCharacters = "replace"
    """Parts of a character at the edge of an instance: replace by U+FFFD, or drop."""
    workers: int | None = None
    """Threads that encode; default: all cores. They do not change the result."""
    instances_per_shard: int = 1_000_000
    """Instances in one .bin/.idx pair."""
    overwrite: bool = False
    """Replace a finished corpus at that prefix."""

    def __post_init__(self) -> None:
        for name in ("workers", "seq_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")


def run(config: Config) -> None:
    """Make the corpus; nothing is there unless it is complete."""
    source = Corpus.open(config.data_path)
    source.refuse_to_be_replaced(config.output_prefix)
    tokenizer = config.tokenizer.load(workers=config.workers)
    tokenizer.load_ahead()
    seq_length = config.seq_length or source.seq_length
    flags = {name: value for name, value in to_flat(config).items() if value is not None}
    retokenizer = Retokenizer(
        source, tokenizer, seq_length=seq_length, broken=config.broken_characters
    )
    with (
        writing(config.output_prefix),
        CorpusWriter(
            config.output_prefix,
            tokenizer=tokenizer,
            seq_length=seq_length,
            config=flags,
            parents={"source": source.as_parent(with_suffix(config.output_prefix, ".json"))},
            instances_per_shard=config.instances_per_shard,
            overwrite=config.overwrite,
        ) as writer,
    ):
        statistics = (
            retokenizer.repack(
                writer, end_fragments=config.end_fragments, flush_tails=config.flush_tails
            )
            if config.repack
            else retokenizer.one_to_one(writer)
        )
        manifest = writer.finish(source.domain_names, statistics)
    _log(manifest)


def _log(manifest: Path) -> None:
    counts = read_manifest(manifest).content["statistics"]
    get_logger().info(
        "%s instances, %s tokens, %s bytes of text -> %s instances, %s tokens, %s bytes",
        *(
            f"{counts[name]:,}"
            for name in ("source_instances", "source_tokens", "source_text_bytes", "instances",
                         "packed_tokens", "packed_text_bytes")
        ),
    )  # fmt: skip
    for name, what in _LOSSES.items():
        if counts[name]:
            get_logger().warning("%s %s", f"{counts[name]:,}", what)
    get_logger().info("corpus: %s", manifest)


_LOSSES = {
    "broken_characters": "parts of characters, mostly at the edges of instances, are no UTF-8",
    "special_tokens": "special tokens were left out: they stand for no text",
    "separators_in_text": "separators are spelled out in the text and became separators",
    "added_separators": "separators were put after text that stops inside a document",
    "truncated_tokens": "tokens were cut off instances that are too long in this tokenizer",
    "padded_instances": "instances had fewer than 2 tokens; separators fill them up",
}
