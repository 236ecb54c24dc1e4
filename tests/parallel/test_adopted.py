"""An adopted corpus trains and scores exactly as the corpus that was packed from the same text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.scores import Scores
from tests.pool import RankPool
from tests.runs import TINY, curve, pretrain_flags, score_flags
from tools import preprocess_data


@pytest.fixture(scope="module")
def adopted(
    big_corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The text of `big_corpus` by way of Megatron's documents."""
    folder = tmp_path_factory.mktemp("adopted")
    fixed = ["--tokenizer-model", str(tiny_tokenizer), "--output-prefix"]
    text = ["--input", str(big_corpus.with_name("text.jsonl"))]
    assert preprocess_data.main([*text, *fixed, str(folder / "web")]) == 0
    documents = ["--input", str(folder / "web_text_document"), "--seq-length", "12"]
    assert main(["adopt", *documents, *fixed, str(folder / "corpus")]) == 0
    found, expected = Corpus.open(folder / "corpus"), Corpus.open(big_corpus)
    assert np.array_equal(found.lengths, expected.lengths)
    sample = range(0, len(found), 97)
    for ours, theirs in zip(found.gather(sample), expected.gather(sample), strict=True):
        assert np.array_equal(ours, theirs)
    return folder / "corpus"


def test_training_on_it_gives_the_same_losses(
    pool: RankPool, big_corpus: Path, adopted: Path, tmp_path: Path
) -> None:
    for name, data in (("packed", big_corpus), ("adopted", adopted)):
        pool.run(pretrain_flags(data, tmp_path / name, *TINY, iterations=6), 1)
    found, expected = curve(tmp_path / "adopted"), curve(tmp_path / "packed")
    assert len(found) == 6
    for figure in ("lm loss", "grad norm", "consumed_tokens"):
        assert [row[figure] for row in found] == [row[figure] for row in expected]


@pytest.fixture(scope="module")
def scores(
    pool: RankPool, adopted: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Scores of the adopted corpus, made by two processes."""
    output = tmp_path_factory.mktemp("adopted_scores") / "two"
    pool.run(score_flags(adopted, model, output), 2)
    return output


def test_scores_are_the_same_bytes(scores: Path, one_process: Path, adopted: Path) -> None:
    for name in ("sum_nll.npy", "num_tokens.npy"):
        assert (scores / name).read_bytes() == (one_process / name).read_bytes()
    assert Scores.open(scores).corpus_fingerprint == Corpus.open(adopted).fingerprint


def test_the_same_instances_are_selected_and_train_alike(
    pool: RankPool, scores: Path, one_process: Path, adopted: Path, big_corpus: Path, tmp_path: Path
) -> None:
    chosen = {}
    for name, data, scored in (("adopted", adopted, scores), ("packed", big_corpus, one_process)):
        prefix = tmp_path / name
        words = ["select", "--data-path", data, "--selector", "teacher", "--teacher-scores",
                 scored, "--selection-ratio", "0.3", "--output-prefix", prefix]  # fmt: skip
        assert main(list(map(str, words))) == 0
        chosen[name] = Corpus.open(prefix)
        pool.run(pretrain_flags(prefix, tmp_path / f"{name}_run", *TINY, iterations=6), 1)
    assert np.array_equal(chosen["adopted"].ids, chosen["packed"].ids)
    runs = [[row["lm loss"] for row in curve(tmp_path / f"{name}_run")] for name in chosen]
    assert runs[0] == runs[1]
