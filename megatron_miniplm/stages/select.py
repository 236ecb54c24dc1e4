"""`select`: scores of one corpus -> the subset whose instances have the highest keys."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_miniplm.core.config import to_flat
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.manifest import Parent, relative_path
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.scores import Scores
from megatron_miniplm.data.staging import with_suffix
from megatron_miniplm.data.subset import Link, write_subset
from megatron_miniplm.selection.diagnostics import describe
from megatron_miniplm.selection.inputs import ScoreNormalization, open_scores, selector_input
from megatron_miniplm.selection.registry import SELECTORS
from megatron_miniplm.selection.top_k import count_kept, top_k


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keep the instances of a corpus that a selector ranks highest, as a subset."""

    data_path: Path
    """Prefix of the scored corpus or subset (the pool)."""
    output_prefix: Path
    """Where to write the selected subset."""
    teacher_scores: Path | None = None
    """Folder of the teacher's scores of --data-path."""
    reference_scores: Path | None = None
    """Folder of the reference's scores of --data-path."""
    selector: str = "difference"
    """difference (MiniPLM: log p - log p_ref), teacher (log p), reference (-log p_ref), random."""
    selection_ratio: float = 0.5
    """Share of the instances to keep, above 0 and at most 1; the number is rounded down."""
    score_normalization: ScoreNormalization = "mean"
    """Score an instance by its mean (as released) or its sum (Eq. 4) over tokens, in nats."""
    min_tokens: int = 0
    """Never keep an instance with fewer scored tokens; the number kept stays the same."""
    seed: int = 1234
    """Seed of selectors that draw (random)."""
    link: Link = "relative"
    """How the subset refers to the corpus's .bin: relative or absolute symlink, or hard link."""
    materialize: bool = False
    """Copy the tokens instead of linking to them, for readers that slice and for object stores."""
    overwrite: bool = False
    """Replace a finished subset at --output-prefix."""


def run(config: Config) -> None:
    """Write the subset and print what was kept."""
    selector = SELECTORS[config.selector]
    count_kept(config.selection_ratio, 1)  # a wrong ratio is refused before anything is read
    corpus = Corpus.open(config.data_path)
    scores = open_scores(corpus, teacher=config.teacher_scores, reference=config.reference_scores)
    inputs = selector_input(corpus, scores, config.score_normalization, seed=config.seed)
    keys = selector(inputs)
    kept_number = count_kept(config.selection_ratio, len(corpus))
    rows = top_k(keys, kept_number, candidates=_long_enough(corpus, scores, config.min_tokens))
    facts = _settings(config) | describe(corpus, keys, rows, inputs)
    manifest_path = with_suffix(config.output_prefix, ".json")
    flags = {name: value for name, value in to_flat(config).items() if value is not None}
    del flags["overwrite"]  # not what is in the subset
    write_subset(
        corpus,
        rows,
        config.output_prefix,
        config=flags,
        selection=facts,
        extra_parents={
            f"{role}_scores": Parent(
                fingerprint=found.fingerprint, path=relative_path(found.path, manifest_path)
            )
            for role, found in scores.items()
        },
        link=config.link,
        materialize=config.materialize,
        overwrite=config.overwrite,
    )
    _print_summary(config.output_prefix, facts, len(corpus))


def _long_enough(corpus: Corpus, scores: Mapping[str, Scores], least: int) -> np.ndarray | None:
    """bool[N]: which instances have `least` scored tokens; None if that limits nothing."""
    if least <= 0:
        return None
    counts = next((found.num_tokens for found in scores.values()), corpus.lengths - 1)
    candidates = counts >= least
    if not candidates.any():
        raise ConfigError(f"no instance has --min-tokens {least}; the longest has {counts.max()}")
    return candidates


def _settings(config: Config) -> dict[str, Any]:
    return {
        "selector": config.selector,
        "ratio": config.selection_ratio,
        "score_normalization": config.score_normalization,
        "min_tokens": config.min_tokens,
        "seed": config.seed,
    }


def _print_summary(prefix: Path, facts: Mapping[str, Any], total: int) -> None:
    """The kept share of each domain, and the figures that tell a degenerate selection."""
    table = Table()
    for heading in ("domain", "instances", "kept", "share"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for name, domain in facts["domains"].items():
        table.add_row(
            name, f"{domain['instances']:,}", f"{domain['kept']:,}", f"{domain['share']:.3f}"
        )
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
    headline = f"{prefix}: {facts['num_kept']:,} of {total:,} instances kept"
    console.print(headline, soft_wrap=True, markup=False)
    console.print(table)
    lengths, ranks = facts["mean_length"], facts["spearman"]
    figures = {
        "threshold": facts["threshold"],
        "mean length kept": lengths["kept"],
        "mean length dropped": lengths["dropped"],
        "rank correlation with -log p_ref": ranks["reference_nll"],
        "rank correlation with log p": ranks["teacher_log_prob"],
        "variance of log p / of log p_ref": facts["variance_ratio"],
    }
    for name, value in figures.items():
        if value is not None:
            console.print(f"{name}: {value:.4g}")
