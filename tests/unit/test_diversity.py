"""The Vendi score where its value is known, wording, and corpora beside each other."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.evaluation.diversity import (
    ceiling,
    compression_ratio,
    distinct_grams,
    dual,
    primal,
    score_of_spectrum,
    vendi_score,
    word_numbers,
)
from megatron_miniplm.evaluation.embedders import EmbedderConfig
from tests.small_artifacts import random_instances, write_corpus


@pytest.mark.parametrize("shape", [(5, 40), (40, 5)])
def test_identical_vectors_score_one(shape):
    assert vendi_score(np.ones(shape, np.float32) * 3) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("width", [12, 30])
def test_n_orthogonal_vectors_score_n_whatever_their_length(width):
    vectors = np.eye(12, width) * np.arange(1, 13)[:, None]
    assert vendi_score(vectors) == pytest.approx(12, abs=1e-9)


@pytest.mark.parametrize("width", [3, 30])
def test_two_equal_groups_of_orthogonal_vectors_score_two(width):
    vectors = np.zeros((20, width))
    vectors[:10, 0] = vectors[10:, 1] = 7
    assert vendi_score(vectors) == pytest.approx(2, abs=1e-12)


@pytest.mark.parametrize("shape", [(30, 90), (90, 30), (50, 50)])
def test_both_sides_have_one_spectrum(shape):
    vectors = np.random.default_rng(0).normal(size=shape)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    one, other = score_of_spectrum(primal(unit)), score_of_spectrum(dual(unit))
    assert one == pytest.approx(other, rel=1e-12)
    assert vendi_score(vectors) == pytest.approx(one, rel=1e-12)


def test_a_score_that_would_take_hours_is_refused():
    with pytest.raises(ConfigError, match="lower --diversity-instances"):
        ceiling(10_001, 10_001)
    assert ceiling(10**6, 384) == 384


def test_texts_without_a_common_word_score_as_many_as_they_are():
    texts = [f"one{number} two{number} three{number}" for number in range(600)]
    found = vendi_score(EmbedderConfig().make().embed(texts))
    assert found == pytest.approx(600, rel=5e-3)  # some words share one of 65,536 buckets


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_vector_without_direction_is_refused(bad):
    vectors = np.ones((3, 2))
    vectors[1] = bad
    with pytest.raises(DataError, match="1 of 3 embeddings"):
        vendi_score(vectors)


def test_distinct_grams_are_those_inside_texts():
    texts = word_numbers(["a B a b", "A b", "c"])
    assert distinct_grams(texts, 100) == {
        "distinct_1": 3 / 7, "distinct_2": 2 / 4, "distinct_3": 1, "distinct_4": 1,
    }  # fmt: skip
    assert distinct_grams(texts, 2)["distinct_1"] == 1


def test_distinct_grams_are_those_of_counting_tuples():
    texts = [row % 7 for row in random_instances(50)]
    for size in range(1, 5):
        grams = [
            tuple(t[at : at + size].tolist()) for t in texts for at in range(len(t) - size + 1)
        ]
        share = len(set(grams)) / len(grams)
        assert distinct_grams(texts, 10**9)[f"distinct_{size}"] == share


def test_repeated_text_is_compressed_more():
    once = np.random.default_rng(0).bytes(4000)
    assert compression_ratio(once * 8) > 4 * compression_ratio(once)


def test_corpora_are_drawn_alike_and_one_of_copies_is_the_least_diverse(
    tmp_path, tiny_tokenizer, capsys
):
    instances = random_instances(60)
    pool = write_corpus(tmp_path / "pool", tiny_tokenizer, instances)
    write_corpus(tmp_path / "copies", tiny_tokenizer, instances[:1] * 60)
    write_subset(pool, np.arange(0, 60, 2), tmp_path / "half", config={}, selection={})
    flags = [
        f"{name}={tmp_path / name}" for name in ("pool", "copies", "half")
    ]  # fmt: skip
    old = [tmp_path / "out" / name for name in ("results.json", "samples_piqa.jsonl", "curves.csv")]
    old[0].parent.mkdir()
    for path in (*old, tmp_path / "out" / "notes"):
        path.write_text("old")
    flags += ["--output", str(tmp_path / "out"), "--overwrite"]
    assert main(["evaluate", "--diversity", *flags, "--diversity-instances", "20"]) == 0
    left = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert left.keys() == {"results.json", "notes"}
    assert left["results.json"] != "old"
    found = json.loads(capsys.readouterr().out)["diversity"]
    assert not found["comparable"]
    assert (found["instances"], found["seeds"]) == (20, 5)
    assert (found["ceilings"]["vendi"], found["dimensions"]) == (20, 2**16)
    assert sum(found["same_domains"].values()) == found["instances_same_domains"]
    of = found["corpora"]
    assert of["copies"]["vendi"] == pytest.approx({"mean": 1, "sd": 0}, abs=1e-9)
    assert of["half"]["corpus"] == Corpus.open(tmp_path / "half").fingerprint
    assert 10 < of["half"]["vendi"]["mean"] <= 20
    assert of["half"]["vendi"]["sd"] > 0
    assert of["pool"]["distinct_2"]["mean"] > of["copies"]["distinct_2"]["mean"]
    assert of["pool"]["zstd_ratio"]["mean"] < of["copies"]["zstd_ratio"]["mean"]


def test_same_domains_takes_the_mix_away(tmp_path, tiny_tokenizer, capsys):
    """Two corpora of the same two texts, one a domain: only their shares differ."""
    texts = random_instances(2)
    for name, domains in (("even", [0, 1] * 20), ("uneven", [0] * 30 + [1] * 10)):
        write_corpus(
            tmp_path / name, tiny_tokenizer, [texts[number] for number in domains], domains=domains
        )
    flags = [f"{name}={tmp_path / name}" for name in ("even", "uneven")]
    assert main(["evaluate", "--diversity", *flags]) == 0
    found = json.loads(capsys.readouterr().out)["diversity"]
    assert found["same_domains"] == {"prose": 20, "code": 10}
    even, uneven = (found["corpora"][name] for name in ("even", "uneven"))
    assert even["vendi"]["mean"] > uneven["vendi"]["mean"] + 0.05
    assert even["vendi_same_domains"] == pytest.approx(uneven["vendi_same_domains"])


def test_corpora_are_not_judged_together_with_a_model(capsys):
    for flags in (["--load", "model"], ["--proxy-scores", "scores"]):
        assert main(["evaluate", "--diversity", "a", *flags]) != 0
        assert "run `evaluate` for each" in " ".join(capsys.readouterr().err.split())
    assert main(["evaluate", "--diversity-seeds", "2"]) != 0
    assert "--diversity" in capsys.readouterr().err
