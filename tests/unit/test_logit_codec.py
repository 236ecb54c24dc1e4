"""The codec of sparse logits: ids exactly, values within a step, any bytes refused or decoded."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_miniplm._C import decode_logits, encode_logits
from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.data.logit_codec import _HEADER, Encoding, decode, encode
from megatron_miniplm.data.sparse_logits import COLUMNS, NO_ENTRY, SparseLogits, pad

QUICKLY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
CLOSE = {"gold_log_prob": 0.0, "entropy": 2**-11, "logit_std": 2**-11}  # relative


def logits_of(
    counts: list[int], *, vocab: int, seed: int = 0, spread: float = 3.0, taus=()
) -> SparseLogits:
    """Random distributions over random ids of these counts, log-probs down to about -10 spreads."""
    rng = np.random.default_rng(seed)
    ids, log_probs, tails = [np.empty(0, np.int32)], [np.empty(0, np.float32)], []
    for count in counts:
        chosen = np.sort(rng.permutation(vocab)[:count] if vocab < 1 << 12 or count > 400
                         else rng.choice(vocab, 4 * count, replace=False)[:count])  # fmt: skip
        logits = rng.normal(size=count) * spread
        kept = rng.uniform(0.5, 1) if count < vocab else 1.0
        mass = np.exp(logits).sum() / kept if count else 1.0
        ids.append(chosen.astype(np.int32))
        log_probs.append((logits - np.log(mass)).astype(np.float32))
        tails.append(1 - kept if count else 1.0)

    def column(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, len(counts)).astype(np.float32)

    return SparseLogits(
        counts=np.array(counts, np.uint32),
        ids=np.concatenate(ids),
        log_probs=np.concatenate(log_probs),
        gold_log_prob=column(-20, 0),
        entropy=column(0, 11),
        logit_std=column(0.1, 40),
        tail_mass=np.array(tails, np.float32),
        log_partitions={tau: column(-5, 9) for tau in taus},
    )


def rows_of(logits: SparseLogits, values: np.ndarray) -> list[np.ndarray]:
    return np.split(values.astype(np.float64), np.cumsum(logits.counts.astype(np.int64))[:-1])


def assert_close(found: SparseLogits, given: SparseLogits, bits: int) -> None:
    assert np.array_equal(found.counts, given.counts)
    assert np.array_equal(found.ids, given.ids)
    assert found.log_partitions.keys() == given.log_partitions.keys()
    for tau, column in given.log_partitions.items():
        assert np.array_equal(found.log_partitions[tau], column)
    for name, relative in CLOSE.items():
        np.testing.assert_allclose(getattr(found, name), getattr(given, name), rtol=relative)
    np.testing.assert_allclose(found.tail_mass, given.tail_mass, rtol=0.51 / 2048)
    if len(given) == 0:
        return
    for mine, theirs in zip(
        rows_of(found, found.log_probs), rows_of(given, given.log_probs), strict=True
    ):
        if len(theirs) == 0:
            continue
        # Rounding takes half a step, and making the kept mass exact as much again; the range
        # itself is kept to 1/128 more.
        step = np.ptp(theirs) * (1 + 1 / 128) / (2**bits - 1)
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1.001 * step + 1e-6)
        assert np.exp(mine).sum() == pytest.approx(np.exp(theirs).sum(), rel=2e-6)
        if len(theirs) == 1:
            assert np.array_equal(mine, theirs)


@QUICKLY
@given(
    vocab=st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 49_152, 151_936, 1 << 20])),
    shares=st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0])), max_size=6),
    most=st.sampled_from([3, 100, 300, 2000]),
    bits=st.sampled_from([4, 7, 8, 10, 16]),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 12.0]),
    seed=st.integers(0, 1000),
)
def test_ids_come_back_exactly_and_values_within_a_step(vocab, shares, most, bits, spread, seed):
    counts = [round(share * min(vocab, most)) for share in shares]
    given = logits_of(counts, vocab=vocab, spread=spread, seed=seed, taus=(2.0, 0.5))
    record = encode(given, Encoding(value_bits=bits), vocab_size=vocab)
    assert (record.num_positions, record.num_values) == (len(counts), sum(counts))
    assert_close(decode(record.payload), given, bits)


def test_weights_of_a_sampled_store_may_be_above_one():
    given = logits_of([5, 2], vocab=50)
    given = SparseLogits(**{**vars(given), "log_probs": given.log_probs + np.float32(3)})
    assert_close(decode(encode(given, Encoding(), vocab_size=50).payload), given, 10)


@pytest.mark.parametrize("zstd", [False, True])
def test_32_bits_keep_every_number(zstd):
    given = logits_of([0, 1, 500, 100], vocab=1 << 20, taus=(2.0,))
    found = decode(encode(given, Encoding(value_bits=32, zstd=zstd), vocab_size=1 << 20).payload)
    assert np.array_equal(found.ids, given.ids)
    assert np.array_equal(found.log_probs, given.log_probs)
    for (name, mine), (_, theirs) in zip(found.columns(), given.columns(), strict=True):
        assert np.array_equal(mine, theirs), name


def test_a_whole_vocabulary_of_ids_takes_no_bits():
    given = logits_of([3000, 3000], vocab=3000)
    size = len(encode(given, Encoding(value_bits=4), vocab_size=3000).payload)
    assert size * 8 <= 6000 * 4 + 8 * 80
    assert_close(decode(encode(given, Encoding(), vocab_size=3000).payload), given, 10)


def test_zstd_changes_the_bytes_only():
    given = logits_of([100] * 20, vocab=50_000, taus=(2.0,))
    plain, packed = (
        encode(given, Encoding(zstd=zstd), vocab_size=50_000).payload for zstd in (False, True)
    )
    assert plain != packed
    for (name, mine), (_, theirs) in zip(
        decode(plain).columns(), decode(packed).columns(), strict=True
    ):
        assert np.array_equal(mine, theirs), name
    assert np.array_equal(decode(plain).log_probs, decode(packed).log_probs)


def test_the_default_keeps_the_distillation_loss_to_a_thousandth_of_a_nat():
    # Zipf's law over an ordered vocabulary, like byte pairs; real text: benchmark.py logits.
    rng, vocab, k = np.random.default_rng(0), 49_152, 60
    given = logits_of([k] * 400, vocab=vocab, spread=1.5)
    ids = np.concatenate([
        np.sort(rng.choice(np.unique((vocab ** rng.random(6 * k)).astype(int)) - 1, k, False))
        for _ in range(400)
    ]).astype(np.int32)  # fmt: skip
    given = SparseLogits(**{**vars(given), "ids": ids})
    record = encode(given, Encoding(), vocab_size=vocab)
    found = decode(record.payload)
    student = rng.normal(size=given.nnz) * 2 - 6

    def losses(logits: SparseLogits) -> np.ndarray:
        log_probs = logits.log_probs.astype(np.float64)
        return np.add.reduceat(np.exp(log_probs) * (log_probs - student), np.arange(0, 400 * k, k))

    assert np.abs(losses(found) - losses(given)).mean() < 5e-4
    assert len(record.payload) / given.nnz < 2.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [3, 2, 5]}, "ids must ascend"),
        ({"ids": [2, 2, 5]}, "ids must ascend"),
        ({"ids": [2, 3, 9]}, "ids must ascend within the vocabulary"),
        ({"log_probs": [-1, np.nan, -3]}, "log-prob is not finite"),
        ({"log_probs": [-1, -np.inf, -3]}, "log-prob is not finite"),
        ({"entropy": [np.nan, 1]}, "entropy of position 0 is nan"),
        ({"logit_std": [1, 1e6]}, "logit_std of position 1 is 1000000"),
    ],
)  # fmt: skip
def test_what_is_no_distribution_is_refused(change, message):
    good = {
        "counts": [2, 1], "ids": [2, 3, 5], "log_probs": [-1, -2, -3], "gold_log_prob": [-1, -1],
        "entropy": [1, 1], "logit_std": [1, 1], "tail_mass": [0, 0],
    }  # fmt: skip
    dtypes = {"counts": np.uint32, "ids": np.int32}
    arrays = {k: np.array(v, dtypes.get(k, np.float32)) for k, v in (good | change).items()}
    with pytest.raises(DataError, match=message):
        encode(SparseLogits(**arrays), Encoding(), vocab_size=9)


@pytest.mark.parametrize("bits", [3, 17, 31, 0])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ConfigError, match=f"log-probs of {bits} bits"):
        Encoding(value_bits=bits)


@pytest.mark.parametrize("encoding", [
    Encoding(), Encoding(value_bits=4), Encoding(value_bits=32), Encoding(zstd=True)
])  # fmt: skip
def test_damaged_bytes_never_crash_and_truncated_ones_are_refused(encoding):
    given = logits_of([0, 1, 2, 37, 300, 5], vocab=1000, taus=(2.0,))
    payload = encode(given, encoding, vocab_size=1000).payload
    for end in {*range(0, 60), *range(60, len(payload), 53)} - {len(payload)}:
        with pytest.raises(DataError, match="are not logits"):
            decode(payload[:end])
    with pytest.raises(DataError, match="are not logits"):
        decode(payload + b"\0")
    rng = np.random.default_rng(1)
    refused = 0
    for at in [*range(40), *rng.integers(0, len(payload), 400)]:
        damaged = bytearray(payload)
        damaged[at] ^= 1 << int(rng.integers(8))
        try:
            found = decode(bytes(damaged))
        except DataError:
            refused += 1
            continue
        # Values may be others (a record's checksum is what tells), but never out of their bounds.
        for row in rows_of(found, found.ids):
            assert (np.diff(row) > 0).all()
        assert found.nnz == 0 or 0 <= found.ids.min() <= found.ids.max() < 2**31
    assert refused > 40


def test_random_bytes_are_safe_for_the_decoder():
    rng = np.random.default_rng(2)
    for _ in range(800):
        counts = rng.integers(0, 20, int(rng.integers(0, 5)))
        bits = int(rng.choice([1, 4, 10, 16, 32]))
        noise = rng.bytes(int(rng.integers(0, 200)))
        data = bytes(counts.astype(np.uint8)) + noise
        try:
            found = decode_logits(
                data, positions=len(counts), entries=int(counts.sum()), vocab=1 << 20, bits=bits
            )
        except ValueError:
            continue
        found_counts, ids, log_probs = found
        assert found_counts.tolist() == counts.tolist()
        assert len(ids) == len(log_probs) == counts.sum()
        for row in np.split(ids, np.cumsum(counts)[:-1]) if len(counts) else ():
            assert (np.diff(row) > 0).all()
        assert ((ids >= 0) & (ids < 1 << 20)).all()
        if bits == 32:  # nothing was rounded, so what is accepted is what is written
            if np.isfinite(log_probs).all():  # else `decode` refuses them
                assert encode_logits(*found, vocab=1 << 20, bits=32) == data
        else:
            assert np.isfinite(log_probs).all()
    for positions, entries in ((1 << 62, 0), (0, 1 << 62), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="too few bytes"):
            decode_logits(b"abc", positions=positions, entries=entries, vocab=9, bits=8)


@pytest.mark.parametrize("name", ["log_probs", "gold_log_prob", "tail_mass", "tau"])
def test_a_payload_with_numbers_that_are_not_finite_is_refused(name):
    given = logits_of([2, 3], vocab=50, taus=(2.0,))
    payload = encode(given, Encoding(value_bits=32), vocab_size=50).payload
    column = given.log_partitions[2.0] if name == "tau" else getattr(given, name)
    number = column[1].tobytes()
    assert payload.count(number) == 1
    broken = payload.replace(number, np.float32(np.nan).tobytes())
    with pytest.raises(DataError, match="is not finite"):
        decode(broken)


def test_a_compressed_body_makes_no_more_than_it_says():
    payload = encode(logits_of([3], vocab=50), Encoding(zstd=True), vocab_size=50).payload
    head = payload[: _HEADER.size]
    bomb = zstandard.compress(bytes(1 << 25))
    without_size = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 25))
    lying = bytearray(head)
    lying[-8:] = (1 << 60).to_bytes(8, "little")
    tracemalloc.start()
    for data in (head + bomb, head + without_size, bytes(lying) + without_size):
        with pytest.raises(DataError, match="are not logits"):
            decode(data)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_padding_puts_every_entry_at_its_trained_position():
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    rows = [logits_of([3, 0], vocab=50, taus=(2.0, 3.0)), None,
            logits_of([1, 5, 2], vocab=50, seed=1, taus=(2.0,))]  # fmt: skip
    padded = pad(mask, rows)
    assert padded.ids.shape == (3, 4, 5)
    assert list(padded.log_partitions) == [2.0]
    for at, row in enumerate(rows):
        for column in COLUMNS:
            values = getattr(padded, column)[at]
            rest = 1.0 if column == "logit_std" else 0.0
            assert values[~mask[at]].eq(rest).all()
            if row is not None:
                assert np.array_equal(values[mask[at]].numpy(), getattr(row, column))
        if row is None:
            assert padded.ids[at].eq(NO_ENTRY).all()
            continue
        places = torch.nonzero(mask[at])[:, 0].tolist()
        of_rows = zip(rows_of(row, row.ids), rows_of(row, row.log_probs), strict=True)
        for place, (ids, log_probs) in zip(places, of_rows, strict=True):
            count = len(ids)
            assert padded.ids[at, place, :count].tolist() == ids.tolist()
            assert padded.log_probs[at, place, :count].tolist() == log_probs.tolist()
            assert padded.ids[at, place, count:].eq(NO_ENTRY).all()
            assert padded.log_probs[at, place, count:].isneginf().all()
    with pytest.raises(DataError, match=r"row 2 of the batch trains 3 positions.*are of 2"):
        pad(mask, [rows[0], None, rows[0]])
    empty = pad(mask[1:2], [None])
    assert empty.ids.shape == (1, 4, 0)
