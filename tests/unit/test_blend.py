"""A blend: exact shares, nothing to remember, and one number for an instance of any corpus."""

from __future__ import annotations

import itertools
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_miniplm.core.errors import ConfigError, LineageError
from megatron_miniplm.core.manifest import read_json, write_json
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.blend_order import MAX_BLOCK, BlendOrder
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import SampleOrder, make_batch
from megatron_miniplm.data.subset import write_subset
from tests.small_artifacts import random_instances, write_corpus

SIZES = st.lists(st.integers(40, 3000), min_size=1, max_size=6)


def source_of(order: BlendOrder, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(order.sizes), rows, side="right")


@st.composite
def orders(draw: st.DrawFn) -> BlendOrder:
    sizes = draw(SIZES)
    weight = st.integers(1, 1000).map(lambda w: Fraction(w, 1000))
    weights = draw(st.lists(weight, min_size=len(sizes), max_size=len(sizes)))
    return BlendOrder(sizes, weights, seed=draw(st.integers(0, 2**31)))


@given(orders(), st.integers(0, 10**12))
@settings(max_examples=30)
def test_shares_are_exact_to_one_sample_at_the_ends_of_blocks(
    order: BlendOrder, block: int
) -> None:
    weights = [Fraction(b - a, order._denominator) for a, b in itertools.pairwise(order._edges)]
    for at in (block, block + 1):
        n = at * order.block
        counts = order.consumed(n).tolist()
        assert sum(counts) == n
        assert all(abs(c - w * n) < 1 for c, w in zip(counts, weights, strict=True))
    assert (order.consumed((block + 1) * order.block) >= order.consumed(block * order.block)).all()


@given(orders(), st.lists(st.integers(1, 900), min_size=1, max_size=3), st.integers(0, 10**9))
@settings(max_examples=25)
def test_stream_is_the_same_however_it_is_cut_and_counts_itself(
    order: BlendOrder, cuts: list[int], first: int
) -> None:
    whole = order.rows(first, sum(cuts))
    starts = first + np.cumsum([0, *cuts])
    parts = [order.rows(int(at), count) for at, count in zip(starts, cuts, strict=False)]
    assert np.array_equal(np.concatenate(parts), whole)
    found = np.bincount(source_of(order, whole), minlength=len(order.sizes))
    assert np.array_equal(order.consumed(first + sum(cuts)) - order.consumed(first), found)


def test_counts_go_on_from_the_last_ones_and_cost_what_is_between() -> None:
    sizes, weights = [10, 10**6], [Fraction(1, MAX_BLOCK), Fraction(MAX_BLOCK - 1, MAX_BLOCK)]
    order = BlendOrder(sizes, weights, seed=3)
    assert order.block == MAX_BLOCK
    for n in (MAX_BLOCK - 700, MAX_BLOCK - 200, MAX_BLOCK + 300, MAX_BLOCK + 300, 900):
        assert np.array_equal(order.consumed(n), BlendOrder(sizes, weights, seed=3).consumed(n))
    order.consumed(MAX_BLOCK - 700)
    tracemalloc.start()
    order.consumed(MAX_BLOCK - 200)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20, "500 places, not a million of them"


def test_each_corpus_goes_through_its_own_epochs() -> None:
    order = BlendOrder([50, 300], [Fraction(1, 4), Fraction(3, 4)], seed=7)
    rows = order.rows(0, 4 * order.block)
    for source, (start, size) in enumerate(((0, 50), (50, 300))):
        mine = rows[source_of(order, rows) == source] - start
        times = np.bincount(mine, minlength=size)
        assert times.max() - times.min() <= 1, "an instance comes again once all have come"
    # Inside a block the corpora are mixed: runs of one are as short as chance makes them.
    changes = (np.diff(source_of(order, rows)) != 0).mean()
    assert abs(changes - 2 * 0.25 * 0.75) < 0.04


def test_one_corpus_has_the_order_that_it_has_alone() -> None:
    order = BlendOrder([1234], [Fraction(3)], seed=10)
    assert np.array_equal(order.rows(777, 5000), SampleOrder(1234, seed=10).rows(777, 5000))
    # Runs of earlier versions go on in it: their first rows.
    assert order.rows(0, 6).tolist() == [379, 593, 367, 949, 562, 774]


def test_rare_corpora_stretch_the_block_and_never_give_back() -> None:
    order = BlendOrder([10, 10**6], [Fraction(1, 5000), Fraction(4999, 5000)], seed=1)
    assert order.block == 8192
    counts = np.array([order.consumed(n * order.block)[0] for n in range(50)])
    assert (np.diff(counts) >= 1).all()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> list[Corpus]:
    folder = tmp_path_factory.mktemp("blend")
    a = write_corpus(folder / "a", tiny_tokenizer, random_instances(70, seed=1), per_shard=30)
    b = write_corpus(folder / "b", tiny_tokenizer, random_instances(40, seed=2))
    write_subset(b, np.arange(1, 40, 2), folder / "odd", config={}, selection={})
    return [a, Corpus.open(folder / "odd")]


def opened(*words: object) -> Blend:
    return Blend.open([str(word) for word in words], seed=10)


def test_a_row_names_the_corpus_and_its_row_there(corpora: list[Corpus]) -> None:
    a, odd = corpora
    blend = opened("0.3", a.prefix, "0.7", odd.prefix)
    assert len(blend) == 90
    sources, own = blend.locate(np.array([0, 69, 70, 89]))
    assert (sources.tolist(), own.tolist()) == ([0, 0, 1, 1], [0, 69, 0, 19])
    for row, expected in ((69, a.tokens(69)), (75, odd.tokens(5))):
        assert np.array_equal(blend.tokens(row), expected)
    batch = make_batch(blend, [69, 75], length=blend.language.seq_length)
    assert batch.labels_bs[1, : len(odd.tokens(5)) - 1].tolist() == odd.tokens(5)[1:].tolist()
    said = blend.say(np.array([75, 3, 70, 2]))
    assert said == f"rows 5, 0 of {odd.prefix} and rows 3, 2 of {a.prefix}"
    assert opened(a.prefix).say(np.array([5, 3])) == "rows 5, 3"


def test_samples_and_epochs_are_said_by_corpus(corpora: list[Corpus]) -> None:
    a, odd = corpora
    found = opened("1", a.prefix, "3", odd.prefix).progress(4096)
    assert found == {
        "consumed samples (a)": 1024, "epochs (a)": 1024 / 70,
        "consumed samples (odd)": 3072, "epochs (odd)": 3072 / 20,
    }  # fmt: skip


def test_parents_differ_for_other_weights_and_not_for_other_spellings(
    corpora: list[Corpus],
) -> None:
    a, odd = (corpus.prefix for corpus in corpora)
    blend = opened("0.3", a, "0.7", odd)
    assert list(blend.parents) == ["corpus 1 of 2, weight 3/10", "corpus 2 of 2, weight 7/10"]
    assert opened("3", a, "7e0", odd).parents == blend.parents
    assert opened("0.31", a, "0.7", odd).parents.keys() != blend.parents.keys()
    assert list(opened(a, odd).parents) == [f"corpus {n} of 2, weight {n_of}/9"
                                            for n, n_of in ((1, 7), (2, 2))]  # fmt: skip
    assert list(opened(a).parents) == ["corpus"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0.5", "A", "B"], "give WEIGHT PREFIX pairs"),
        (["A", "0.5", "B", "0.5"], "give WEIGHT PREFIX pairs"),
        (["0", "A", "1", "B"], "weight 0 must be a number above 0"),
        (["nan", "A", "1", "B"], "weight nan must be a number above 0"),
        (["1", "A", "1", "A"], "twice"),
        (["1e-9", "A", "1", "B"], "one of 1,000,000,001 samples would be of"),
    ],
)
def test_what_is_no_blend_is_refused(words: list[str], message: str, corpora: list[Corpus]) -> None:
    names = {"A": corpora[0].prefix, "B": corpora[1].prefix}
    with pytest.raises(ConfigError, match=message):
        opened(*(names.get(word, word) for word in words))


def test_corpora_of_two_lengths_tokenizers_or_separators_are_refused(
    corpora: list[Corpus], corpus: Path, tmp_path: Path, tiny_tokenizer: Path
) -> None:
    with pytest.raises(LineageError, match=r"of 32 inputs, and .* of 64"):
        opened(corpora[0].prefix, corpus)
    other = tmp_path / "other_tokenizer"
    other.mkdir()
    facts = read_json(tiny_tokenizer / "tokenizer.json")
    ids = facts["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    write_json(other / "tokenizer.json", facts)
    changed = write_corpus(tmp_path / "changed", other, random_instances(5))
    with pytest.raises(LineageError, match=r"has tokenizer \w+, --train-data-path .* has \w+"):
        opened(corpora[0].prefix, changed.prefix)
