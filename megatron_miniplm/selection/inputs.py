"""From score folders to what selectors see; scores that do not belong together are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_miniplm.core.errors import LineageError
from megatron_miniplm.data.columns import ScoredColumns
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.predictions import Predictions
from megatron_miniplm.data.scores import ScoreNormalization, Scores
from megatron_miniplm.selection.difference import difference
from megatron_miniplm.selection.key_source import ScoreColumns, ShardColumns, refuse_other_mask
from megatron_miniplm.selection.registry import SelectorInput


def open_predictions(corpus: Corpus, path: Path, *, check_rows: bool = True) -> Predictions:
    """A proxy's predictions; refuses those that are not of this very corpus."""
    found = Predictions.open(path, check_rows=check_rows)
    _refuse_other_corpus(corpus, found, "proxy")
    return found


def open_scores(
    corpus: Corpus, *, teacher: Path | None, reference: Path | None, check_rows: bool = True
) -> dict[str, Scores]:
    """Role -> scores, of those given; refuses scores that are not of this very corpus.

    Broken rows are refused, too, unless whoever reads them does that (``check_rows=False``).
    """
    folders = {"teacher": teacher, "reference": reference}
    scores = {
        role: Scores.open(path, check_rows=check_rows)
        for role, path in folders.items()
        if path is not None
    }
    for role, found in scores.items():
        _refuse_other_corpus(corpus, found, role)
    if len(scores) == 2:
        _refuse_other_precision(scores["teacher"], scores["reference"])
        if check_rows:
            refuse_other_mask(scores["teacher"].num_tokens, scores["reference"].num_tokens)
    return scores


def exact_differences(
    corpus: Corpus, scores: Mapping[str, Scores], normalization: ScoreNormalization
) -> np.ndarray:
    """float64[N], r = log p - log p_ref in nats; `scores` of both, of `corpus`."""
    return difference(selector_input(corpus, scores, normalization, seed=0))


def scored_corpus(corpus: Corpus, fingerprint: str, what: str) -> Corpus:
    """`corpus`, or what it was chosen from, whichever has the fingerprint that scores are of.

    `what`: the flag and path of the scores, for the message of the refusal.
    """
    found: Corpus | None = corpus
    while found is not None and found.fingerprint != fingerprint:
        found = found.parent()
    if found is None:
        raise LineageError(
            f"{what} are of corpus {fingerprint}, and {corpus.prefix} ({corpus.fingerprint}) is "
            "neither that nor chosen from it: score it, or pass scores of what it was chosen from"
        )
    return found


def rows_within(corpus: Corpus, whole: Corpus) -> np.ndarray:
    """int64[len(corpus)]: the rows in `whole` of the instances of `corpus`, chosen from it."""
    return np.searchsorted(whole.ids, corpus.ids)


def negative_log_likelihood(scores: Scores, normalization: ScoreNormalization) -> np.ndarray:
    """float64[N], nats: of a token on average ("mean"), or of the whole instance ("sum", Eq. 4)."""
    return scores.mean_nll() if normalization == "mean" else scores.sum_nll.astype(np.float64)


def selector_input(
    corpus: Corpus,
    scores: Mapping[str, Scores],
    normalization: ScoreNormalization,
    *,
    seed: int,
    proxy: Predictions | None = None,
) -> SelectorInput:
    """What selectors see of opened scores and predictions."""
    columns = {
        f"{role}_scores": negative_log_likelihood(found, normalization)
        for role, found in scores.items()
    }
    if proxy is not None:
        columns["proxy_scores"] = proxy.difference.astype(np.float64)
    return SelectorInput(ids=corpus.ids, seed=seed, **columns)


def shard_columns(
    corpus: Corpus,
    scores: Mapping[str, Scores],
    numbers: Sequence[int],
    proxy: Predictions | None = None,
) -> list[ShardColumns]:
    """What is known of the rows of some shards of `corpus`; columns stay mapped."""
    return [_shard_columns(corpus, scores, number, proxy) for number in numbers]


def _shard_columns(
    corpus: Corpus, scores: Mapping[str, Scores], number: int, proxy: Predictions | None
) -> ShardColumns:
    start, stop = (int(at) for at in corpus.shard_starts[number : number + 2])
    part = slice(start, stop)
    columns = {
        role: ScoreColumns(sum_nll=found.sum_nll[part], num_tokens=found.num_tokens[part])
        for role, found in scores.items()
    }
    return ShardColumns(
        num_rows=stop - start,
        first_row=start,
        first_id=start,
        ids=None if corpus.id_column is None else corpus.id_column[part],
        lengths=corpus.opened_shards[number].index.lengths,
        domains=lambda: corpus.domains_of(part),
        teacher=columns.get("teacher"),
        reference=columns.get("reference"),
        predicted=None if proxy is None else proxy.difference[part],
    )


def _refuse_other_corpus(corpus: Corpus, scores: ScoredColumns, role: str) -> None:
    made = scores.manifest.content["tokenizer_fingerprint"]
    mine = corpus.manifest.content["tokenizer"]["fingerprint"]
    if made != mine:
        raise LineageError(
            f"the {role} scores at {scores.path} were made with tokenizer {made}, but "
            f"{corpus.prefix} was made with {mine}: score this corpus"
        )
    if scores.corpus_fingerprint != corpus.fingerprint or len(scores) != len(corpus):
        raise LineageError(
            f"the {role} scores at {scores.path} are of corpus {scores.corpus_fingerprint} "
            f"({len(scores)} instances), but --data-path {corpus.prefix} is {corpus.fingerprint} "
            f"({len(corpus)}): run `score` on this one, or pass the corpus that was scored"
        )


def _refuse_other_precision(teacher: Scores, reference: Scores) -> None:
    theirs, other = (found.manifest.config.get("bf16") for found in (teacher, reference))
    if theirs != other:
        raise LineageError(
            f"the teacher scores at {teacher.path} were computed with bf16 = {theirs}, the "
            f"reference scores at {reference.path} with bf16 = {other}: rounding would not cancel "
            "in their difference; score both alike"
        )
