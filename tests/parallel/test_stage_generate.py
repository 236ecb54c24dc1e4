"""`generate`: the corpus that SeqKD trains on is the same bytes, however it was made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import make_batch
from megatron_miniplm.data.logit_codec import decode
from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.stages import generate
from tests.faults.test_kill import start, wait_until
from tests.pool import RankFailedError, RankPool, kill_group
from tests.runs import TINY, curve, pretrain_flags
from tests.small_artifacts import write_scores

PROMPT = 8
CONTINUATION = ("--loss-on", "continuation")


def flags(corpus: Path, model: Path, prefix: Path, *more: str) -> list[str]:
    return [
        "generate", "--data-path", str(corpus), "--load", str(model),
        "--output-prefix", str(prefix), "--prompt-length", str(PROMPT),
        "--micro-batch-size", "128", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(pool: RankPool, big_corpus: Path, model: Path, tmp_path_factory) -> Path:
    """Prefix of the corpus that one process makes, uninterrupted."""
    prefix = tmp_path_factory.mktemp("made") / "seqkd"
    pool.run(flags(big_corpus, model, prefix), 1)
    return prefix


def files(prefix: Path) -> dict[str, bytes]:
    """Everything under the prefix but the tokenizer and the manifest, which holds paths."""
    return {
        path.name.removeprefix(prefix.name): path.read_bytes()
        for path in prefix.parent.glob(f"{prefix.name}[-.]*")
        if path.is_file() and path.suffix != ".json"
    }


def test_instances_begin_as_in_the_source_and_end_with_what_the_model_wrote(
    made: Path, big_corpus: Path
) -> None:
    source, found = Corpus.open(big_corpus), Corpus.open(made)
    assert len(found) == len(source)
    assert np.array_equal(found.domains, source.domains)
    changed = 0
    for row in range(0, len(source), 7):
        before, after, prompt = source.tokens(row), found.tokens(row), found.prompt_length(row)
        assert prompt == (PROMPT if len(before) > PROMPT else max(1, len(before) * 3 // 4))
        assert np.array_equal(before[:prompt], after[:prompt])
        assert prompt < len(after) <= len(before)
        written = after[prompt:]
        assert source.eod_id not in written[:-1], "it stops at the first separator"
        assert len(after) == len(before) or written[-1] == source.eod_id
        changed += not np.array_equal(before, after)
    assert changed > len(source) / 14
    manifest = found.manifest
    assert manifest.parents["source"].fingerprint == source.fingerprint
    assert manifest.parents.keys() == {"source", "model"}


def test_killed_and_continued_by_two_jobs_of_an_array_it_is_the_same_bytes(
    made: Path, big_corpus: Path, model: Path, pool: RankPool, tmp_path: Path
) -> None:
    prefix = tmp_path / "killed"
    command = flags(big_corpus, model, prefix)
    process = start(command)
    wait_until(lambda: bool(list(tmp_path.glob(".killed.generated/*.window"))), process)
    kill_group(process)
    done = len(list(tmp_path.glob(".killed.generated/*.window")))
    assert 0 < done < len(Corpus.open(big_corpus)) / 512, "killed too late to show anything"
    assert not prefix.with_suffix(".json").exists()
    pool.run([*command, "--shard", "0/2"], 1)
    assert not prefix.with_suffix(".json").exists(), "the other job's windows are missing"
    pool.run([*command, "--shard", "1/2"], 2)
    assert files(prefix) == files(made)
    assert Corpus.open(prefix).fingerprint == Corpus.open(made).fingerprint
    assert not list(tmp_path.glob(".killed*")), "nothing of the work is left"


def test_with_continue_every_instance_keeps_its_length(
    big_corpus: Path, model: Path, pool: RankPool, tmp_path: Path
) -> None:
    split = ["--reference-fraction", "0.05", "--seed", "1"]
    some = tmp_path / "some"
    prefixes = ["--reference-prefix", str(some), "--pool-prefix", str(tmp_path / "rest")]
    pool.run(["split", "--data-path", str(big_corpus), *split, *prefixes], 1)
    for name in ("one", "two"):
        more = ["--after-eos", "continue", "--short-instances", "copy"]
        ranks = 1 if name == "one" else 2
        tensor = [] if ranks == 1 else ["--tensor-model-parallel-size", "2"]
        pool.run(flags(some, model, tmp_path / name, *more, *tensor), ranks)
    source, found, tensor_parallel = (
        Corpus.open(prefix) for prefix in (some, tmp_path / "one", tmp_path / "two")
    )
    assert np.array_equal(found.lengths, source.lengths)
    short = np.flatnonzero(source.lengths <= PROMPT)
    for row in short:
        assert np.array_equal(found.tokens(int(row)), source.tokens(int(row)))
    same = [
        np.array_equal(found.tokens(row), tensor_parallel.tokens(row)) for row in range(len(found))
    ]
    assert np.mean(same) > 0.99, "tensor parallelism rounds otherwise, which moves few draws"


def test_what_an_instance_is_continued_with_follows_its_id(
    made: Path, big_corpus: Path, model: Path, pool: RankPool, tmp_path: Path
) -> None:
    some = tmp_path / "some"
    split = ["--reference-fraction", "0.05", "--seed", "2", "--reference-prefix", str(some)]
    rest = ["--pool-prefix", str(tmp_path / "rest")]
    pool.run(["split", "--data-path", str(big_corpus), *split, *rest], 1)
    pool.run(flags(some, model, tmp_path / "part"), 1)
    whole, part, subset = Corpus.open(made), Corpus.open(tmp_path / "part"), Corpus.open(some)
    same = [
        np.array_equal(part.tokens(row), whole.tokens(int(id_)))
        for row, id_ in enumerate(subset.ids)
    ]
    assert np.mean(same) > 0.99, "another batch rounds otherwise, which moves few draws"


def test_a_student_trains_on_the_continuations(
    made: Path, big_corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    save = tmp_path / "student"
    command = pretrain_flags(made, save, *CONTINUATION, *TINY, iterations=6)
    pool.run([*command, "--cache-logits", str(tmp_path / "store")], 1)
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "6"
    wrong = pretrain_flags(big_corpus, tmp_path / "no", *CONTINUATION, *TINY)
    with pytest.raises(RankFailedError, match="was not generated"):
        pool.run(wrong, 1)
    # What it said while it was trained is of whole instances, and of these a student may, too,
    # train on continuations alone.
    store, corpus = RecordStore.open(tmp_path / "store"), Corpus.open(made)
    said = [decode(record).gold_log_prob for record in store.read(store.ids)]
    for row, nats in zip(store.ids.tolist(), said, strict=True):
        assert len(nats) == np.count_nonzero(corpus.tokens(row)[:-1] != corpus.eod_id)
    select = ["select", "--selector", "stored", "--data-path", str(made)]
    select += ["--logits-path", str(store.path), "--output-prefix", str(tmp_path / "seen")]
    pool.run(select, 1)
    learn = ["--objective", "kd", "--teacher", "stored", "--logits-path", str(store.path)]
    learn += ["--lr-warmup-iters", "0", *CONTINUATION, *TINY]
    pool.run(pretrain_flags(tmp_path / "seen", tmp_path / "kd", *learn, iterations=1), 1)
    data = Blend.open([str(tmp_path / "seen")], seed=10, loss_on="continuation")
    batch = make_batch(data, data.order.rows(0, 8), length=corpus.seq_length)
    kept = [
        nats[mask[whole]].mean()
        for nats, mask, whole in zip(
            (said[row] for row in batch.rows_b.tolist()), batch.mask_bs.numpy(),
            data.whole_mask(batch).numpy(), strict=True,
        )
        if mask.any()
    ]  # fmt: skip
    assert curve(tmp_path / "kd")[0]["teacher loss"] == pytest.approx(-np.mean(kept), abs=1e-5)


def test_a_proxy_does_not_train_on_continuations_alone(
    made: Path, pool: RankPool, tmp_path: Path
) -> None:
    corpus = Corpus.open(made)
    words = ["--objective", "regression", "--teacher", "scores", *CONTINUATION]
    for role, nats in (("teacher", 1.0), ("reference", 2.0)):
        nll = nats * np.linspace(1, 2, len(corpus))
        scores = write_scores(tmp_path / role, corpus, nll, name=role)
        words += [f"--{role}-scores", str(scores)]
    with pytest.raises(RankFailedError, match=r"--loss-on .* whole instances are predicted"):
        pool.run(pretrain_flags(made, tmp_path / "run", *words), 1)


def test_layouts_that_cannot_generate_are_refused_before_anything_is_read() -> None:
    from megatron_miniplm.core.config import parse_flags

    words = ["--data-path", "no", "--load", "no", "--output-prefix", "no"]
    with pytest.raises(ConfigError, match="Use tensor and data parallelism"):
        parse_flags(generate.Config, [*words, "--pipeline-model-parallel-size", "2"], prog="x")
