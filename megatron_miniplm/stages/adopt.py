"""``adopt``: Megatron's tokenised documents -> corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_miniplm.core.config import to_flat
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import read_manifest
from megatron_miniplm.data.adopt import adopt
from megatron_miniplm.data.documents import TokenizedDocuments
from megatron_miniplm.data.links import Link
from megatron_miniplm.data.staging import writing
from megatron_miniplm.data.tokenizers import TokenizerConfig
from megatron_miniplm.data.views import ViewConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Turn tokenised documents in Megatron's .bin/.idx files into a corpus of instances.

    No token is copied: the corpus's indices point into the .bin files, which must stay. The
    instances are those that preprocess makes of the same documents. Every document must end with
    the separator, as with Megatron-LM's --append-eod.
    """

    input: tuple[str, ...]
    """Prefixes of .bin/.idx pairs, as Megatron's --data-path takes them; each is one domain."""
    tokenizer: TokenizerConfig
    view: ViewConfig
    output_prefix: Path
    """The corpus to make: PREFIX.json and the files beside it."""
    domain: tuple[str, ...] = ()
    """Domain of each input, in their order; default: the inputs' names. May repeat."""
    link: Link = "relative"
    """How the corpus refers to the .bin files: relative or absolute symlink, or hard link."""
    overwrite: bool = False
    """Replace a finished corpus at that prefix."""

    def __post_init__(self) -> None:
        if not self.input:
            raise ConfigError("--input needs the prefix of at least one .bin/.idx pair")
        if self.domain and len(self.domain) != len(self.input):
            raise ConfigError(
                f"--domain has {len(self.domain)} names for {len(self.input)} inputs: give one "
                f"for each, or none"
            )
        if not all(self.domain):
            raise ConfigError("--domain has an empty name")


def run(config: Config) -> None:
    """Make the corpus; nothing is there unless it is complete."""
    documents = [TokenizedDocuments.open(prefix) for prefix in config.input]
    names = config.domain or [opened.prefix.name for opened in documents]
    flags = {name: value for name, value in to_flat(config).items() if value not in (None, [])}
    with writing(config.output_prefix):
        manifest = adopt(
            list(zip(names, documents, strict=True)),
            config.output_prefix,
            tokenizer=config.tokenizer.load(),
            view=config.view,
            config=flags,
            link=config.link,
            overwrite=config.overwrite,
        )
    content = read_manifest(manifest).content
    counts, packing = content["statistics"], content["statistics"]["packing"]
    dropped = packing["tokens_in"] - packing["tokens"]
    get_logger().info(
        "%s documents of %d prefixes, %s tokens -> %s instances; %s tokens dropped (%.2f %%), %s "
        "of them in tails; no token was copied: keep the .bin files",
        f"{counts['documents']:,}", len(documents), f"{packing['tokens_in']:,}",
        f"{content['num_instances']:,}", f"{dropped:,}", 100 * dropped / packing["tokens_in"],
        f"{packing['dropped_tail_tokens']:,}",
    )  # fmt: skip
    get_logger().info("corpus: %s", manifest)
