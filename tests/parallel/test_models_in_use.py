"""A trained model goes out to a Hugging Face folder and is used from there all the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import CheckpointError, ConfigError, LineageError
from megatron_miniplm.data.scores import Scores
from megatron_miniplm.models.hf_folder import HfFolder
from tests.pool import RankFailedError, RankPool
from tests.runs import losses, pretrain_flags, score_flags


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    flags = ["--from", "megatron", "--to", "hf", "--load", str(model), "--save", str(folder)]
    assert main(["convert", *flags]) == 0
    return folder


def test_scores_from_the_exported_folder_are_the_same_file(
    exported: Path, big_corpus: Path, one_process: Path, pool: RankPool, tmp_path: Path
) -> None:
    pool.run(score_flags(big_corpus, exported, tmp_path / "scores"), 1)
    found, expected = Scores.open(tmp_path / "scores"), Scores.open(one_process)
    assert np.array_equal(found.sum_nll, expected.sum_nll)
    assert np.array_equal(found.num_tokens, expected.num_tokens)


def test_scores_from_a_gguf_file_of_the_model_are_the_same_file(
    exported: Path, big_corpus: Path, one_process: Path, pool: RankPool, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="the [hf] extra is not installed")
    from tests.gguf_files import write_gguf

    path = write_gguf(HfFolder(exported), tmp_path / "model.gguf", exported)
    pool.run(score_flags(big_corpus, path, tmp_path / "scores"), 2)
    found, expected = Scores.open(tmp_path / "scores"), Scores.open(one_process)
    assert np.array_equal(found.sum_nll, expected.sum_nll)
    other = tmp_path / "other"
    other.mkdir()
    raw = json.loads((exported / "tokenizer.json").read_text())
    tokens = list(raw["model"]["vocab"])
    raw["model"]["vocab"] = {token: at for at, token in enumerate([*tokens[1:], tokens[0]])}
    (other / "tokenizer.json").write_text(json.dumps(raw))
    path = write_gguf(HfFolder(exported), tmp_path / "other.gguf", other)
    with pytest.raises(RankFailedError, match=LineageError.__name__):
        pool.run(score_flags(big_corpus, path, tmp_path / "more"), 1)


@pytest.fixture(scope="module")
def known(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two documents. Each begins with a token of one byte, which nothing predicts."""
    folder = tmp_path_factory.mktemp("known")
    lines = (json.dumps({"text": text}) + "\n" for text in ("x é", "y 🙂"))
    (folder / "text.jsonl").write_text("".join(lines))
    flags = ["--input", str(folder / "text.jsonl"), "--output-prefix", str(folder / "known")]
    more = ["--seq-length", "12", "--flush-tails", "--tokenizer-model", str(tiny_tokenizer)]
    assert main(["preprocess", *flags, *more]) == 0
    return folder / "known"


def test_evaluation_equals_the_means_of_the_scores(
    exported: Path, big_corpus: Path, known: Path, one_process: Path, pool: RankPool, tmp_path: Path
) -> None:
    flags = ["--load", str(exported), "--lm-loss", str(big_corpus), f"known={known}"]
    more = ["--output", str(tmp_path / "e"), "--micro-batch-size", "128"]
    pool.run(["evaluate", *flags, *more], 2)
    scores = Scores.open(one_process)
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    row = results["lm_loss"][str(big_corpus)]
    assert row["num_instances"] == len(scores)
    assert row["num_tokens"] == int(scores.num_tokens.sum())
    # Other micro-batches than scoring's: fp32 rounding only.
    assert row["instance_mean"] == pytest.approx(scores.mean_nll().mean(), rel=1e-6)
    token_mean = scores.sum_nll.sum(dtype=np.float64) / scores.num_tokens.sum()
    assert row["token_mean"] == pytest.approx(token_mean, rel=1e-6)
    row = results["lm_loss"]["known"]
    assert row["num_bytes"] == 3 + 5  # " é" and " 🙂"; separators stand for no text
    nats = row["token_mean"] * row["num_tokens"]
    assert row["bits_per_byte"] == pytest.approx(nats / np.log(2) / 8)


def test_finetuning_starts_from_the_weights_and_counts_from_zero(
    exported: Path, model: Path, big_corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    trained = json.loads((model / "iter_0000010" / "manifest.json").read_text())["content"]
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    flags = [
        word
        for name in names
        for word in (f"--{name.replace('_', '-')}", str(trained["config"][name]))
    ]
    for source in (exported, model):
        save = tmp_path / source.name
        start = ["--load", str(source), "--finetune"]
        pool.run(pretrain_flags(big_corpus, save, *flags, *start, iterations=5), 1)
    first, second = losses(tmp_path / exported.name), losses(tmp_path / model.name)
    assert first == second
    assert first[0] < np.mean(losses(model)[:3]) - 0.02, "it must start where training had come to"


def test_weights_of_another_shape_are_refused(
    exported: Path, big_corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    start = ["--load", str(exported), "--finetune", "--num-layers", "6"]
    with pytest.raises(RankFailedError, match=CheckpointError.__name__):
        pool.run(pretrain_flags(big_corpus, tmp_path / "run", *start), 1)
    assert not (tmp_path / "run").exists()


def test_folder_with_another_tokenizer_is_refused(
    exported: Path, big_corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    raw = json.loads(path.read_text())
    tokens = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].__getitem__)[-2:]
    vocab = raw["model"]["vocab"]
    vocab[tokens[0]], vocab[tokens[1]] = vocab[tokens[1]], vocab[tokens[0]]
    path.write_text(json.dumps(raw))
    with pytest.raises(RankFailedError, match=LineageError.__name__):
        pool.run(score_flags(big_corpus, tmp_path / "hf", tmp_path / "scores"), 1)
    assert not (tmp_path / "scores").exists()


def test_bf16_trains_close_to_fp32(corpus: Path, pool: RankPool, tmp_path: Path) -> None:
    for name, flags in {"fp32": [], "bf16": ["--bf16"]}.items():
        pool.run(pretrain_flags(corpus, tmp_path / name, *flags), 2)
    fp32, bf16 = (np.array(losses(tmp_path / name)) for name in ("fp32", "bf16"))
    assert not np.array_equal(fp32, bf16)
    # bf16 activations have 8 bits: relative error 4e-3 a product, averaged over 500 tokens.
    assert np.abs(fp32 - bf16).max() < 0.02


@pytest.mark.parametrize(
    ("flags", "world", "message"),
    [
        (["--tensor-model-parallel-size", "3"], 1, "1 processes cannot hold TP 3 x PP 1"),
        (["--tensor-model-parallel-size", "2", "--num-query-groups", "1"], 2, "--num-query-groups"),
        (["--pipeline-model-parallel-size", "2", "--num-layers", "1"], 2, "--num-layers 1 are not"),
        (["--global-batch-size", "6"], 2, "--global-batch-size 6 is not a multiple"),
        (["--vocab-size", "100"], 1, "--vocab-size 512"),
        (["--max-position-embeddings", "32"], 1, "--max-position-embeddings is 32"),
    ],
)
def test_layouts_and_sizes_that_do_not_fit_are_refused(
    flags: list[str], world: int, message: str, corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    with pytest.raises(RankFailedError, match=message) as caught:
        pool.run(pretrain_flags(corpus, tmp_path / "run", *flags), world)
    assert ConfigError.__name__ in str(caught.value)
    assert not (tmp_path / "run").exists()
