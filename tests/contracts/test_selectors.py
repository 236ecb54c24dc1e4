"""What holds for every registered selector; a new file in `selection` is tested from here on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import megatron_miniplm.selection  # noqa: F401 - fills the registry
from megatron_miniplm.selection.registry import SELECTORS, SelectorInput
from megatron_miniplm.selection.top_k import count_kept, top_k

NAMES = SELECTORS.names()
nll = st.floats(0, 1e4, width=32)


@st.composite
def inputs(draw, min_size: int = 1) -> SelectorInput:
    """Scores of a corpus or subset: ids ascend, with gaps; many ties."""
    count = draw(st.integers(min_size, 50))
    gaps = draw(arrays(np.int64, count, elements=st.integers(1, 1000)))
    columns = {
        f"{role}_scores": draw(arrays(np.float64, count, elements=st.one_of(nll, st.just(2.0))))
        for role in ("teacher", "reference", "proxy")
    }
    return SelectorInput(ids=np.cumsum(gaps) - 1, seed=draw(st.integers(0, 2**31)), **columns)


def take(given_inputs: SelectorInput, rows: np.ndarray) -> SelectorInput:
    return SelectorInput(
        ids=given_inputs.ids[rows],
        seed=given_inputs.seed,
        teacher_scores=given_inputs.teacher_nll[rows],
        reference_scores=given_inputs.reference_nll[rows],
        proxy_scores=given_inputs.predicted_difference[rows],
    )


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30)
@given(given_inputs=inputs())
def test_keys_are_finite_float64_one_an_instance(name, given_inputs):
    keys = SELECTORS[name](given_inputs)
    assert keys.shape == given_inputs.ids.shape
    assert keys.dtype == np.float64
    assert np.isfinite(keys).all()


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30)
@given(given_inputs=inputs())
def test_a_selector_is_pure(name, given_inputs):
    before = take(given_inputs, np.arange(len(given_inputs.ids)))
    first = SELECTORS[name](given_inputs)
    first_copy = first.copy()
    first += 1  # a key column is the caller's own
    assert np.array_equal(SELECTORS[name](given_inputs), first_copy)
    for column in ("ids", "teacher_nll", "reference_nll", "predicted_difference"):
        assert np.array_equal(getattr(given_inputs, column), getattr(before, column))


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30)
@given(given_inputs=inputs(), data=st.data())
def test_reordering_or_thinning_the_corpus_reorders_or_thins_the_keys(name, given_inputs, data):
    rows = np.array(
        data.draw(st.lists(st.integers(0, len(given_inputs.ids) - 1), unique=True, min_size=1))
    )
    assert np.array_equal(
        SELECTORS[name](take(given_inputs, rows)), SELECTORS[name](given_inputs)[rows]
    )


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30)
@given(given_inputs=inputs(), ratio=st.sampled_from([0.01, 0.29, 0.5, 0.57, 1.0]))
def test_the_ratio_is_honoured_by_sorted_unique_rows(name, given_inputs, ratio):
    count = len(given_inputs.ids)
    rows = top_k(SELECTORS[name](given_inputs), count_kept(ratio, count))
    assert len(rows) == max(1, round(ratio * 100) * count // 100)
    assert (np.diff(rows) > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < count


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
def test_equal_scores_keep_the_first_instances(name):
    same = SelectorInput(
        ids=np.arange(9),
        seed=1,
        teacher_scores=np.full(9, 2.5),
        reference_scores=np.full(9, 3.5),
        proxy_scores=np.full(9, 1.0),
    )
    assert top_k(SELECTORS[name](same), 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
@settings(deadline=None, max_examples=30)
@given(given_inputs=inputs(min_size=2))
def test_a_rule_on_scores_does_not_depend_on_the_seed(name, given_inputs):
    other = SelectorInput(
        ids=given_inputs.ids,
        seed=given_inputs.seed + 1,
        teacher_scores=given_inputs.teacher_nll,
        reference_scores=given_inputs.reference_nll,
        proxy_scores=given_inputs.predicted_difference,
    )
    assert np.array_equal(SELECTORS[name](other), SELECTORS[name](given_inputs))
