"""`select`: scores of one corpus -> the subset whose instances have the highest keys.

Or a logit store -> the subset of the instances that it has a record of.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_miniplm.core.config import to_flat
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import Parent, atomic_file
from megatron_miniplm.data.columns import ScoredColumns
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.links import Link
from megatron_miniplm.data.predictions import Predictions
from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.data.rows import RowMask
from megatron_miniplm.data.scores import ScoreNormalization, Scores
from megatron_miniplm.data.staging import with_suffix
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.evaluation.selection_plots import selection_overview
from megatron_miniplm.parallel.ranks import Ranks, join_ranks
from megatron_miniplm.selection.diagnostics import Tally, describe, tally
from megatron_miniplm.selection.inputs import open_predictions, open_scores, shard_columns
from megatron_miniplm.selection.key_source import KeySource
from megatron_miniplm.selection.quota import ratio_quota, token_quota
from megatron_miniplm.selection.registry import SELECTORS
from megatron_miniplm.selection.stored import STORED, stored_masks
from megatron_miniplm.selection.streaming import stream_top_k
from megatron_miniplm.selection.top_k import count_kept

_DEFAULT_RATIO = 0.5
_OF_STORED = ("logits_path", "first_update", "last_update")
_OF_ALL = ("data_path", "output_prefix", "selector", "link", "materialize", "overwrite")


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
    proxy_scores: Path | None = None
    """Folder of a proxy's predictions for --data-path."""
    selector: str = "difference"
    """difference (MiniPLM: log p - log p_ref), proxy (the same as a proxy predicts it), teacher
    (log p), reference (-log p_ref), random; or stored: all that --logits-path has a record of."""
    logits_path: Path | None = None
    """Of --selector stored: the logit store."""
    first_update: int | None = None
    """Of the store of a teacher in training: leave out what it saw last before this update."""
    last_update: int | None = None
    """And what it saw last after this one."""
    selection_ratio: float | None = None
    """Share of the instances to keep, above 0 and at most 1, rounded down; default: 0.5."""
    selection_tokens: int | None = None
    """Instead of a ratio: keep the highest-ranked instances that fit this many tokens."""
    stratify: Literal["domain"] | None = None
    """Keep the same share of each domain; default: rank all instances together."""
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
    plot: Path | None = None
    """PNG to draw: ranks, lengths and domains, kept against dropped."""
    overwrite: bool = False
    """Replace a finished subset at --output-prefix."""

    def __post_init__(self) -> None:
        known = sorted([*SELECTORS.names(), STORED])
        if self.selector not in known:
            raise ConfigError(f"unknown selector {self.selector!r}; known: {', '.join(known)}")
        if self.selection_ratio is not None and self.selection_tokens is not None:
            raise ConfigError(
                f"--selection-ratio {self.selection_ratio} and --selection-tokens "
                f"{self.selection_tokens}: give one of them"
            )
        if self.selector == STORED and self.logits_path is None:
            raise ConfigError(f"--selector {STORED} needs --logits-path: a logit store")
        first = 1 if self.first_update is None else self.first_update
        last = first if self.last_update is None else self.last_update
        if not 1 <= first <= last:
            raise ConfigError(
                f"--first-update {first} and --last-update {last}: updates count from 1, and the "
                "last one must not be before the first"
            )
        for each in fields(self):
            used = each.name in _OF_ALL or (each.name in _OF_STORED) == (self.selector == STORED)
            value = getattr(self, each.name)
            if not used and value != each.default:
                raise ConfigError(
                    f"--{each.name.replace('_', '-')} {value} has no effect on --selector "
                    f"{self.selector}: leave it out"
                )


def run(config: Config) -> None:
    """Write the subset and print what was kept; under torchrun, ranks share the shards."""
    with join_ranks() as ranks:
        if config.selector == STORED:
            _select_stored(config, ranks)
        else:
            _run(config, ranks)


def _run(config: Config, ranks: Ranks) -> None:
    selector = SELECTORS[config.selector]
    if config.selection_tokens is None:
        count_kept(_ratio(config), 1)  # a wrong ratio is refused before anything is read
    corpus, scores, predictions = ranks.own(lambda: _open(config))
    mine = ranks.share(len(corpus.shards))
    shards = shard_columns(corpus, scores, mine, predictions)
    read: dict[str, ScoredColumns] = {**scores}
    if predictions is not None:
        read["proxy"] = predictions
    domains, longest = corpus.domain_names, corpus.seq_length + 1
    source = KeySource(
        shards=shards,
        selector=selector,
        seed=config.seed,
        per_token=config.score_normalization == "mean",
        min_tokens=config.min_tokens,
        weigh_tokens=config.selection_tokens is not None,
        strata=domains if config.stratify else (),
    )
    every = tally(shards, None, num_domains=len(domains), longest=longest, ranks=ranks)
    found = stream_top_k(source, _quota(config, every), ranks=ranks)
    counts = tally(shards, found.masks, num_domains=len(domains), longest=longest, ranks=ranks)
    facts = _settings(config) | describe(source, found, counts, domains, ranks)
    masks = [mask for part in ranks.gather(found.masks) for mask in part]
    judges = {f"{role}_scores": each for role, each in read.items()}
    _write(config, corpus, masks, facts, judges, ranks)
    if ranks.rank == 0:
        if config.plot is not None:
            _draw(config.plot, facts, config.output_prefix.name)
        _print_summary(config.output_prefix, facts, len(corpus))


def _select_stored(config: Config, ranks: Ranks) -> None:
    corpus = ranks.own(lambda: Corpus.open(config.data_path))
    store = ranks.own(lambda: RecordStore.open(config.logits_path or ""))
    bounds = {"first_update": config.first_update, "last_update": config.last_update}
    masks = ranks.own(lambda: stored_masks(corpus, store, **bounds))
    kept = sum(mask.count() for mask in masks)
    facts = {"selector": STORED, "num_kept": kept, **bounds}
    _write(config, corpus, masks, facts, {"logits": store}, ranks)
    if ranks.rank == 0:
        get_logger().info(
            "%s: %s of %s instances kept", config.output_prefix, f"{kept:,}", f"{len(corpus):,}"
        )


def _write(
    config: Config,
    corpus: Corpus,
    masks: Sequence[RowMask],
    facts: Mapping[str, Any],
    judges: Mapping[str, ScoredColumns | RecordStore],
    ranks: Ranks,
) -> None:
    """The subset; its lineage names the `judges` by role."""
    manifest_path = with_suffix(config.output_prefix, ".json")
    flags = {name: value for name, value in to_flat(config).items() if value is not None}
    for name in ("overwrite", "plot"):  # not what is in the subset
        flags.pop(name, None)
    write_subset(
        corpus,
        masks,
        config.output_prefix,
        config=flags,
        selection=facts,
        extra_parents={
            role: Parent.of(judge.fingerprint, judge.path, named_in=manifest_path)
            for role, judge in judges.items()
        },
        link=config.link,
        materialize=config.materialize,
        overwrite=config.overwrite,
        ranks=ranks,
    )


def _open(config: Config) -> tuple[Corpus, dict[str, Scores], Predictions | None]:
    corpus = Corpus.open(config.data_path)
    scores = open_scores(
        corpus,
        teacher=config.teacher_scores,
        reference=config.reference_scores,
        check_rows=False,  # the selection does that as it reads them
    )
    predictions = None
    if config.proxy_scores is not None:
        predictions = open_predictions(corpus, config.proxy_scores, check_rows=False)
    return corpus, scores, predictions


def _ratio(config: Config) -> float:
    return _DEFAULT_RATIO if config.selection_ratio is None else config.selection_ratio


def _quota(config: Config, every: Tally) -> np.ndarray:
    """int64[S]: instances or tokens to keep of each stratum."""
    rows, tokens = every.domains.sum(-1).T
    if not config.stratify:
        rows, tokens = rows.sum(keepdims=True), tokens.sum(keepdims=True)
    if config.selection_tokens is not None:
        return token_quota(config.selection_tokens, tokens)
    return ratio_quota(_ratio(config), rows)


def _settings(config: Config) -> dict[str, Any]:
    by_tokens = config.selection_tokens is not None
    return {
        "selector": config.selector,
        "ratio": None if by_tokens else _ratio(config),
        "token_budget": config.selection_tokens,
        "stratify": config.stratify,
        "score_normalization": config.score_normalization,
        "min_tokens": config.min_tokens,
        "seed": config.seed,
    }


def _draw(path: Path, facts: Mapping[str, Any], name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(selection_overview(facts, title=name))


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
    kept = f"{facts['num_kept']:,} of {total:,} instances kept"
    headline = f"{prefix}: {kept}, {facts['tokens_kept']:,} tokens"
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
