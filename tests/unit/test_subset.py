"""Subsets: stock Megatron reads them, no token is copied, and they never outlive their meaning."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.core.manifest import hash_file
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.data.verify import verify
from tests.small_artifacts import flip_byte, random_instances, visible, write_corpus

COUNT = 90


@pytest.fixture
def corpus(tmp_path, tiny_tokenizer) -> Corpus:
    """Three shards of 30 instances."""
    return write_corpus(
        tmp_path / "data/pile", tiny_tokenizer, random_instances(COUNT), per_shard=30
    )


def choose(parent: Corpus, rows, prefix: Path, **kwargs) -> Corpus:
    write_subset(
        parent, np.array(rows), prefix, **({"config": {}, "selection": {"why": "test"}} | kwargs)
    )
    return Corpus.open(prefix)


@pytest.mark.parametrize("mmap", [True, False])
def test_stock_megatron_reads_the_parent_s_tokens_instance_by_instance(tmp_path, corpus, mmap):
    rows = np.flatnonzero(np.random.default_rng(0).random(COUNT) < 0.4)
    subset = choose(corpus, rows, tmp_path / "chosen")
    stocks = [IndexedDataset(str(shard), mmap=mmap) for shard in subset.shards]
    seen = [stock[at].tolist() for stock in stocks for at in range(len(stock))]
    assert seen == [tokens.tolist() for tokens in corpus.gather(rows)]
    assert seen == [tokens.tolist() for tokens in subset.gather(range(len(subset)))]


@pytest.mark.parametrize("link", ["relative", "hard", "absolute"])
def test_an_instance_costs_20_bytes_and_no_token_is_copied(tmp_path, corpus, link):
    subset = choose(corpus, range(0, 60, 2), tmp_path / "deep/er/chosen", link=link)
    for shard, root in zip(subset.shards, corpus.shards[:2], strict=True):
        assert os.path.getsize(f"{shard}.idx") == 20 * 15 + 42
        assert os.stat(f"{shard}.bin").st_ino == os.stat(f"{root}.bin").st_ino
    target = Path(f"{subset.shards[0]}.bin")
    assert target.is_symlink() == (link != "hard")
    if link != "hard":
        assert target.readlink().is_absolute() == (link == "absolute")


def test_shards_without_a_chosen_instance_are_left_out(tmp_path, corpus):
    subset = choose(corpus, [2, 65, 66], tmp_path / "chosen")
    assert [shard.name for shard in subset.shards] == [
        "chosen-00000-of-00002",
        "chosen-00001-of-00002",
    ]
    facts = subset.manifest.content["shards"]
    assert [fact["root_shard"] for fact in facts] == ["pile-00000-of-00003", "pile-00002-of-00003"]
    assert [fact["num_instances"] for fact in facts] == [1, 2]


class _StockTokenizer:
    """What GPTDataset asks of a tokenizer; the ids are already there."""

    eod = 0
    pad = -1
    vocab_size = 512
    unique_identifiers = {"name": "none"}  # noqa: RUF012


def gpt_samples(prefix: Path, cache: Path, count: int) -> list[dict[str, list[int]]]:
    """Samples of the stock GPTDataset over one prefix, in its own shuffled order."""
    config = GPTDatasetConfig(
        random_seed=7, sequence_length=16, blend=([str(prefix)], None), split="1,0,0",
        tokenizer=_StockTokenizer(), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False, path_to_cache=str(cache),
    )  # fmt: skip
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [count, 0, 0], lambda: True, config)
    dataset = builder.build()[0]
    return [
        {name: value.tolist() for name, value in dataset[at].items()} for at in range(len(dataset))
    ]


def test_gpt_dataset_gives_the_samples_of_a_materialised_copy(tmp_path, tiny_tokenizer):
    corpus = write_corpus(tmp_path / "pile", tiny_tokenizer, random_instances(COUNT))
    rows = np.flatnonzero(np.random.default_rng(1).random(COUNT) < 0.5)
    subset = choose(corpus, rows, tmp_path / "chosen")
    builder = IndexedDatasetBuilder(str(tmp_path / "copy.bin"), dtype=np.uint16)
    for tokens in corpus.gather(rows):
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(tmp_path / "copy.idx"))
    count = 2 * subset.num_tokens // 16  # two epochs
    chosen = gpt_samples(subset.shards[0], tmp_path / "cache_a", count)
    copied = gpt_samples(tmp_path / "copy", tmp_path / "cache_b", count)
    assert len(chosen) >= count
    assert chosen == copied


def test_a_subset_of_a_subset_speaks_root_ids(tmp_path, corpus):
    pool = choose(corpus, range(10, 80), tmp_path / "pool")
    best = choose(pool, [0, 30, 69], tmp_path / "elsewhere" / "best")
    assert best.ids.tolist() == [10, 40, 79]
    assert best.root_fingerprint == corpus.fingerprint
    assert best.parent().prefix == pool.prefix
    assert best.root().prefix == corpus.prefix
    assert best.domains.tolist() == corpus.domains[[10, 40, 79]].tolist()
    assert best.tokenizer().fingerprint == corpus.tokenizer().fingerprint
    assert [t.tolist() for t in best.gather([0, 1, 2])] == [
        t.tolist() for t in corpus.gather([10, 40, 79])
    ]
    # The links lead to the root's own files, not through the pool's.
    assert Path(f"{best.shards[0]}.bin").readlink().name == "pile-00000-of-00003.bin"
    assert verify(best.prefix) == []


def test_equal_choices_have_equal_fingerprints_whatever_the_way(tmp_path, corpus):
    direct = choose(corpus, [12, 50], tmp_path / "direct")
    pool = choose(corpus, range(10, 80), tmp_path / "pool")
    assert choose(pool, [2, 40], tmp_path / "twice").fingerprint == direct.fingerprint
    assert choose(corpus, [12, 51], tmp_path / "other").fingerprint != direct.fingerprint


def test_a_whole_tree_can_be_moved(tmp_path, corpus):
    choose(corpus, [3, 44], tmp_path / "data" / "chosen")
    shutil.move(tmp_path / "data", tmp_path / "moved")
    subset = Corpus.open(tmp_path / "moved" / "chosen")
    assert subset.root().prefix == tmp_path / "moved" / "pile"
    assert verify(subset.prefix) == []


def test_links_hold_through_a_linked_folder(tmp_path, corpus):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far" / "away")
    subset = choose(corpus, [3, 44], tmp_path / "near" / "chosen")
    assert subset.tokens(1).tolist() == corpus.tokens(44).tolist()


def test_a_missing_root_is_named(tmp_path, corpus):
    choose(corpus, [3], tmp_path / "chosen")
    Path(f"{corpus.shards[0]}.bin").unlink()
    with pytest.raises(DataError, match=r"chosen-00000-of-00001\.bin does not exist; it links to"):
        Corpus.open(tmp_path / "chosen")


def test_a_rewritten_root_is_refused(tmp_path, corpus, tiny_tokenizer):
    subset = choose(corpus, [3], tmp_path / "chosen")
    other = random_instances(COUNT)
    other[3][0] ^= 1  # one token, so that every size stays as it was
    write_corpus(corpus.prefix, tiny_tokenizer, other, per_shard=30, overwrite=True)
    with pytest.raises(LineageError, match=f"{corpus.fingerprint}.*rewritten"):
        Corpus.open(subset.prefix)


def test_a_rewritten_parent_is_refused(tmp_path, corpus):
    pool = choose(corpus, range(10, 80), tmp_path / "pool")
    best = choose(pool, [5], tmp_path / "best")
    choose(corpus, range(20, 80), tmp_path / "pool", overwrite=True)
    with pytest.raises(LineageError, match="the parent of"):
        best.parent()
    assert Corpus.open(best.prefix).tokens(0).tolist() == corpus.tokens(15).tolist()


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [
        ([], ConfigError, "no instance"),
        ([3, 3], DataError, "rows 3 to 3 .* must ascend strictly"),
        ([40, 3, 50], DataError, "must ascend strictly"),  # out of order across shards only
        ([-1], DataError, "rows -1 to -1"),
        ([COUNT], DataError, rf"\({COUNT} instances\)"),
    ],
)
def test_wrong_rows_are_refused_and_leave_nothing(tmp_path, corpus, rows, error, says):
    with pytest.raises(error, match=says):
        choose(corpus, np.array(rows, np.int64), tmp_path / "new" / "chosen")
    assert visible(tmp_path / "new") == set()


def test_the_same_again_is_no_work_and_another_is_refused(tmp_path, corpus):
    choose(corpus, [3, 44], tmp_path / "chosen")
    before = {path.name: path.lstat().st_mtime_ns for path in tmp_path.iterdir()}
    choose(corpus, [3, 44], tmp_path / "chosen")
    for change in ({"config": {"seed": 2}}, {"rows": [3, 45]}):
        with pytest.raises(ConfigError, match="finished already"):
            choose(corpus, change.pop("rows", [3, 44]), tmp_path / "chosen", **change)
    assert {path.name: path.lstat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_overwriting_removes_the_old_shards_and_megatron_s_stale_indices(tmp_path, corpus):
    old = choose(corpus, [3, 44, 70], tmp_path / "chosen")
    caches = [shard / "cache" / "GPTDataset_indices" for shard in old.shards]
    for cache in caches:
        cache.mkdir(parents=True)
        (cache / "stale-document_index.npy").write_bytes(b"old")
    keep = old.shards[0] / "notes.txt"
    keep.write_text("not Megatron's")
    choose(corpus, [50], tmp_path / "chosen", overwrite=True)
    assert not any(cache.exists() for cache in caches)
    assert keep.exists()
    assert {name for name in visible(tmp_path) if name.startswith("chosen-")} == {
        "chosen-00000-of-00001.idx",
        "chosen-00000-of-00001.bin",
        "chosen-00000-of-00003",  # the folder with the notes
    }
    assert verify(corpus.prefix) == []  # links were removed, not what they led to


def test_stale_indices_of_a_prefix_that_was_cleared_by_hand_are_removed(tmp_path, corpus):
    cache = tmp_path / "chosen-00000-of-00001" / "cache"
    cache.mkdir(parents=True)
    choose(corpus, [50], tmp_path / "chosen")
    assert not cache.exists()


@pytest.mark.parametrize("name", ["pile", "pool"])
def test_a_subset_cannot_replace_its_own_input(tmp_path, corpus, name):
    pool = choose(corpus, range(10, 80), corpus.prefix.with_name("pool"))
    with pytest.raises(ConfigError, match="own input"):
        choose(pool, [1], corpus.prefix.with_name(name), overwrite=True)
    assert verify(pool.prefix) == []


def test_a_subset_cannot_replace_a_corpus(tmp_path, corpus, tiny_tokenizer):
    other = write_corpus(tmp_path / "other", tiny_tokenizer, random_instances(4))
    with pytest.raises(ConfigError, match="replace a corpus by a subset"):
        choose(corpus, [1], other.prefix, overwrite=True)
    assert verify(other.prefix) == []


def test_changed_ids_are_refused(tmp_path, corpus):
    subset = choose(corpus, [3, 44, 70], tmp_path / "chosen")
    path = tmp_path / "chosen.ids.npy"
    np.save(path, np.array([3, 44, 71]))
    with pytest.raises(DataError, match="ids were changed"):
        Corpus.open(subset.prefix)
    np.save(path, np.array([3, 44]))
    with pytest.raises(DataError, match=r"ids\.npy holds int64\[2\], expected int64\[3\]"):
        Corpus.open(subset.prefix)


def test_verify_finds_an_index_that_leads_to_other_tokens(tmp_path, corpus):
    subset = choose(corpus, [3, 4], tmp_path / "chosen")
    idx = Path(f"{subset.shards[0]}.idx")
    # A careful vandal: swap the two pointers, keep the manifest's hash in step.
    data = bytearray(idx.read_bytes())
    at = 34 + 4 * 2
    data[at : at + 16] = data[at + 8 : at + 16] + data[at : at + 8]
    other = bytes(data)
    manifest = json.loads(subset.manifest_path.read_text())
    idx.write_bytes(other)
    manifest["content"]["shards"][0]["idx_hash"] = hash_file(idx)
    subset.manifest_path.write_text(json.dumps(manifest))
    assert any("points at other tokens" in problem for problem in verify(subset.prefix))


def test_verify_finds_a_flipped_token_in_the_root(tmp_path, corpus):
    subset = choose(corpus, [3, 44, 70], tmp_path / "chosen")
    flip_byte(Path(f"{corpus.shards[1]}.bin"), 4)
    assert any("chosen-00001" in problem for problem in verify(subset.prefix))
