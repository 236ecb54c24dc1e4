"""Scores are the same file bit for bit, however the work was divided or interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.core.errors import LineageError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.scores import Scores
from tests.pool import RankFailedError, RankPool
from tests.runs import TINY, assert_same_files, pretrain_flags, score_flags


def test_scores_equal_a_plain_forward_pass(
    one_process: Path, big_corpus: Path, pool: RankPool, model: Path
) -> None:
    corpus, scores = Corpus.open(big_corpus), Scores.open(one_process)
    rows = np.linspace(0, len(corpus) - 1, 40).astype(int)
    (expected,) = pool.run(
        "tests.parallel.jobs:plain_nll", 1, corpus=str(big_corpus), load=str(model), rows=rows
    )
    for row, (total, count) in zip(rows, expected, strict=True):
        assert scores.num_tokens[row] == count
        # fp32 log-softmax of a whole matrix against chunked sums: rounding of ~10 terms.
        assert abs(scores.sum_nll[row] - total) <= 2e-5 * max(1.0, total)


def test_scores_do_not_depend_on_dp_size(
    one_process: Path, big_corpus: Path, model: Path, pool: RankPool, tmp_path: Path
) -> None:
    pool.run(score_flags(big_corpus, model, tmp_path / "two"), 2)
    assert_same_files(tmp_path / "two", one_process)


def test_tp_and_pp_scores_agree_within_rounding(
    one_process: Path, big_corpus: Path, model: Path, pool: RankPool, tmp_path: Path
) -> None:
    expected = Scores.open(one_process)
    for name in ("tensor", "pipeline"):
        flags = score_flags(big_corpus, model, tmp_path / name)
        pool.run([*flags, f"--{name}-model-parallel-size", "2"], 2)
        found = Scores.open(tmp_path / name)
        assert np.array_equal(found.num_tokens, expected.num_tokens)
        np.testing.assert_allclose(found.sum_nll, expected.sum_nll, rtol=2e-6, atol=2e-5)


def test_array_jobs_fill_one_folder(
    one_process: Path, big_corpus: Path, model: Path, pool: RankPool, tmp_path: Path
) -> None:
    output = tmp_path / "array"
    for job in ("1/2", "0/2"):
        assert not (output / "manifest.json").exists()
        pool.run(score_flags(big_corpus, model, output, "--shard", job), 1)
    assert_same_files(output, one_process)


def test_scores_of_one_corpus_are_not_continued_with_another_model(
    big_corpus: Path, model: Path, pool: RankPool, tmp_path: Path
) -> None:
    output = tmp_path / "scores"
    pool.run(score_flags(big_corpus, model, output, "--shard", "0/2"), 1)
    other = tmp_path / "other"
    pool.run(pretrain_flags(big_corpus, other, "--seed", "11", *TINY, iterations=5), 1)
    with pytest.raises(RankFailedError, match="model"):
        pool.run(score_flags(big_corpus, other, output, "--shard", "1/2"), 1)


def test_model_of_another_tokenizer_is_refused(
    model: Path, pool: RankPool, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    from megatron_miniplm.__main__ import main

    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "def f(x):\n    return x\n" * 99}))
    flags = [
        "preprocess", "--input", str(tmp_path / "text.jsonl"), "--seq-length", "12",
        "--tokenizer-model", str(tiny_tokenizer), "--eod-token", "!",
        "--output-prefix", str(tmp_path / "other"),
    ]  # fmt: skip
    assert main(flags) == 0
    with pytest.raises(RankFailedError, match=LineageError.__name__):
        pool.run(score_flags(tmp_path / "other", model, tmp_path / "scores"), 1)
    assert not (tmp_path / "scores").exists()
