"""The streaming selection against the in-memory oracle, bit for bit, however it has to work."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_miniplm.selection  # noqa: F401 - fills the registry
from megatron_miniplm import _C
from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.data.rows import RowMask
from megatron_miniplm.selection.key_source import KeySource, ScoreColumns, ShardColumns
from megatron_miniplm.selection.registry import SELECTORS, Selector, SelectorInput
from megatron_miniplm.selection.streaming import Limits, Selection, stream_top_k
from megatron_miniplm.selection.top_k import top_k

# Every way through the algorithm: all candidates; probe and bracket; overflow and counting passes.
LIMITS = [
    Limits(),
    Limits(direct_rows=8, probe_rows=32, probe_block=4, max_candidates=6, threads=2),
    Limits(direct_rows=0, probe_rows=8, probe_block=2, max_candidates=1),
]
FEW = [0.0, 1.0, 2.0, 3.0]
WIDE = [0.0, 1e-45, 1.2e-38, 0.1, 1.0, 7.5, 3e38]  # denormal, smallest normal, huge


@st.composite
def columns(draw, max_size: int = 200) -> dict[str, np.ndarray]:
    """Scores of up to `max_size` rows: many ties, or hardly any, or of all magnitudes."""
    count = draw(st.integers(1, max_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["few", "wide", "many", "equal"]))
    found = {}
    for role in ("teacher", "reference", "predicted"):
        found[role] = {
            "few": lambda: rng.choice(FEW, count),
            "wide": lambda: rng.choice(WIDE, count),
            "many": lambda: rng.uniform(0, 9, count),
            "equal": lambda: np.full(count, 2.5),
        }[kind]().astype(np.float32)
    found["tokens"] = rng.integers(0, 4, count).astype(np.int32)
    found["lengths"] = rng.integers(1, 9, count).astype(np.int32)
    found["domains"] = rng.integers(0, 3, count).astype(np.uint16)
    found["ids"] = np.cumsum(rng.integers(1, 9, count))
    return found


def shards_of(found: dict[str, np.ndarray], cuts: list[int]) -> list[ShardColumns]:
    bounds = [0, *sorted(min(cut, len(found["ids"])) for cut in cuts), len(found["ids"])]
    return [
        ShardColumns(
            num_rows=stop - start,
            first_row=start,
            teacher=ScoreColumns(
                sum_nll=found["teacher"][start:stop], num_tokens=found["tokens"][start:stop]
            ),
            reference=ScoreColumns(
                sum_nll=found["reference"][start:stop], num_tokens=found["tokens"][start:stop]
            ),
            predicted=found["predicted"][start:stop] if "predicted" in found else None,
            ids=found["ids"][start:stop],
            lengths=found["lengths"][start:stop],
            domains=lambda start=start, stop=stop: found["domains"][start:stop],
        )
        for start, stop in pairwise(bounds)
    ]


def keys_of(found: dict[str, np.ndarray], name: str, *, per_token: bool, seed: int) -> np.ndarray:
    def nll(role: str) -> np.ndarray:
        sums = found[role].astype(np.float64)
        return sums / np.maximum(found["tokens"], 1) if per_token else sums

    return SELECTORS[name](
        SelectorInput(
            ids=found["ids"], seed=seed, teacher_scores=nll("teacher"),
            reference_scores=nll("reference"),
            proxy_scores=found["predicted"].astype(np.float64) if "predicted" in found else None,
        )
    )  # fmt: skip


def stranger(selector: Selector) -> Selector:
    """The same function as another object: not known natively, so evaluated by blocks in numpy."""

    def other(inputs: SelectorInput) -> np.ndarray:
        return selector(inputs)

    return other


def rows_of(selection: Selection, shards: list[ShardColumns]) -> list[int]:
    return [
        row
        for mask, shard in zip(selection.masks, shards, strict=True)
        for row in (mask.rows() + shard.first_row).tolist()
    ]


cuts = st.lists(st.integers(0, 200), max_size=4)


@settings(max_examples=200)
@given(found=columns(), cuts=cuts, data=st.data())
def test_the_result_is_the_oracle_s_with_every_selector_shape_and_limit(found, cuts, data):
    name = data.draw(st.sampled_from(SELECTORS.names()))
    per_token, native = data.draw(st.booleans()), data.draw(st.booleans())
    shards, keys = shards_of(found, cuts), keys_of(found, name, per_token=per_token, seed=5)
    k = data.draw(st.integers(1, len(keys)))
    selector = SELECTORS[name] if native else stranger(SELECTORS[name])
    source = KeySource(shards=shards, selector=selector, seed=5, per_token=per_token)
    chosen = stream_top_k(source, [k], limits=data.draw(st.sampled_from(LIMITS)))
    expected = top_k(keys, k)
    assert rows_of(chosen, shards) == expected.tolist()
    assert chosen.num_kept == k
    assert chosen.threshold == keys[expected].min()


@settings(max_examples=60)
@given(found=columns(), cuts=cuts, data=st.data())
def test_a_token_budget_takes_the_longest_run_of_ranks_that_fits(found, cuts, data):
    shards, keys = shards_of(found, cuts), keys_of(found, "difference", per_token=True, seed=0)
    order = sorted(range(len(keys)), key=lambda row: (-keys[row], row))
    running = np.cumsum(found["lengths"][order])
    budget = data.draw(st.integers(0, int(running[-1]) + 3))
    expected = sorted(order[: int(np.searchsorted(running, budget, side="right"))])
    source = KeySource(shards=shards, selector=SELECTORS["difference"], weigh_tokens=True)
    chosen = stream_top_k(source, [budget], limits=data.draw(st.sampled_from(LIMITS)))
    assert rows_of(chosen, shards) == expected
    if expected:
        assert chosen.threshold == keys[expected].min()


@settings(max_examples=60)
@given(found=columns(), cuts=cuts, data=st.data())
def test_each_stratum_has_its_own_top(found, cuts, data):
    shards, keys = shards_of(found, cuts), keys_of(found, "difference", per_token=True, seed=0)
    sizes = np.bincount(found["domains"], minlength=3)
    budget = [data.draw(st.integers(0, int(size))) for size in sizes]
    expected = []
    for d, k in enumerate(budget):
        if k:
            expected += top_k(keys, k, candidates=found["domains"] == d).tolist()
    source = KeySource(shards=shards, selector=SELECTORS["difference"], strata=("a", "b", "c"))
    chosen = stream_top_k(source, budget, limits=data.draw(st.sampled_from(LIMITS)))
    assert rows_of(chosen, shards) == sorted(expected)


@settings(max_examples=60)
@given(found=columns(), cuts=cuts, least=st.integers(0, 3), data=st.data())
def test_rows_with_few_tokens_are_never_chosen(found, cuts, least, data):
    shards, keys = shards_of(found, cuts), keys_of(found, "teacher", per_token=False, seed=0)
    candidates = found["tokens"] >= least
    source = KeySource(
        shards=shards, selector=SELECTORS["teacher"], per_token=False, min_tokens=least
    )
    limits = data.draw(st.sampled_from(LIMITS))
    if not candidates.any():
        with pytest.raises(ConfigError, match="1 instances are to be kept, but 0"):
            stream_top_k(source, [1], limits=limits)
        return
    k = data.draw(st.integers(1, int(candidates.sum())))
    chosen = stream_top_k(source, [k], limits=limits)
    assert rows_of(chosen, shards) == top_k(keys, k, candidates=candidates).tolist()
    with pytest.raises(ConfigError, match=f"but {candidates.sum()} can be chosen"):
        stream_top_k(source, [int(candidates.sum()) + 1], limits=limits)


@pytest.mark.parametrize("limits", LIMITS)
def test_a_million_rows_over_chunks_blocks_and_threads(limits):
    rng = np.random.default_rng(0)
    count = 1_200_000  # several chunks of 2**18 rows, and above the limit of the direct way
    found = {
        "teacher": rng.integers(0, 5000, count).astype(np.float32),
        "reference": rng.integers(0, 5000, count).astype(np.float32),
        "tokens": rng.integers(1, 30, count).astype(np.int32),
        "ids": np.arange(count),
        "lengths": np.ones(count, np.int32),
        "domains": np.zeros(count, np.uint16),
    }
    shards, keys = shards_of(found, [700_001]), keys_of(found, "difference", per_token=True, seed=0)
    source = KeySource(shards=shards, selector=SELECTORS["difference"])
    chosen = stream_top_k(source, [count // 3], limits=limits)
    masks = [
        mask.rows() + shard.first_row for mask, shard in zip(chosen.masks, shards, strict=True)
    ]
    assert np.array_equal(np.concatenate(masks), top_k(keys, count // 3))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("teacher_sum", np.nan), ("reference_sum", np.inf), ("teacher_sum", -1.0),
        ("teacher_tokens", -1), ("reference_tokens", 7),
    ],
)  # fmt: skip
def test_a_row_far_from_the_bracket_is_checked_all_the_same(column, value):
    tokens = np.full(640, 9, np.int32)
    columns = {
        "teacher_sum": np.full(640, 5, np.float32), "teacher_tokens": tokens.copy(),
        "reference_sum": np.full(640, 50, np.float32), "reference_tokens": tokens.copy(),
    }  # fmt: skip
    columns[column][321] = value
    scan = _C.KeyScan(640, low=[0.5], high=[0.6], max_candidates=9)
    assert scan.add(0, _C.KeyRows(640, rule=0, **columns)) == 321


def test_sums_beyond_float32_arithmetic_are_computed_exactly():
    rng = np.random.default_rng(1)
    tokens = np.full(640, 3, np.int32)
    teacher = (2.0**26 + 8 * rng.integers(0, 99, 640)).astype(np.float32)
    reference = (2.0**27 + 16 * rng.integers(0, 99, 640)).astype(np.float32)
    keys = reference.astype(np.float64) / 3 - teacher.astype(np.float64) / 3
    bracket = np.sort(keys)[[300, 306]]
    rows = _C.KeyRows(
        640, rule=0, teacher_sum=teacher, teacher_tokens=tokens, reference_sum=reference,
        reference_tokens=tokens,
    )  # fmt: skip
    scan = _C.KeyScan(640, low=[bracket[0]], high=[bracket[1]], max_candidates=640)
    assert scan.add(0, rows) == -1
    marked = np.unpackbits(scan.mask, count=640, bitorder="little").astype(bool)
    np.testing.assert_array_equal(marked, keys > bracket[1])
    assert scan.totals[0, 5] == ((keys >= bracket[0]) & (keys <= bracket[1])).sum()


@pytest.mark.parametrize("name", ["difference", "teacher", "reference"])
def test_keys_that_float32_cannot_tell_apart_are_told_apart(name):
    rng = np.random.default_rng(3)
    count = 64_000
    tokens = rng.integers(1, 1000, count).astype(np.int32)
    # A fifth of the rows lie around one key, as near to each other as float32 sums can be.
    near = rng.random(count) < 0.2
    teacher = rng.uniform(0.01, 0.3, count) * tokens
    reference = teacher + np.where(near, 0.7, rng.uniform(0, 2, count)) * tokens
    if name == "teacher":
        teacher = np.where(near, 0.7, rng.uniform(0, 2, count)) * tokens
    teacher, reference = teacher.astype(np.float32), reference.astype(np.float32)
    found = {"teacher": teacher, "reference": reference, "tokens": tokens, "ids": np.arange(count)}
    keys = keys_of(found, name, per_token=True, seed=0)
    scores = {
        role: ScoreColumns(sum_nll=found[role], num_tokens=tokens)
        for role in ("teacher", "reference")
    }
    shard = ShardColumns(num_rows=count, **scores)
    limits = Limits(direct_rows=0, probe_rows=1 << 15, max_candidates=count // 8)
    for rank in (0.2, 0.5, 0.8):
        k = int((keys > np.quantile(keys[near], rank)).sum())
        source = KeySource(shards=[shard], selector=SELECTORS[name])
        chosen = stream_top_k(source, [k], limits=limits)
        assert rows_of(chosen, [shard]) == top_k(keys, k).tolist()
        assert chosen.threshold == np.sort(keys)[count - k]


def test_evenly_spread_rows_need_one_pass():
    rng = np.random.default_rng(0)
    count = 1_200_000
    found = {
        "teacher": rng.normal(5, 1, count).clip(0).astype(np.float32),
        "reference": rng.normal(5, 1, count).clip(0).astype(np.float32),
        "tokens": np.ones(count, np.int32), "ids": np.arange(count),
        "lengths": np.ones(count, np.int32), "domains": np.zeros(count, np.uint16),
    }  # fmt: skip
    source = KeySource(shards=shards_of(found, [400_000]), selector=SELECTORS["difference"])
    assert stream_top_k(source, [count // 2]).passes == 1


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(
    ("column", "value", "error", "says"),
    [
        ("teacher", np.nan, DataError, "the teacher scores: row 150 has sum_nll nan"),
        ("reference", np.inf, DataError, "the reference scores: row 150 has sum_nll inf"),
        ("reference", -1.0, DataError, "row 150 has sum_nll -1.0"),
    ],
)
def test_broken_scores_are_refused_by_row(native, limits, column, value, error, says):
    found = {
        "teacher": np.ones(200, np.float32), "reference": np.ones(200, np.float32),
        "tokens": np.ones(200, np.int32), "ids": np.arange(200),
        "lengths": np.ones(200, np.int32), "domains": np.zeros(200, np.uint16),
    }  # fmt: skip
    found[column][[150, 180]] = value
    selector = SELECTORS["difference"]
    source = KeySource(
        shards=shards_of(found, [90]), selector=selector if native else stranger(selector)
    )
    with pytest.raises(error, match=says):
        stream_top_k(source, [10], limits=limits)


@pytest.mark.parametrize("native", [True, False])
def test_counts_that_differ_are_refused_by_row(native):
    counts = np.ones(100, np.int32), np.ones(100, np.int32)
    counts[1][70] = 2
    sums = np.ones(100, np.float32)
    shard = ShardColumns(
        num_rows=100, first_row=1000,
        teacher=ScoreColumns(sum_nll=sums, num_tokens=counts[0]),
        reference=ScoreColumns(sum_nll=sums, num_tokens=counts[1]),
    )  # fmt: skip
    selector = SELECTORS["difference"]
    source = KeySource(shards=[shard], selector=selector if native else stranger(selector))
    with pytest.raises(LineageError, match="row 1070 has 1 and 2"):
        stream_top_k(source, [10])


def test_a_key_of_a_stranger_that_is_not_finite_is_refused_by_row():
    def selector(inputs: SelectorInput) -> np.ndarray:
        return np.where(inputs.ids == 77, np.inf, 1.0)

    source = KeySource(shards=[ShardColumns(num_rows=100, first_row=5)], selector=selector)
    with pytest.raises(DataError, match="the key of row 82 is inf"):
        stream_top_k(source, [3])


def test_a_selector_without_its_scores_names_the_flag():
    source = KeySource(shards=[ShardColumns(num_rows=5)], selector=SELECTORS["difference"])
    with pytest.raises(ConfigError, match="--reference-scores"):
        stream_top_k(source, [2])


def test_mapped_columns_give_the_same_and_survive(tmp_path):
    rng = np.random.default_rng(2)
    for name in ("teacher", "reference"):
        np.save(tmp_path / f"{name}.npy", rng.uniform(0, 9, 600_000).astype(np.float32))
    np.save(tmp_path / "tokens.npy", np.ones(600_000, np.int32))
    names = ("teacher", "reference", "tokens")
    rest = {
        "ids": np.arange(600_000), "lengths": np.ones(600_000, np.int32),
        "domains": np.zeros(600_000, np.uint16),
    }  # fmt: skip
    results = []
    for mode in ("r", "c", None):
        found = {name: np.load(tmp_path / f"{name}.npy", mmap_mode=mode) for name in names} | rest
        if mode == "c":
            found["teacher"][:1000] = 0  # private changes, lost if their pages were dropped
            found["teacher"][:1000] = np.load(tmp_path / "teacher.npy")[:1000]
        source = KeySource(shards=shards_of(found, [300_000]), selector=SELECTORS["difference"])
        results.append(rows_of(stream_top_k(source, [1000], limits=LIMITS[1]), source.shards))
    assert results[0] == results[1] == results[2]


@given(keys=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=30))
def test_images_order_as_keys_do(keys):
    images = _C.key_images(keys)
    for a, x in zip(keys, images, strict=True):
        for b, y in zip(keys, images, strict=True):
            assert (a < b) == (x < y)


@given(chosen=st.sets(st.integers(0, 99)), size=st.sampled_from([8, 16, 64, 1 << 20]))
def test_a_mask_gives_back_its_rows(chosen, size):
    mask = RowMask.of_rows(np.array(sorted(chosen), np.int64), 100)
    assert mask.rows().tolist() == sorted(chosen)
    assert mask.count() == len(chosen)
    assert [row for block in mask.blocks(size) for row in block.tolist()] == sorted(chosen)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"low": [2.0], "high": [1.0]}, ValueError, "bracket 0 is empty"),
        ({"low": [np.nan], "high": [1.0]}, ValueError, "bracket 0 is empty"),
        ({"num_rows": -1}, ValueError, "rows >= 0"),
        ({"buckets_log2": 21}, ValueError, "buckets"),
        ({"high": [1.0, 2.0]}, ValueError, "two ends"),
    ],
)
def test_a_scan_that_makes_no_sense_is_refused(change, error, says):
    arguments = {"num_rows": 10, "low": [0.0], "high": [1.0], "max_candidates": 5} | change
    with pytest.raises(error, match=says):
        _C.KeyScan(arguments.pop("num_rows"), **arguments)


@pytest.mark.parametrize(
    ("columns", "error", "says"),
    [
        ({"keys": np.zeros(9)}, ValueError, "keys has 9 rows, but there are 10"),
        ({"keys": np.zeros(10, np.float32)}, TypeError, "keys"),
        ({"keys": np.zeros(20)[::2]}, TypeError, "keys"),
        ({"rule": 0}, ValueError, "lacks a column"),
        ({"rule": 7}, ValueError, "no rule has number 7"),
        ({"keys": np.zeros(10), "strata": np.zeros(10, np.int64)}, TypeError, "strata"),
    ],
)
def test_columns_of_another_shape_or_type_are_refused(columns, error, says):
    with pytest.raises(error, match=says):
        _C.KeyRows(10, **({"rule": 4} | columns))


def test_rows_outside_a_scan_are_refused():
    scan = _C.KeyScan(100, low=[0.0], high=[1.0], max_candidates=5)
    for first, count in ((1, 5), (64, 37), (-64, 5), (2**62 // 64 * 64, 5)):
        with pytest.raises(ValueError, match="do not fit"):
            scan.add(first, _C.KeyRows(count, rule=4, keys=np.zeros(count)))
