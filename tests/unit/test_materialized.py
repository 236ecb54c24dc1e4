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
from megatron_miniplm.data import verify as verify_module
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.rows import RowMask
from megatron_miniplm.data.subset import write_subset
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


@pytest.mark.parametrize("row", [0, 3, 4, 8])
def test_verify_finds_tokens_that_are_not_the_parent_s(tmp_path, corpus, row):
    copy = choose(corpus, tmp_path / "copy", materialize=True)
    shard, local = copy.locate(row)
    flip_byte(Path(f"{shard.prefix}.bin"), int(shard.index.pointers[local]) + 1)
    problems = verify(copy.prefix)
    assert any("has hash" in problem for problem in problems)
    assert any(f"instance {ROWS[row]} of" in problem for problem in problems)


def test_a_copy_of_a_copy_with_other_shards_is_verified_row_by_row(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(verify_module, "_BLOCK_ROWS", 2)
    copy = choose(corpus, tmp_path / "copy", np.arange(1, COUNT, 2), materialize=True)
    again = choose(copy, tmp_path / "again", np.arange(14, 31), materialize=True)
    assert verify(again.prefix) == []
    flip_byte(Path(f"{again.shards[-1]}.bin"), 0)
    (first,) = again.ids[again.shard_starts[-2], None].tolist()
    assert any(f"instance {first} of" in problem for problem in verify(again.prefix))


@given(st.data())
def test_the_first_difference_is_found_wherever_it_is(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    lengths = rng.integers(0, 4, data.draw(st.integers(1, 30))).astype(np.int32)
    pointers = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    tokens = rng.integers(0, 3, 2 * int(lengths.sum())).astype(np.uint8)
    rows = np.flatnonzero(rng.random(len(lengths)) < 0.6)
    own = [tokens[p : p + 2 * n] for p, n in zip(pointers[rows], lengths[rows], strict=True)]
    mine = np.concatenate([np.zeros(0, np.uint8), *own])
    expected = -1
    if len(mine) and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(mine) - 1))
        mine[at] += 1
        expected = int(np.searchsorted(2 * np.cumsum(lengths[rows]), at, side="right"))
    pad = np.ones(1, np.int32)  # a row before those that are compared
    found = _C.first_difference(
        lengths=np.concatenate([pad, lengths[rows]]),
        pointers=np.concatenate([[0], 2 * (np.cumsum(lengths[rows]) - lengths[rows])]),
        tokens=np.append(mine, np.zeros(2, np.uint8)), first=1, other_lengths=lengths,
        other_pointers=pointers, other_tokens=tokens, other_rows=rows, bytes_per_token=2,
    )  # fmt: skip
    assert found == expected


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"first": 3}, "rows 3 to 5 of 4"),
        ({"other_rows": np.array([0, 4])}, "row 4 of 4"),
        ({"other_rows": np.array([-1, 0])}, "row -1 of 4"),
        ({"pointers": np.array([0, 0, 7, 0])}, "sequence 2 has 1 tokens .* at byte 7"),
        ({"other_pointers": np.array([8, 0, 0, 0])}, "sequence 0 has 1 tokens .* at byte 8"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(change, says):
    one = {"lengths": np.ones(4, np.int32), "pointers": np.zeros(4, np.int64)}
    one["tokens"] = np.zeros(8, np.uint8)
    both = {**one, **{f"other_{name}": value for name, value in one.items()}}
    given_rows = {"first": 1, "other_rows": np.array([0, 1]), "bytes_per_token": 2}
    with pytest.raises(ValueError, match=says):
        _C.first_difference(**{**both, **given_rows, **change})


def test_a_bin_that_shrinks_while_it_is_copied_leaves_nothing(tmp_path, corpus):
    path = Path(f"{corpus.shards[1]}.bin")
    path.write_bytes(path.read_bytes()[:-40])  # after it was opened and its size checked
    with pytest.raises((OSError, DataError)):
        choose(corpus, tmp_path / "new" / "copy", np.arange(COUNT), materialize=True)
    assert visible(tmp_path / "new") == set()


@pytest.mark.parametrize(("pointer", "length"), [(41, 1), (-4, 1), (0, -1), (2**63 - 1, 1)])
def test_sequences_outside_the_bin_are_not_copied(tmp_path, pointer, length):
    lengths, pointers = np.array([1, length], np.int32), np.array([0, pointer])
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
