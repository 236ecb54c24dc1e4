"""A selection to be looked at: all that it chose among, by what, and some of it as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_miniplm.core.manifest import Manifest
from megatron_miniplm.data.columns import ScoredColumns
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.predictions import Predictions
from megatron_miniplm.data.scores import ScoreNormalization, Scores
from megatron_miniplm.selection.examples import Example, Order, pick_rows, read_examples
from megatron_miniplm.selection.inputs import open_predictions, open_scores, selector_input
from megatron_miniplm.selection.registry import SELECTORS

Folders = Mapping[str, Path | None]
"""Role (teacher, reference, proxy) -> folder of its scores."""
ROLES: Mapping[str, type[ScoredColumns]] = {
    "teacher": Scores, "reference": Scores, "proxy": Predictions,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Population:
    """N instances with their scores, and which of them a subset kept."""

    corpus: Corpus
    scores: Mapping[str, Scores]
    """By role."""
    proxy: Predictions | None
    kept: np.ndarray | None
    """bool[N]; None where nothing was chosen."""
    selector: str | None
    """Whose keys these are: the subset's, or what the scores allow; None without scores."""
    normalization: ScoreNormalization
    """What the scores of an instance are in these keys."""
    keys: np.ndarray | None
    """float64[N]."""
    threshold: float
    """Lowest kept key; the median of the keys where these are not the subset's."""

    def examples(self, count: int, *, order: Order, seed: int) -> list[Example]:
        """Instances in that order (`pick_rows`); without keys only "random" has a meaning."""
        keys = np.zeros(len(self.corpus)) if self.keys is None else self.keys
        rows = pick_rows(keys, count, order=order, threshold=self.threshold, seed=seed)
        return read_examples(
            self.corpus, rows, scores=self.scores, kept=self.kept, proxy=self.proxy
        )


def judges(manifest: Manifest, manifest_path: Path) -> dict[str, Path | None]:
    """The scores that a subset was selected by."""
    return {
        role: manifest.parent_path(manifest_path, f"{role}_scores")
        if f"{role}_scores" in manifest.parents
        else None
        for role in ROLES
    }


def open_population(corpus: Corpus, folders: Folders, *, seed: int) -> Population:
    """What the scores are of: `corpus` itself, or what it was chosen from.

    `seed`: of selectors that draw, where the subset says none.
    """
    population = _scored(corpus, folders)
    scores = open_scores(population, teacher=folders["teacher"], reference=folders["reference"])
    path = folders["proxy"]
    proxy = None if path is None else open_predictions(population, path)
    facts = corpus.manifest.content.get("selection", {})
    selector = _selector(corpus.manifest, {*scores, *(["proxy"] if proxy else [])})
    normalization = facts.get("score_normalization", "mean")
    keys, threshold = None, 0.0
    if selector is not None:
        inputs = selector_input(
            population, scores, normalization, seed=facts.get("seed", seed), proxy=proxy,
        )  # fmt: skip
        keys = SELECTORS[selector](inputs)
        own = selector == facts.get("selector")
        threshold = facts["threshold"] if own else float(np.median(keys))
    return Population(
        corpus=population,
        scores=scores,
        proxy=proxy,
        kept=None if population is corpus else np.isin(population.ids, corpus.ids),
        selector=selector,
        normalization=normalization,
        keys=keys,
        threshold=threshold,
    )


def _scored(corpus: Corpus, folders: Folders) -> Corpus:
    for role, folder in folders.items():
        if folder is None:
            continue
        if ROLES[role].open(folder).corpus_fingerprint == corpus.fingerprint:
            return corpus
    return corpus.parent() or corpus


def _selector(manifest: Manifest, there: set[str]) -> str | None:
    """The subset's own selector if the scores that it took are here, else what these allow."""
    named = manifest.content.get("selection", {}).get("selector")
    taken = {role for role in ROLES if f"{role}_scores" in manifest.parents}
    if named in SELECTORS.names() and taken <= there:
        return str(named)
    if {"teacher", "reference"} <= there:
        return "difference"
    return next((role for role in ROLES if role in there), None)
