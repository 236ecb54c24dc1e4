"""What holds for every registered embedder; one in a new place is tested from here on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.evaluation.embedders import EMBEDDERS, Embedder, EmbedderConfig, Vectors

TEXTS = [
    "The harvest was late, and the village waited.",
    "def area(r):\n    return 3.14159 * r ** 2",
    "",
    "Dear all, please find the minutes attached.",
    "The harvest was late, and the village waited.",
    "   \n",
    "naïve café 你好 🙂 " * 300,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer: Path) -> Path:
    """A transformers model of two layers, with a pooler, over the tests' tokenizer."""
    transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")
    path = tmp_path_factory.mktemp("embedder")
    config = transformers.BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    transformers.set_seed(0)
    transformers.BertModel(config).save_pretrained(path)
    (path / "tokenizer.json").write_bytes((tiny_tokenizer / "tokenizer.json").read_bytes())
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(facts))
    return path


@pytest.fixture(scope="module", params=EMBEDDERS.names())
def embedder(request) -> Embedder:
    if request.param == "transformers":
        return EmbedderConfig(
            embedder="transformers", embedder_model=request.getfixturevalue("folder")
        ).make()
    try:
        return EmbedderConfig(embedder=request.param).make()
    except ConfigError as error:
        pytest.skip(f"not installed: {error}")


def dense(vectors: Vectors) -> np.ndarray:
    return vectors.toarray() if scipy.sparse.issparse(vectors) else vectors


def test_vectors_are_finite_float32_and_none_is_zero(embedder):
    vectors = dense(embedder.embed(TEXTS))
    assert vectors.ndim == 2
    assert len(vectors) == len(TEXTS)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert np.linalg.norm(vectors, axis=1).min() > 0


def test_equal_texts_have_equal_vectors_and_others_others(embedder):
    vectors = dense(embedder.embed(TEXTS))
    assert np.allclose(vectors[0], vectors[4], rtol=1e-5, atol=1e-5)
    assert not np.allclose(vectors[0], vectors[1], rtol=1e-2, atol=1e-2)


def test_the_order_of_texts_does_not_count(embedder):
    order = np.random.default_rng(0).permutation(len(TEXTS))
    shuffled = dense(embedder.embed([TEXTS[at] for at in order]))
    assert np.allclose(shuffled, dense(embedder.embed(TEXTS))[order], rtol=1e-4, atol=1e-4)


def test_comparable_means_that_other_texts_beside_it_do_not_change_a_vector(embedder):
    alone, beside = (dense(embedder.embed(texts))[0] for texts in (TEXTS[:1], TEXTS))
    assert np.allclose(alone, beside, rtol=1e-4, atol=1e-4) == embedder.comparable


def test_what_made_the_vectors_can_be_written_down(embedder):
    json.dumps(embedder.facts)


def test_a_pooler_gives_other_vectors_than_the_mean(folder):
    mean, pooler = (
        EmbedderConfig(
            embedder="transformers", embedder_model=folder, embedder_pooling=pooling
        ).make().embed(TEXTS)
        for pooling in ("mean", "pooler")
    )  # fmt: skip
    assert mean.shape == pooler.shape
    assert not np.allclose(mean, pooler)


def test_flags_that_would_have_no_effect_are_refused(folder):
    with pytest.raises(ConfigError, match="need each other"):
        EmbedderConfig(embedder_model=folder)
    with pytest.raises(ConfigError, match="no effect"):
        EmbedderConfig(embedder_pooling="pooler")
    with pytest.raises(ConfigError, match="unknown embedder 'bert'; known: hashed"):
        EmbedderConfig(embedder="bert").make()
