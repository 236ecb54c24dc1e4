"""Materialised subsets: the same instances as the view, in files that every stock reader takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_miniplm import _C
from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import DataError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.indexed import dtype_code
from megatron_miniplm.data.rows import RowMask
from megatron_miniplm.data.subset import view_index_reference, write_subset
from megatron_miniplm.data.verify import verify
from tests.small_artifacts import flip_byte, random_instances, visible, write_corpus

COUNT = 90
ROWS = np.array([0, 1, 2, 7, 8, 30, 31, 59, 88])


@pytest.fixture
def corpus(tmp_path, tiny_tokenizer) -> Corpus:
    return write_corpus(
        tmp_path / "data/pile", tiny_tokenizer, random_instances(COUNT), per_shard=30
    )


def choose(parent: Corpus, prefix: Path, rows=ROWS, **kwargs) -> Corpus:
    write_subset(parent, rows, prefix, config={}, selection={}, **kwargs)
    return Corpus.open(prefix)


@pytest.mark.parametrize("mmap", [True, False])
def test_stock_readers_take_slices_of_a_materialised_subset(tmp_path, corpus, mmap):
    copy = choose(corpus, tmp_path / "copy", materialize=True)
    expected = [tokens.tolist() for tokens in corpus.gather(ROWS)]
    stocks = [IndexedDataset(str(shard), mmap=mmap) for shard in copy.shards]
    assert [stock[at].tolist() for stock in stocks for at in range(len(stock))] == expected
    slices = [part.tolist() for stock in stocks for part in stock[0 : len(stock)]]
    assert slices == expected
    assert not any(Path(f"{shard}.bin").is_symlink() for shard in copy.shards)


def test_stock_merging_keeps_every_instance(tmp_path, corpus):
    copy = choose(corpus, tmp_path / "copy", materialize=True)
    builder = IndexedDatasetBuilder(str(tmp_path / "merged.bin"), dtype=np.uint16)
    for shard in copy.shards:
        builder.add_index(str(shard))
    builder.finalize(str(tmp_path / "merged.idx"))
    merged = IndexedDataset(str(tmp_path / "merged"))
    assert [merged[at].tolist() for at in range(len(merged))] == [
        tokens.tolist() for tokens in corpus.gather(ROWS)
    ]


def test_a_copy_and_a_view_are_the_same_choice(tmp_path, corpus):
    view, copy = choose(corpus, tmp_path / "view"), choose(corpus, tmp_path / "c", materialize=True)
    assert copy.fingerprint == view.fingerprint
    assert copy.ids.tolist() == view.ids.tolist() == ROWS.tolist()
    assert copy.domains.tolist() == view.domains.tolist()
    assert verify(copy.prefix) == []
    # A subset of the copy is a subset of the root like any other.
    again, direct = (choose(of, tmp_path / f"{of.prefix.name}2", np.array([3, 8]))
                     for of in (copy, view))  # fmt: skip
    assert again.fingerprint == direct.fingerprint
    assert [t.tolist() for t in again.gather([0, 1])] == [t.tolist() for t in direct.gather([0, 1])]
    assert verify(again.prefix) == []


def test_verify_finds_tokens_that_are_not_the_parent_s(tmp_path, corpus):
    copy = choose(corpus, tmp_path / "copy", materialize=True)
    flip_byte(Path(f"{copy.shards[0]}.bin"), 0)
    problems = verify(copy.prefix)
    assert any("has hash" in problem for problem in problems)
    assert any("instance 0" in problem and "other tokens" in problem for problem in problems)


def test_a_bin_that_shrinks_while_it_is_copied_leaves_nothing(tmp_path, corpus):
    path = Path(f"{corpus.shards[1]}.bin")
    path.write_bytes(path.read_bytes()[:-40])  # after it was opened and its size checked
    with pytest.raises((OSError, DataError)):
        choose(corpus, tmp_path / "new" / "copy", np.arange(COUNT), materialize=True)
    assert visible(tmp_path / "new") == set()


@given(data=st.data())
def test_a_masked_index_is_byte_identical_to_the_numpy_definition(tmp_path_factory, data):
    count = data.draw(st.integers(1, 200))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    lengths = rng.integers(0, 2**31, count).astype(np.int32)
    pointers = rng.integers(0, 2**60, count)
    rows = np.flatnonzero(rng.random(count) < data.draw(st.sampled_from([0.0, 0.1, 0.9, 1.0])))
    path = tmp_path_factory.getbasetemp() / "masked.idx"
    made = index_of(path, lengths, pointers, rows, bin_bytes=2**61 + 2**33, threads=2)
    assert made == view_index_reference(lengths, pointers, rows, np.dtype(np.int32))


def index_of(path, lengths, pointers, rows, *, bin_bytes, threads=1, contiguous=False) -> bytes:
    with path.open("wb") as file:
        count, tokens = _C.write_masked_index(
            file.fileno(), lengths=lengths, pointers=pointers,
            mask=RowMask.of_rows(rows, len(lengths)).bits, bytes_per_token=4,
            dtype_code=dtype_code(np.dtype(np.int32)), bin_bytes=bin_bytes,
            contiguous=contiguous, threads=threads,
        )  # fmt: skip
    assert count == len(rows)
    assert tokens == int(lengths[rows].sum(dtype=np.int64))
    return path.read_bytes()


@pytest.mark.parametrize("contiguous", [False, True])
def test_many_chunks_and_threads_write_one_index(tmp_path, contiguous):
    count = 700_000  # three chunks
    lengths = np.random.default_rng(0).integers(1, 9, count).astype(np.int32)
    pointers = 4 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    rows = np.flatnonzero(np.random.default_rng(1).random(count) < 0.5)
    made = index_of(
        tmp_path / "a.idx", lengths, pointers, rows, bin_bytes=4 * int(lengths.sum()), threads=3,
        contiguous=contiguous,
    )  # fmt: skip
    if contiguous:
        pointers = np.zeros(count, np.int64)
        pointers[rows[1:]] = 4 * np.cumsum(lengths[rows], dtype=np.int64)[:-1]
    assert made == view_index_reference(lengths, pointers, rows, np.dtype(np.int32))


@pytest.mark.parametrize(("pointer", "length"), [(41, 1), (-4, 1), (0, -1), (2**63 - 1, 1)])
def test_sequences_outside_the_bin_are_refused(tmp_path, pointer, length):
    lengths, pointers = np.array([1, length], np.int32), np.array([0, pointer])
    with pytest.raises(ValueError, match=f"sequence 1 has {length} tokens"):
        index_of(tmp_path / "a.idx", lengths, pointers, np.array([0, 1]), bin_bytes=43)
    mask = RowMask.of_rows(np.array([0, 1]), 2).bits
    (tmp_path / "source").write_bytes(bytes(43))
    with (
        (tmp_path / "source").open("rb") as source,
        (tmp_path / "target").open("wb") as target,
        pytest.raises(ValueError, match=f"sequence 1 has {length} tokens"),
    ):
        _C.copy_chosen_tokens(
            source.fileno(), target.fileno(), lengths=lengths, pointers=pointers, mask=mask,
            bytes_per_token=4, bin_bytes=43,
        )  # fmt: skip


@pytest.mark.parametrize("share", [0.0005, 0.02, 0.3, 0.97, 1.0])
def test_tokens_are_copied_whole_whatever_the_ranges(tmp_path, share):
    rng = np.random.default_rng(3)
    count = 3000
    lengths = rng.integers(1, 3000, count).astype(np.int32)  # 18 MB: several windows
    pointers = 4 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    tokens = rng.integers(0, 2**31, int(lengths.sum()), dtype=np.int32)
    tokens.tofile(tmp_path / "source")
    rows = np.flatnonzero(rng.random(count) < share)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb") as target:
        copied = _C.copy_chosen_tokens(
            source.fileno(), target.fileno(), lengths=lengths, pointers=pointers,
            mask=RowMask.of_rows(rows, count).bits, bytes_per_token=4, bin_bytes=tokens.nbytes,
        )  # fmt: skip
    starts = pointers // 4
    expected = [tokens[starts[row] : starts[row] + lengths[row]] for row in rows]
    assert copied == 4 * int(lengths[rows].sum())
    assert (tmp_path / "target").read_bytes() == b"".join(part.tobytes() for part in expected)


def test_the_command_copies_on_request(tmp_path, corpus):
    flags = ["select", "--data-path", str(corpus.prefix), "--selector", "random"]
    for name, more in (("view", []), ("copy", ["--materialize"])):
        assert main([*flags, "--output-prefix", str(tmp_path / name), *more]) == 0
    view, copy = Corpus.open(tmp_path / "view"), Corpus.open(tmp_path / "copy")
    assert copy.fingerprint == view.fingerprint
    assert copy.manifest.content["materialized"]
    assert sum(Path(f"{s}.bin").lstat().st_size for s in copy.shards) == 2 * copy.num_tokens
