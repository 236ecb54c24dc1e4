"""Corpora on disk: stock files, published whole or not at all, opened only when intact."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.core.manifest import hash_file
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.indexed import Index, check_pointers, token_dtype
from megatron_miniplm.data.tokenizers import load_tokenizer
from megatron_miniplm.data.verify import verify
from megatron_miniplm.data.writer import CorpusWriter, root_fingerprint
from tests.small_artifacts import (
    DOMAINS,
    SEQ_LENGTH,
    flip_byte,
    random_instances,
    visible,
    write_corpus,
)


@pytest.fixture
def instances() -> list[np.ndarray]:
    return random_instances(70)


@pytest.fixture
def corpus(tmp_path, tiny_tokenizer, instances) -> Corpus:
    return write_corpus(tmp_path / "pile.v1", tiny_tokenizer, instances, per_shard=30)


@pytest.fixture
def writer(tmp_path, tiny_tokenizer):
    tokenizer = load_tokenizer(tiny_tokenizer)
    with CorpusWriter(
        tmp_path / "pile", tokenizer=tokenizer, seq_length=SEQ_LENGTH, config={}
    ) as opened:
        yield opened


def test_every_instance_comes_back_in_order(corpus, instances):
    assert corpus.num_instances == len(corpus) == len(instances)
    assert corpus.num_tokens == sum(map(len, instances))
    assert corpus.lengths.tolist() == [len(tokens) for tokens in instances]
    rows = np.random.default_rng(3).permutation(len(instances))
    for row, tokens in zip(rows, corpus.gather(rows), strict=True):
        assert tokens.dtype == corpus.dtype
        assert tokens.tolist() == instances[row].tolist()


def test_instances_of_one_call_are_dealt_over_shards(tmp_path, tiny_tokenizer, instances):
    lengths = np.array([len(tokens) for tokens in instances])
    with CorpusWriter(
        tmp_path / "bulk", tokenizer=load_tokenizer(tiny_tokenizer), seq_length=SEQ_LENGTH,
        config={}, instances_per_shard=30,
    ) as writer:  # fmt: skip
        writer.add(np.concatenate(instances), lengths, 1)
        writer.finish(DOMAINS, {})
    corpus = Corpus.open(tmp_path / "bulk")
    assert [shard.name for shard in corpus.shards] == [f"bulk-0000{n}-of-00003" for n in range(3)]
    assert [t.tolist() for t in corpus.gather(range(70))] == [t.tolist() for t in instances]


@pytest.mark.parametrize("mmap", [True, False])
def test_shards_are_stock_megatron_files(corpus, instances, mmap):
    row = 0
    for shard in corpus.shards:
        stock = IndexedDataset(str(shard), mmap=mmap)
        assert shard.with_name(shard.name + ".idx").stat().st_size == 20 * len(stock) + 42
        for at in range(len(stock)):
            assert stock[at].tolist() == instances[row].tolist()
            row += 1
    assert row == len(instances)


@pytest.mark.parametrize(("vocab", "kind"), [(65_499, np.uint16), (65_500, np.int32)])
def test_token_type_changes_where_megatron_changes_it(vocab, kind):
    assert token_dtype(vocab) == kind


def test_columns_and_tokenizer_belong_to_the_root(corpus):
    assert corpus.ids.tolist() == list(range(70))
    assert corpus.domains.tolist() == [row % 3 for row in range(70)]
    assert corpus.domain_names == DOMAINS
    assert corpus.tokenizer().vocab_size == corpus.vocab_size
    assert corpus.parent() is None
    assert corpus.root() is corpus


def test_a_pickled_corpus_opens_again(corpus):
    again = pickle.loads(pickle.dumps(corpus))
    assert again.fingerprint == corpus.fingerprint
    assert again.tokens(69).tolist() == corpus.tokens(69).tolist()


def test_a_row_out_of_range_is_an_error(corpus):
    for row in (-1, 70):
        with pytest.raises(IndexError, match=str(row)):
            corpus.tokens(row)


def test_fingerprint_says_what_is_in_it_and_not_where(tmp_path, tiny_tokenizer, instances):
    def fingerprint(name, changed, **kwargs):
        return write_corpus(tmp_path / name, tiny_tokenizer, changed, **kwargs).fingerprint

    first = fingerprint("a", instances)
    assert fingerprint("b", instances) == first
    other = [tokens.copy() for tokens in instances]
    other[5][0] ^= 1
    assert fingerprint("c", other) != first
    assert fingerprint("d", instances, domains=[0] * len(instances)) != first
    # The same tokens in the same order, cut elsewhere.
    assert fingerprint("e", [np.array([1, 2, 3]), np.array([4, 5])], domains=[0, 0]) != fingerprint(
        "f", [np.array([1, 2]), np.array([3, 4, 5])], domains=[0, 0]
    )


@pytest.mark.parametrize(
    ("tokens", "lengths", "domain", "says"),
    [
        ([1, 2, 512], [3], 0, "512"),
        ([1, -2], [2], 0, "-2"),
        ([1, 2, 3], [2], 0, "add up to 2 tokens, but 3"),
        ([1, 2, 3], [1, 2], 0, "1 to 2 tokens"),
        (list(range(SEQ_LENGTH + 2)), [SEQ_LENGTH + 2], 0, f"2 to {SEQ_LENGTH + 1}"),
        ([1, 2], [2], 1 << 16, "domain 65536"),
    ],
)
def test_instances_that_break_the_format_are_refused(writer, tokens, lengths, domain, says):
    with pytest.raises(DataError, match=says):
        writer.add(np.array(tokens), np.array(lengths), domain)


def test_an_empty_corpus_and_an_unnamed_domain_are_refused(writer):
    with pytest.raises(DataError, match="no instance"):
        writer.finish(DOMAINS, {})
    writer.add(np.array([1, 2]), np.array([2]), 3)
    with pytest.raises(DataError, match="domain 3 has no name among 3"):
        writer.finish(DOMAINS, {})


def test_a_failed_writer_leaves_no_file(tmp_path, tiny_tokenizer):
    with pytest.raises(DataError, match="vocabulary"):
        write_corpus(
            tmp_path / "x" / "pile", tiny_tokenizer, [np.array([1, 2]), np.array([9999, 1])]
        )
    assert visible(tmp_path / "x") == set()


def test_nothing_is_at_the_prefix_before_finish(tmp_path, writer):
    writer.add(np.array([1, 2]), np.array([2]), 0)
    assert not [name for name in visible(tmp_path) if not name.startswith(".")]
    with pytest.raises(DataError, match="does not exist"):
        Corpus.open(tmp_path / "pile")


def test_two_writers_of_one_prefix_do_not_mix(tmp_path, tiny_tokenizer, writer):
    with pytest.raises(ConfigError, match="another process is writing"):
        write_corpus(tmp_path / "pile", tiny_tokenizer, [np.array([1, 2])])
    writer.add(np.array([1, 2, 3]), np.array([3]), 0)
    writer.finish(DOMAINS, {})
    assert Corpus.open(tmp_path / "pile").tokens(0).tolist() == [1, 2, 3]


def test_a_finished_corpus_is_only_replaced_on_request(corpus, tiny_tokenizer):
    fresh = random_instances(5, seed=9)
    before = corpus.fingerprint
    with pytest.raises(ConfigError, match="finished already"):
        write_corpus(corpus.prefix, tiny_tokenizer, fresh)
    assert Corpus.open(corpus.prefix).fingerprint == before
    replaced = write_corpus(corpus.prefix, tiny_tokenizer, fresh, overwrite=True)
    assert [t.tolist() for t in replaced.gather(range(5))] == [t.tolist() for t in fresh]
    shards = [name for name in visible(corpus.prefix.parent) if name.endswith((".bin", ".idx"))]
    assert len(shards) == 2  # of three shards, one is left: none of the old ones


def test_files_of_others_at_the_prefix_are_not_touched(tmp_path, tiny_tokenizer):
    foreign = tmp_path / "pile-00000-of-00001.bin"
    foreign.write_bytes(b"precious")
    writer = CorpusWriter(
        tmp_path / "pile", tokenizer=load_tokenizer(tiny_tokenizer), seq_length=8, config={}
    )
    with pytest.raises(DataError, match="no artifact of ours"):
        writer.__enter__()  # before hours of work, not after
    assert visible(tmp_path) == {foreign.name}
    assert foreign.read_bytes() == b"precious"


def test_a_run_killed_between_its_moves_does_not_block_the_next(tmp_path, tiny_tokenizer):
    # What such a kill leaves: some files moved, the list of moves, no manifest.
    folder = tmp_path / ".pile.partial"
    folder.mkdir()
    moved = tmp_path / "pile-00000-of-00002.bin"
    moved.write_bytes(b"half")
    (folder / "moves.json").write_text(json.dumps([moved.name, "pile.tokenizer"]))
    write_corpus(tmp_path / "pile", tiny_tokenizer, [np.array([1, 2])])
    assert not moved.exists()
    assert verify(tmp_path / "pile") == []
    assert not folder.exists()


def test_an_intact_corpus_verifies(corpus):
    assert verify(corpus.prefix) == []


@pytest.mark.parametrize("change", [-1, 1])
def test_a_bin_of_another_size_is_refused(corpus, change):
    path = Path(f"{corpus.shards[1]}.bin")
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"x")
    with pytest.raises(DataError, match=rf"{path.name} has {len(data) + change} bytes"):
        Corpus.open(corpus.prefix)


# One byte of each part: magic, version, dtype, count, boundaries, lengths, pointers, last boundary.
@pytest.mark.parametrize("at", [3, 9, 17, 18, 26, 35, 160, -1])
def test_a_flipped_byte_anywhere_in_an_idx_is_refused(corpus, at):
    path = Path(f"{corpus.shards[0]}.idx")
    flip_byte(path, at)
    with pytest.raises(DataError, match=path.name):
        Corpus.open(corpus.prefix)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_a_missing_or_empty_shard_file_is_refused(corpus, suffix):
    path = Path(f"{corpus.shards[2]}{suffix}")
    path.write_bytes(b"")
    with pytest.raises(DataError, match=path.name):
        Corpus.open(corpus.prefix)
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        Corpus.open(corpus.prefix)


def test_a_flipped_byte_in_a_bin_is_found_by_verify(corpus):
    path = Path(f"{corpus.shards[1]}.bin")
    flip_byte(path, 10)
    (problem,) = [text for text in verify(corpus.prefix) if "hash" in text]
    assert path.name in problem


@pytest.mark.parametrize(
    ("pointers", "lengths", "bad"),
    [([0, 8], [2, 3], 1), ([-4, 0], [1, 1], 0), ([0, 2**63 - 4], [1, 2], 1), ([0, 4], [1, -1], 1)],
)
def test_an_index_that_leads_out_of_its_bin_is_refused(pointers, lengths, bad):
    index = Index(
        dtype=np.dtype(np.int32),
        lengths=np.array(lengths, np.int32),
        pointers=np.array(pointers, np.int64),
        raw=np.zeros(0, np.uint8),
    )
    with pytest.raises(DataError, match=f"sequence {bad} spans bytes {pointers[bad]} "):
        check_pointers(index, bin_bytes=19, path=Path("some.idx"))


def test_a_consistent_forgery_still_cannot_lead_out_of_the_bin(corpus):
    path = Path(f"{corpus.shards[0]}.idx")
    data = bytearray(path.read_bytes())
    data[34 + 4 * 30 : 34 + 4 * 30 + 8] = (10**9).to_bytes(8, "little")
    path.write_bytes(data)
    manifest = json.loads(corpus.manifest_path.read_text())
    manifest["content"]["shards"][0]["idx_hash"] = hash_file(path)
    manifest["fingerprint"] = root_fingerprint(manifest["content"])
    corpus.manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="sequence 0 spans bytes 1000000000"):
        Corpus.open(corpus.prefix)


def test_a_changed_manifest_is_refused(corpus):
    path = corpus.manifest_path
    manifest = json.loads(path.read_text())
    for name, value, says in (
        ("seq_length", 64, "fingerprint"),
        ("eod_id", 7, "fingerprint"),
        ("num_tokens", 1, "num_tokens is 1"),
    ):
        spoilt = manifest | {"content": manifest["content"] | {name: value}}
        path.write_text(json.dumps(spoilt))
        with pytest.raises(DataError, match=says):
            Corpus.open(corpus.prefix)


def test_a_changed_domain_column_is_refused(corpus):
    path = corpus.prefix.with_name(corpus.prefix.name + ".domain.npy")
    flip_byte(path, -1)
    with pytest.raises(DataError, match=r"domain\.npy changed"):
        _ = Corpus.open(corpus.prefix).domains


def test_another_tokenizer_in_its_place_is_refused(corpus, tiny_tokenizer, tmp_path):
    spec = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "NFC"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(spec))
    load_tokenizer(tmp_path / "other").save(corpus.prefix.with_name("pile.v1.tokenizer"))
    with pytest.raises(LineageError, match=corpus.manifest.content["tokenizer"]["fingerprint"]):
        Corpus.open(corpus.prefix).tokenizer()
