"""A store of logits: the same whoever filled it, and what it says is what `score` says."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_miniplm.__main__ import main
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.hidden_codec import decode_hidden
from megatron_miniplm.data.instances import Batch, make_batch
from megatron_miniplm.data.logit_codec import decode
from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.data.scores import Scores
from megatron_miniplm.data.sparse_logits import SparseLogits
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.stages import cache_logits
from tests.pool import RankFailedError, RankPool
from tests.runs import PP2, TINY, TP2, pretrain_flags, score_flags, some_slow

TOLERANCE = 2e-5  # fp32 logits of a small model, multiplied in another order
EXACT = ("--value-bits", "32")


def flags(corpus: Path, model: Path, output: Path, *more: str) -> list[str]:
    return [
        "cache-logits", "--data-path", str(corpus), "--load", str(model), "--output", str(output),
        "--micro-batch-size", "32", "--top-k", "20", *more,
    ]  # fmt: skip


def files(store: Path) -> dict[str, bytes]:
    """Everything but run.json, which has the command line."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


def logits(store: Path) -> list[SparseLogits]:
    """Of all instances."""
    opened = RecordStore.open(store)
    return [decode(payload) for payload in opened.read(opened.ids)]


def assert_same_logits(found: Path, expected: Path, *, same_ids: float = 1.0) -> None:
    """Equal but for rounding: kept at a share `same_ids` of positions, and every number."""
    assert (RecordStore.open(found).ids == RecordStore.open(expected).ids).all()
    same = total = 0
    for ours, theirs in zip(logits(found), logits(expected), strict=True):
        for (name, mine), (_, other) in zip(ours.columns(), theirs.columns(), strict=True):
            if same_ids == 1 or name != "tail_mass":
                np.testing.assert_allclose(mine, other, rtol=TOLERANCE, atol=TOLERANCE)
        if same_ids == 1:
            assert ours.counts.tolist() == theirs.counts.tolist()
            assert ours.ids.tolist() == theirs.ids.tolist()
            np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=TOLERANCE)
        for at in range(len(ours)):
            same += ours.at(np.array([at])).ids.tolist() == theirs.at(np.array([at])).ids.tolist()
        total += len(ours)
    assert same >= same_ids * total


@pytest.fixture(scope="module")
def small_corpus(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subset of three windows: ids of the root, instances of 65 tokens."""
    folder = tmp_path_factory.mktemp("small")
    words = ["split", "--data-path", str(corpus), "--reference-fraction", "0.08", "--seed", "1"]
    words += ["--reference-prefix", str(folder / "small"), "--pool-prefix", str(folder / "pool")]
    assert main(words) == 0
    return folder / "small"


@pytest.fixture(scope="module")
def teacher(pool: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("teacher") / "run"
    pool.run(pretrain_flags(corpus, save, *TINY, iterations=10), 1)
    return save


@pytest.fixture(scope="module")
def store(
    pool: RankPool, small_corpus: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Made by one process; exact numbers."""
    output = tmp_path_factory.mktemp("store") / "one"
    pool.run(flags(small_corpus, teacher, output, *EXACT, "--kd-temperatures", "2"), 1)
    return output


@pytest.fixture(scope="module")
def scores(
    pool: RankPool, small_corpus: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Scores:
    output = tmp_path_factory.mktemp("scores") / "one"
    pool.run(score_flags(small_corpus, teacher, output), 1)
    return Scores.open(output)


def test_gold_log_probs_are_the_scores_of_the_same_teacher(
    store: Path, small_corpus: Path, scores: Scores
) -> None:
    assert (RecordStore.open(store).ids == Corpus.open(small_corpus).ids).all()
    for row, kept in enumerate(logits(store)):
        assert len(kept) == scores.num_tokens[row]
        # Specified: 1e-2. Micro-batches of other sizes round otherwise.
        assert abs(-kept.gold_log_prob.sum(dtype=np.float64) - scores.sum_nll[row]) < 1e-4


def test_the_default_encoding_keeps_the_scores(
    pool: RankPool, small_corpus: Path, teacher: Path, scores: Scores, tmp_path: Path
) -> None:
    pool.run(flags(small_corpus, teacher, tmp_path / "store"), 1)
    for row, kept in enumerate(logits(tmp_path / "store")):
        assert abs(-kept.gold_log_prob.sum(dtype=np.float64) - scores.sum_nll[row]) < 1e-2
    content = RecordStore.open(tmp_path / "store").manifest.content
    assert content["teacher_iteration"] == 10
    assert content["vocab_size"] == 512


def test_dp2_and_array_jobs_write_the_same_bytes(
    pool: RankPool, store: Path, small_corpus: Path, teacher: Path, tmp_path: Path
) -> None:
    words = flags(small_corpus, teacher, tmp_path / "dp", *EXACT, "--kd-temperatures", "2")
    pool.run(words, 2)
    assert files(tmp_path / "dp") == files(store)
    words[words.index(str(tmp_path / "dp"))] = str(tmp_path / "array")
    for job in ("1/2", "0/2"):
        assert not (tmp_path / "array/manifest.json").exists()
        pool.run([*words, "--shard", job], 1)
    assert files(tmp_path / "array") == files(store)


@pytest.mark.parametrize("layout", some_slow([TP2, PP2], [PP2]))
def test_tp_and_pp_keep_the_same_tokens(
    layout: str, pool: RankPool, store: Path, small_corpus: Path, teacher: Path, tmp_path: Path
) -> None:
    words = flags(small_corpus, teacher, tmp_path / "two", *EXACT, "--kd-temperatures", "2")
    pool.run([*words, *layout.split()], 2)
    assert_same_logits(tmp_path / "two", store)


def test_the_micro_batch_size_changes_rounding_only(
    pool: RankPool, store: Path, small_corpus: Path, teacher: Path, tmp_path: Path
) -> None:
    words = flags(small_corpus, teacher, tmp_path / "seven", *EXACT, "--kd-temperatures", "2")
    pool.run([*words, "--micro-batch-size", "7"], 1)
    assert_same_logits(tmp_path / "seven", store)


def test_draws_are_the_same_in_any_layout(
    pool: RankPool, small_corpus: Path, teacher: Path, tmp_path: Path
) -> None:
    words = ["--sampling", "head-tail", "--sampling-draws", "12", "--top-k", "4", *EXACT]
    for name, more, world in (("one", "", 1), ("two", f"{TP2} --micro-batch-size 7", 2)):
        output = tmp_path / name
        pool.run([*flags(small_corpus, teacher, output, *words), *more.split()], world)
    # Where a draw falls within rounding (some 1e-6) of the border of two tokens, it may move.
    assert_same_logits(tmp_path / "two", tmp_path / "one", same_ids=0.999)
    assert RecordStore.open(tmp_path / "one").manifest.config["sampling"] == "head-tail"


def test_another_model_or_truncation_does_not_continue_a_store(
    pool: RankPool, store: Path, small_corpus: Path, teacher: Path
) -> None:
    words = flags(small_corpus, teacher, store, *EXACT, "--kd-temperatures", "2")
    with pytest.raises(RankFailedError, match=r"top_p is 0\.95 there and 0\.9 here"):
        pool.run([*words, "--top-p", "0.9"], 1)
    pool.run(words, 1)  # and what is finished is left alone


def test_a_teacher_with_another_tokenizer_is_refused(
    pool: RankPool, teacher: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "def f(x):\n    return x\n" * 99}))
    words = [
        "preprocess", "--input", str(tmp_path / "text.jsonl"), "--seq-length", "64",
        "--tokenizer-model", str(tiny_tokenizer), "--eod-token", "!",
        "--output-prefix", str(tmp_path / "other"),
    ]  # fmt: skip
    assert main(words) == 0
    with pytest.raises(RankFailedError, match="LineageError"):
        pool.run(flags(tmp_path / "other", teacher, tmp_path / "store"), 1)
    assert not (tmp_path / "store").exists()


def test_an_estimate_from_all_instances_is_the_size_of_the_store(
    store: Path, small_corpus: Path, teacher: Path, tmp_path: Path, capsys
) -> None:
    words = flags(small_corpus, teacher, tmp_path, *EXACT, "--kd-temperatures", "2", "--estimate")
    del words[words.index("--output") : words.index("--output") + 2]

    def estimate(count: int) -> dict:
        assert main([*words, "--estimate-instances", str(count), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    said = estimate(1_000_000)
    content = RecordStore.open(store).manifest.content
    assert said["total_tokens"] == content["num_tokens"]
    # The index is a .npy file with a header of 128 bytes; micro-batches may round otherwise.
    assert abs(said["total_bytes"] - content["num_bytes"]) <= 256
    assert said["total_bytes_error"] == 0
    some = estimate(40)
    assert some["num_instances"] == 40
    assert abs(some["total_bytes"] - content["num_bytes"]) <= 4 * some["total_bytes_error"]
    assert 0 < some["total_bytes_error"] < 0.1 * content["num_bytes"]
    assert estimate(1)["total_bytes_error"] is None
    assert main([*words, "--estimate-instances", "1"]) == 0
    assert "GB (+- unknown)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--estimate", "--output", "o", "--overwrite"], "--output, --overwrite has no effect"),
        (["--estimate", "--shard", "0/2"], "--shard has no effect: --estimate writes nothing"),
        (["--output", "o", "--estimate-instances", "9"], "--estimate-instances has no effect"),
        (["--output", "o", "--json"], "--json has no effect: --estimate is what makes use of it"),
    ],
)
def test_flags_without_an_effect_are_refused(words: list[str], message: str, capfd) -> None:
    assert main(["cache-logits", "--data-path", "none", "--load", "none", *words]) == 2
    assert message in " ".join(capfd.readouterr().err.split())


def test_a_window_is_never_held_as_it_was_said(
    small_corpus: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def watched(self: cache_logits._Hidden, head: Head, batch: Batch) -> list[torch.Tensor]:
        nonlocal most
        said = said_of(self, head, batch)
        alive.update(said)
        most = max(most, len(alive))
        return said

    said_of = cache_logits._Hidden.__call__
    monkeypatch.setattr(cache_logits._Hidden, "__call__", watched)
    words = flags(small_corpus, teacher, tmp_path / "store", "--what", "hidden")
    del words[words.index("--top-k") : words.index("--top-k") + 2]
    assert main([*words, "--micro-batch-size", "4"]) == 0
    # One that is new, two that wait, and one whose last names are still on the stack.
    assert 0 < most <= 4 * 4


def test_stored_hidden_states_give_the_logits(
    pool: RankPool, store: Path, small_corpus: Path, teacher: Path, tmp_path: Path
) -> None:
    corpus = Corpus.open(small_corpus)
    weights = open_weights(teacher)
    (key,) = [name for name in ("output_layer.weight", "embedding.word_embeddings.weight")
              if weights.parts.shape(name, None)][:1]  # fmt: skip
    matrix = weights.parts.load((key, None, weights.parts.shape(key, None)), torch.float32)
    kept = logits(store)
    # Largest differences of log-probs that were seen: 0.004 and 0.03.
    for bits, most in ((16, 0.02), (8, 0.1)):
        output = tmp_path / str(bits)
        words = flags(small_corpus, teacher, output, "--what", "hidden", "--hidden-bits", str(bits))
        del words[words.index("--top-k") : words.index("--top-k") + 2]
        pool.run(words, 1)
        opened = RecordStore.open(output)
        for row in range(0, len(corpus), 50):
            (payload,) = opened.read([int(corpus.ids[row])])
            batch = make_batch(corpus, [row], length=corpus.seq_length)
            found = decode_hidden(payload).wide(torch.float32) @ matrix.t()
            labels = batch.labels_bs[batch.mask_bs]
            gold = found[:, : corpus.vocab_size].log_softmax(1)[range(len(labels)), labels]
            np.testing.assert_allclose(gold, kept[row].gold_log_prob, atol=most)


def test_flags_of_logits_are_refused_where_hidden_states_are_stored(
    small_corpus: Path, teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = flags(small_corpus, teacher, tmp_path / "store", "--what", "hidden")
    assert main(words) == 2
    assert "--top-k 20 has no effect without --what logits" in capfd.readouterr().err
