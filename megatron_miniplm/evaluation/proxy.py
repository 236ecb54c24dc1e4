"""How well a proxy's predictions stand for exact scores, and what they cost beside them.

On instances that the proxy was not trained on, with exact r = log p - log p_ref and predicted r'::

    R^2       1 - sum (r' - r)^2 / sum (r - mean r)^2
    spearman  rank correlation of r' and r
    overlap   |top-K by r'  and  top-K by r| / K         by chance K / N

An interval has the middle 95 % of `_RESAMPLES` draws of as many instances with replacement (the
bootstrap).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_miniplm.core.errors import ConfigError, LineageError
from megatron_miniplm.core.manifest import Parent
from megatron_miniplm.data.columns import ScoredColumns
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.predictions import Predictions
from megatron_miniplm.data.scores import Scores
from megatron_miniplm.evaluation.cost import Model, PlanSetting, ranking_flops
from megatron_miniplm.models.checkpoint import read_trained_model
from megatron_miniplm.models.value_head import TargetScale
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.selection.diagnostics import spearman
from megatron_miniplm.selection.inputs import (
    exact_differences,
    open_predictions,
    open_scores,
    rows_within,
    scored_corpus,
)
from megatron_miniplm.selection.top_k import count_kept, top_k

_RESAMPLES = 1000
_MIDDLE = (0.025, 0.975)


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """A proxy's predictions beside exact scores."""

    proxy_scores: Path | None = None
    """Folder of a proxy's predictions, of --held-out or of what it was chosen from; instead of
    --load."""
    teacher_scores: Path | None = None
    """With --proxy-scores: the teacher's scores of the same."""
    reference_scores: Path | None = None
    """With --proxy-scores: the reference's scores of the same."""
    held_out: Path | None = None
    """With --proxy-scores: prefix of instances that the proxy was not trained on."""
    selection_ratio: float = 0.5
    """Share of the instances that would be kept."""


def judge_proxy(config: ProxyConfig) -> dict[str, Any]:
    """Agreement and costs, JSON-ready; refuses instances that the proxy was trained on."""
    held_out = Corpus.open(_given(config.held_out, "--held-out"))
    predictions = Predictions.open(_given(config.proxy_scores, "--proxy-scores"))
    teacher = Scores.open(_given(config.teacher_scores, "--teacher-scores"))
    reference = _given(config.reference_scores, "--reference-scores")
    said = f"the predictions at {predictions.path}"
    pool = scored_corpus(held_out, predictions.corpus_fingerprint, said)
    predicted = open_predictions(pool, predictions.path).difference[rows_within(held_out, pool)]
    scale = TargetScale(**predictions.manifest.content["model"]["targets"])
    whole = scored_corpus(
        held_out, teacher.corpus_fingerprint, f"the teacher scores at {teacher.path}"
    )
    scores = open_scores(whole, teacher=teacher.path, reference=reference)
    exact = exact_differences(whole, scores, scale.score_normalization)
    exact = exact[rows_within(held_out, whole)]
    sample, consumed = _trained_on(predictions)
    same_root = held_out.root_fingerprint == sample.root_fingerprint  # or ids mean other instances
    if same_root and len(seen := np.intersect1d(held_out.ids, sample.ids)):
        raise ConfigError(
            f"--held-out {held_out.prefix} has {len(seen):,} of its {len(held_out):,} instances in "
            f"{sample.prefix}, on which the proxy was trained: pass others"
        )
    return {
        "num_instances": len(held_out),
        **agreement(predicted.astype(np.float64), exact, ratio=config.selection_ratio),
        "cost": _costs(scores, pool, sample, epochs=consumed / len(sample)),
    }


def agreement(
    predicted: np.ndarray, exact: np.ndarray, *, ratio: float, seed: int = 0
) -> dict[str, Any]:
    """Name -> {value, low, high}, of float64[N] each."""
    found = _measures(predicted, exact, ratio)
    generator = np.random.default_rng(seed)
    draws: list[list[float]] = []
    for _ in range(_RESAMPLES):
        rows = generator.integers(len(exact), size=len(exact))
        draws.append(list(_measures(predicted[rows], exact[rows], ratio).values()))
    low, high = np.nanquantile(np.array(draws), _MIDDLE, axis=0)
    kept = count_kept(ratio, len(exact))
    return {
        name: {"value": value, "low": float(low[at]), "high": float(high[at])}
        for at, (name, value) in enumerate(found.items())
    } | {"overlap_by_chance": kept / len(exact)}


def _measures(predicted: np.ndarray, exact: np.ndarray, ratio: float) -> dict[str, float]:
    kept = count_kept(ratio, len(exact))
    both = np.intersect1d(top_k(predicted, kept), top_k(exact, kept), assume_unique=True)
    rank = spearman(predicted, exact)
    spread = float(np.square(exact - exact.mean()).sum())
    return {
        "r_squared": 1 - float(np.square(predicted - exact).sum()) / spread if spread else np.nan,
        "spearman": np.nan if rank is None else rank,
        "overlap": len(both) / kept,
    }


def _given(path: Path | None, flag: str) -> Path:
    if path is None:
        raise ConfigError(
            f"a proxy is judged by --proxy-scores, --teacher-scores, --reference-scores and "
            f"--held-out: {flag} is missing"
        )
    return path


def _trained_on(predictions: Predictions) -> tuple[Corpus, int]:
    """(what the proxy was trained on, how many samples of it)."""
    folder = _model_path(predictions)
    proxy, trained = read_trained_model(folder)
    was = predictions.manifest.parents["model"]
    _refuse_another("the proxy that predicted", was, folder, proxy.fingerprint)
    path = folder / "manifest.json"
    if "corpus" not in proxy.parents:
        raise ConfigError(f"{path}: the proxy was trained on a blend, so its sample is not known")
    sample = Corpus.open(proxy.parent_path(path, "corpus"))
    was = proxy.parents["corpus"]
    _refuse_another("what the proxy was trained on", was, sample.prefix, sample.fingerprint)
    return sample, trained.consumed_samples


def _refuse_another(what: str, was: Parent, path: Path, found: str) -> None:
    """Refuse what lies where an input was, and is not that input."""
    if found != was.fingerprint:
        raise LineageError(
            f"{what} was {was.fingerprint}, but {path} is now {found}: restore it, or train the "
            "proxy and predict again"
        )


def _model_path(scores: ScoredColumns) -> Path:
    return scores.manifest.parent_path(scores.path / "manifest.json", "model")


def _costs(
    scores: Mapping[str, Scores], pool: Corpus, sample: Corpus, *, epochs: float
) -> dict[str, float] | None:
    """FLOPs as the paper counts them (2 N a token of a forward pass), what both need left out.

    None where the models that scored are not where they were.
    """
    if not all("model" in s.manifest.parents and _model_path(s).exists() for s in scores.values()):
        return None
    models = {
        role: Model.of_shape(
            open_weights(_model_path(found)).config, "parameters", pool.seq_length, role
        )
        for role, found in scores.items()
    }
    exactly, by_proxy = ranking_flops(
        PlanSetting(
            student=models["reference"], teacher=models["teacher"], reference=models["reference"],
            tokens=0, corpus_tokens=pool.num_tokens, proxy_tokens=sample.num_tokens,
            proxy_epochs=epochs, seq_length=pool.seq_length,
        )
    )  # fmt: skip
    return {
        "sample_tokens": sample.num_tokens, "pool_tokens": pool.num_tokens, "epochs": epochs,
        "exact_flops": exactly, "proxy_flops": by_proxy, "times_cheaper": exactly / by_proxy,
    }  # fmt: skip
