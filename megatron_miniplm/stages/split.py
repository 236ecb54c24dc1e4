"""`split`: a corpus -> the reference's training data, the pool, and maybe a held-out part."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_miniplm.core.config import to_flat
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.links import Link
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.selection.split import split_rows


@dataclass(frozen=True, kw_only=True)
class Config:
    """Split a corpus into disjoint, seeded subsets; together they are the whole corpus."""

    data_path: Path
    """Prefix of the corpus, or of a subset of one."""
    reference_fraction: float
    """Share of the instances that the reference model is trained on, above 0 and below 1."""
    reference_prefix: Path
    """Where to write the reference's subset."""
    pool_prefix: Path
    """Where to write the rest: what is scored and selected from."""
    heldout_fraction: float = 0.0
    """Share of the instances kept out of both, for validation; 0 for none."""
    heldout_prefix: Path | None = None
    """Where to write the held-out subset; goes with --heldout-fraction."""
    seed: int = 1234
    """Seed of the draw. An instance's lot depends on the seed and its id alone."""
    link: Link = "relative"
    """How a subset refers to the corpus's .bin: relative or absolute symlink, or hard link."""
    overwrite: bool = False
    """Replace finished subsets at these prefixes."""


def run(config: Config) -> None:
    """Write the two or three subsets; the same command again completes what is missing."""
    prefixes = _prefixes(config)
    corpus = Corpus.open(config.data_path)
    parts = split_rows(
        corpus.ids,
        reference_fraction=config.reference_fraction,
        heldout_fraction=config.heldout_fraction,
        seed=config.seed,
    )
    flags = {name: value for name, value in to_flat(config).items() if value is not None}
    del flags["overwrite"]  # not what is in the subsets
    for part, prefix in prefixes.items():
        rows: np.ndarray = getattr(parts, part)
        facts = {"selector": "split", "part": part, "seed": config.seed, "num_kept": len(rows)}
        write_subset(
            corpus,
            rows,
            prefix,
            config=flags,
            selection=facts,
            link=config.link,
            overwrite=config.overwrite,
        )
        tokens = int(corpus.lengths[rows].sum(dtype=np.int64))
        get_logger().info(
            "%s: %s instances, %s tokens at %s", part, f"{len(rows):,}", f"{tokens:,}", prefix
        )


def _prefixes(config: Config) -> dict[str, Path]:
    """Part -> prefix; refuses two parts at one place and half of the held-out flags."""
    prefixes = {"reference": config.reference_prefix, "pool": config.pool_prefix}
    if (config.heldout_prefix is None) != (config.heldout_fraction == 0):
        raise ConfigError(
            f"--heldout-fraction {config.heldout_fraction} and --heldout-prefix "
            f"{config.heldout_prefix} go together: give both or neither"
        )
    if config.heldout_prefix is not None:
        prefixes["heldout"] = config.heldout_prefix
    places = [os.path.realpath(path) for path in (config.data_path, *prefixes.values())]
    if len(set(places)) < len(places):
        raise ConfigError(
            f"the corpus and its parts need different prefixes, but got {', '.join(places)}"
        )
    return prefixes
