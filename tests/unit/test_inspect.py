"""`inspect`: facts for machines, lineage for people, and the text that was kept and dropped."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.manifest import Manifest, Parent, hash_file
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.hidden_codec import HiddenEncoding, encode_hidden
from megatron_miniplm.data.lineage import ancestors, locate_manifest
from megatron_miniplm.data.logit_codec import Encoding, encode
from megatron_miniplm.data.record_store import Record
from megatron_miniplm.data.record_writer import RecordWriter
from megatron_miniplm.data.scores import ScoreWriter
from megatron_miniplm.data.sparse_logits import SparseLogits
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.data.tokenizers import load_tokenizer
from megatron_miniplm.stages import select
from tests.small_artifacts import flip_byte, write_corpus, write_scores

TEXTS = ["easy text\n", "hard [bold]text[/bold]\n", "noise \x1b[31m\x07\n", "middling text\n"]
# nats a token: r = 0.1, 2.0, -3.0, 0.5, so that half keeps "hard" and "middling".
TEACHER = np.array([0.5, 1.5, 6.0, 2.0])
REFERENCE = np.array([0.6, 3.5, 3.0, 2.5])


@pytest.fixture
def pool(tmp_path, tiny_tokenizer) -> Corpus:
    tokenizer = load_tokenizer(tiny_tokenizer)
    instances = [tokenizer.encode_flat([text])[0] for text in TEXTS]
    root = write_corpus(tmp_path / "data" / "pile", tiny_tokenizer, [*instances, instances[0]])
    write_subset(root, np.arange(4), tmp_path / "data" / "pool", config={}, selection={})
    return Corpus.open(tmp_path / "data" / "pool")


@pytest.fixture
def chosen(tmp_path, pool) -> Path:
    for role, values in (("teacher", TEACHER), ("reference", REFERENCE)):
        write_scores(tmp_path / "scores" / role, pool, values, name=role)
    prefix = tmp_path / "data" / "pile.diff"
    select.run(
        select.Config(
            data_path=pool.prefix,
            output_prefix=prefix,
            teacher_scores=tmp_path / "scores/teacher",
            reference_scores=tmp_path / "scores/reference",
        )
    )
    return prefix


@pytest.fixture
def ask(capsys):
    def run(*words, expect: int = 0) -> str:
        capsys.readouterr()
        assert main(["inspect", *map(str, words)]) == expect
        return capsys.readouterr().out

    return run


def test_json_has_what_machines_need(ask, chosen, pool):
    answer = json.loads(ask(chosen, "--json"))
    subset = Corpus.open(chosen)
    assert answer["kind"] == "subset"
    assert answer["num_instances"] == 2
    assert answer["num_tokens"] == subset.num_tokens
    assert answer["fingerprint"] == subset.fingerprint
    assert answer["parents"]["parent"] == {
        "fingerprint": pool.fingerprint,
        "path": str(pool.prefix),
    }
    assert set(answer["parents"]) == {"parent", "root", "teacher_scores", "reference_scores"}


def test_the_shards_of_json_are_megatron_data_paths(ask, chosen):
    answer = json.loads(ask(chosen, "--json"))
    stocks = [IndexedDataset(shard) for shard in answer["shards"]]
    assert all(Path(shard).is_absolute() for shard in answer["shards"])
    assert [stock[at].tolist() for stock in stocks for at in range(len(stock))] == [
        tokens.tolist() for tokens in Corpus.open(chosen).gather([0, 1])
    ]


def test_corpus_scores_and_manifest_files_are_understood(ask, tmp_path, pool, chosen):
    assert json.loads(ask(pool.root().prefix, "--json"))["kind"] == "corpus"
    assert json.loads(ask(f"{chosen}.json", "--json"))["kind"] == "subset"
    scores = json.loads(ask(tmp_path / "scores" / "teacher", "--json"))
    assert scores["kind"] == "scores"
    assert scores["num_instances"] == 4
    assert scores["parents"]["corpus"]["path"] == str(pool.prefix)


def test_the_lineage_leads_to_the_root(ask, chosen):
    lines = [line.strip() for line in ask(chosen).split("\nlineage\n")[1].splitlines()]
    said = [line.lstrip("├─│└ ").split("/")[0].strip() for line in lines if line]
    assert said == [
        "parent: subset", "parent: corpus",
        "teacher_scores: scores", "corpus: subset", "parent: corpus",
        "reference_scores: scores", "corpus: subset", "parent: corpus",
    ]  # fmt: skip


def test_missing_and_changed_ancestors_are_marked(ask, tmp_path, chosen, pool):
    shutil.rmtree(tmp_path / "scores" / "teacher")
    root = pool.root()
    write_subset(root, np.arange(3), pool.prefix, config={}, selection={}, overwrite=True)
    answer = ask(chosen)
    assert "teacher_scores: MISSING" in answer
    assert "parent: CHANGED subset" in answer
    assert "root: corpus" in answer  # worth a line, since the chain to it is broken


def test_a_parent_without_a_manifest_is_there_but_not_vouched_for(ask, tmp_path, pool):
    (tmp_path / "hf").mkdir()
    parents = {
        "model": Parent(fingerprint="f", path="../hf"),
        "gone": Parent(fingerprint="f", path="../x"),
    }
    writer = ScoreWriter(tmp_path / "s", corpus=pool, config={}, model={}, parents=parents)
    writer.write_window(0, np.ones(4, np.float32), np.ones(4, np.int32))
    assert writer.finish()
    answer = ask(tmp_path / "s")
    assert f"model: (no manifest) {tmp_path / 'hf'}" in answer
    assert f"gone: MISSING {tmp_path / 'x'}" in answer


def test_nothing_there_is_an_error(ask, tmp_path):
    ask(tmp_path / "nothing", expect=2)
    (tmp_path / "folder").mkdir()
    ask(tmp_path / "folder", expect=2)


def test_verify_accepts_what_is_intact_and_nothing_else(ask, chosen, pool, tmp_path):
    for path in (chosen, pool.prefix, tmp_path / "scores" / "teacher"):
        assert json.loads(ask(path, "--verify", "--json"))["verified"]
    flip_byte(Path(f"{pool.root().shards[0]}.bin"), 0)
    ask(chosen)  # cheap checks do not read the tokens
    ask(chosen, "--verify", expect=2)
    flip_byte(tmp_path / "scores" / "teacher" / "sum_nll.npy", -2)
    ask(tmp_path / "scores" / "teacher", expect=2)


@pytest.fixture
def checkpoint(tmp_path, pool) -> Path:
    """The files that `inspect` reads of a checkpoint, without a model."""
    save = tmp_path / "ckpt"
    folder = save / "iter_0000020"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"weights")
    facts = {"weights.bin": {"size": 7, "hash": hash_file(folder / "weights.bin")}}
    Manifest(
        kind="checkpoint",
        fingerprint="f",
        parents={"corpus": pool.as_parent(folder / "manifest.json")},
        content={"iteration": 20, "files": facts},
    ).write(folder / "manifest.json")
    (save / "latest_checkpointed_iteration.txt").write_text("20\n")
    return save


def test_a_checkpoint_folder_means_its_newest_checkpoint(ask, checkpoint, pool):
    answer = json.loads(ask(checkpoint, "--json", "--verify"))
    assert answer["kind"] == "checkpoint"
    assert answer["content"]["iteration"] == 20
    assert answer["parents"]["corpus"]["path"] == str(pool.prefix)
    assert json.loads(ask(checkpoint / "iter_0000020", "--json"))["fingerprint"] == "f"
    flip_byte(checkpoint / "iter_0000020" / "weights.bin", 3)
    ask(checkpoint, "--verify", expect=2)
    (checkpoint / "iter_0000020" / "weights.bin").unlink()
    ask(checkpoint, "--verify", expect=2)


def shown(ask, *words) -> list[dict]:
    return json.loads(ask(*words, "--json"))["examples"]


@pytest.mark.parametrize(
    ("order", "ids"),
    [("top", [1, 3, 0, 2]), ("bottom", [2, 0, 3, 1]), ("borderline", [3, 0, 1, 2])],
)
def test_examples_of_a_selection_come_from_the_pool_in_order(ask, chosen, order, ids):
    assert [e["id"] for e in shown(ask, chosen, "--show", 9, "--order", order)] == ids
    assert [e["id"] for e in shown(ask, chosen, "--show", 2, "--order", order)] == ids[:2]


def test_random_examples_follow_the_seed(ask, chosen):
    def order(seed):
        words = ("--show", 4, "--order", "random", "--seed", seed)
        return [e["id"] for e in shown(ask, chosen, *words)]

    assert order(1) == order(1)
    assert sorted(order(1)) == [0, 1, 2, 3]
    assert len({tuple(order(seed)) for seed in range(8)}) > 1


def test_an_example_has_text_log_probs_and_its_fate(ask, chosen, pool):
    best, *_, worst = shown(ask, chosen, "--show", 4)
    assert best == {
        "id": 1, "domain": "code", "num_tokens": int(pool.lengths[1]), "kept": True,
        "teacher_log_prob": pytest.approx(-1.5), "reference_log_prob": pytest.approx(-3.5),
        "difference": pytest.approx(2.0), "predicted_difference": None, "text": TEXTS[1],
    }  # fmt: skip
    assert worst["kept"] is False
    assert worst["difference"] == pytest.approx(-3.0)


def test_printed_examples_cannot_steer_the_terminal(ask, chosen):
    said = ask(chosen, "--show", 4)
    assert "hard [bold]text[/bold]" in said
    assert "noise \u241b[31m\u2407" in said
    assert "\x1b" not in said
    assert "log p -1.500, log p_ref -3.500, difference 2.000" in said
    assert "KEPT" in said
    assert "dropped" in said


def test_given_scores_show_a_corpus_of_their_own(ask, tmp_path, pool, chosen):
    flags = ("--teacher-scores", tmp_path / "scores/teacher")
    examples = shown(ask, pool.prefix, *flags, "--show", 4)
    assert [e["id"] for e in examples] == [0, 1, 3, 2]  # likeliest first
    assert {e["kept"] for e in examples} == {None}
    assert {e["difference"] for e in examples} == {None}


def test_examples_without_scores_can_only_be_random(ask, pool):
    ask(pool.prefix, "--show", 2, expect=2)
    assert len(shown(ask, pool.prefix, "--show", 2, "--order", "random")) == 2


def test_examples_of_scores_are_refused(ask, tmp_path, chosen):
    ask(tmp_path / "scores" / "teacher", "--show", 1, expect=2)


def test_ancestors_are_followed_through_moved_trees(tmp_path, chosen):
    (tmp_path / "new").mkdir()
    shutil.move(tmp_path / "data", tmp_path / "new" / "data")
    shutil.move(tmp_path / "scores", tmp_path / "new" / "scores")
    path = locate_manifest(tmp_path / "new" / "data" / "pile.diff")
    found = ancestors(Corpus.open(path.with_suffix("")).manifest, path)
    assert {item.state for item in found} == {"present"}


@pytest.fixture
def store(tmp_path, pool) -> Path:
    """A teacher that expects token 7 with 0.7 and token 9 with 0.2 everywhere."""
    path = tmp_path / "logits"
    parents = {"model": Parent(fingerprint="f", path="../gone")}
    writer = RecordWriter(
        path, corpus=pool, config={"encoding": Encoding().as_config(), "top_k": 2},
        facts={"vocab_size": pool.vocab_size}, parents=parents,
    )  # fmt: skip

    def record(tokens: np.ndarray) -> Record:
        n = int((tokens[:-1] != pool.eod_id).sum())
        column = np.full(n, 0.5, np.float32)
        logits = SparseLogits(
            counts=np.full(n, 2, np.uint32),
            ids=np.tile(np.array([7, 9], np.int32), n),
            log_probs=np.tile(np.log(np.array([0.7, 0.2], np.float32)), n),
            gold_log_prob=-column, entropy=column, logit_std=column, tail_mass=column / 5,
        )  # fmt: skip
        return encode(logits, Encoding(), vocab_size=pool.vocab_size)

    writer.write_window(0, [record(pool.tokens(row)) for row in writer.rows(0)])
    assert writer.finish()
    return path


def test_a_logit_store_says_what_it_is_and_shows_positions(ask, store, pool):
    answer = json.loads(ask(store, "--json", "--verify"))
    assert answer["kind"] == "logit store"
    assert answer["num_instances"] == 4
    assert answer["verified"]
    assert answer["config"] == {"encoding": {"value_bits": 10, "zstd": False}, "top_k": 2}
    assert answer["content"]["mean_entropy"] == 0.5
    assert answer["content"]["num_shards"] == 1
    assert answer["content"]["bytes_per_value"] > 0
    shown = ask(store, "--show", 2, "--rows", 3)
    assert "corpus: subset" in shown
    tokenizer, tokens = pool.tokenizer(), pool.tokens(3)
    position = shown.partition("position 1:")[2]
    assert "2 kept, tail 0.100, entropy 0.500" in position
    assert f"-> {tokenizer.decode(tokens[2:3])!r} (-0.500)" in position
    likeliest, next_likeliest = (re.escape(repr(tokenizer.decode([each]))) for each in (7, 9))
    assert re.search(rf"{likeliest} -0\.35\d  {next_likeliest} -1\.6[01]\d", position)
    assert "position 2:" not in shown


def test_shards_of_a_run_are_counted_without_what_lies_beside_them(tmp_path, pool, ask):
    writer = RecordWriter(tmp_path / "seen", corpus=pool, config={}, facts={})
    record = Record(payload=b"said", num_positions=1, num_values=1)
    for step in (1, 2):
        writer.add_shard("r0", pool.ids[:1], [record], step=step, updates=np.array([step]))
    assert writer.finish_seen()
    assert json.loads(ask(tmp_path / "seen", "--json"))["content"]["num_shards"] == 2


def test_positions_of_hidden_states_are_refused(tmp_path, pool, capsys):
    writer = RecordWriter(tmp_path / "h", corpus=pool, config={"what": "hidden"}, facts={})
    records = [
        encode_hidden(torch.zeros(len(pool.tokens(row)) - 1, 4), HiddenEncoding())
        for row in writer.rows(0)
    ]
    writer.write_window(0, records)
    assert writer.finish()
    assert main(["inspect", str(tmp_path / "h")]) == 0
    assert main(["inspect", str(tmp_path / "h"), "--show", "2"]) == 2
    assert "holds hidden states" in " ".join(capsys.readouterr().err.split())


def test_a_damaged_logit_store_is_named(ask, store):
    flip_byte(store / "shards/00000000.records", 50)
    ask(store)
    ask(store, "--verify", expect=2)
    (store / "shards/00000000.records").unlink()
    ask(store, expect=2)
