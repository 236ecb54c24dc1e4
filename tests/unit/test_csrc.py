"""The native writer of a subset's index against its numpy definition; what it must refuse."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_miniplm import _C
from megatron_miniplm.data.indexed import dtype_code
from megatron_miniplm.data.rows import RowMask
from megatron_miniplm.data.subset import view_index_reference

INT64_MAX = 2**63 - 1


def write(lengths, pointers, rows, *, bin_bytes, dtype=np.int32, **options) -> tuple[bytes, int]:
    """Bytes of the index of `rows`, and its number of tokens."""
    dtype = np.dtype(dtype)
    mask = RowMask.of_rows(rows, len(lengths)).bits
    arrays = {"lengths": lengths, "pointers": pointers, "mask": mask}
    with tempfile.TemporaryFile() as file:
        count, num_tokens = _C.write_masked_index(
            file.fileno(),
            **arrays,
            dtype_code=dtype_code(dtype),
            bytes_per_token=dtype.itemsize,
            bin_bytes=bin_bytes,
            **options,
        )
        assert count == len(rows)
        file.seek(0)
        return file.read(), num_tokens


def small_index(count: int = 10):
    lengths = np.arange(1, count + 1, dtype=np.int32)
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * 4
    return lengths, pointers, int(lengths.sum()) * 4


def unaligned(array: np.ndarray, offset: int) -> np.ndarray:
    """The same values at an odd address, as in a mapped .idx."""
    buffer = np.zeros(array.nbytes + 16, np.uint8)
    view = np.frombuffer(buffer.data, array.dtype, len(array), offset)
    view.flags.writeable = True
    view[:] = array
    return view


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_index_is_byte_identical_to_the_numpy_definition(data):
    count = data.draw(st.integers(1, 60))
    dtype = np.dtype(data.draw(st.sampled_from([np.uint16, np.int32, np.int64])))
    lengths = np.array(
        data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=count, max_size=count)), np.int32
    )
    # Far beyond 32 bits, in any order, overlapping, misaligned: an adopted index may be all that.
    pointers = np.array(
        data.draw(st.lists(st.integers(0, 2**60), min_size=count, max_size=count)), np.int64
    )
    chosen = data.draw(st.sets(st.integers(0, count - 1)))
    rows = np.array(sorted(chosen), np.int64)
    bin_bytes = 2**60 + 2**31 * dtype.itemsize
    lengths, pointers = unaligned(lengths, 2), unaligned(pointers, 6)
    made, num_tokens = write(lengths, pointers, rows, bin_bytes=bin_bytes, dtype=dtype)
    assert made == view_index_reference(lengths, pointers, rows, dtype)
    assert len(made) == 20 * len(rows) + 42
    assert num_tokens == int(lengths[rows].sum(dtype=np.int64))


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("count", [262_143, 262_144, 262_145, 700_003])
def test_chunks_and_threads_write_one_index(count, contiguous):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, count).astype(np.int32)
    pointers = 4 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    rows = np.flatnonzero(rng.random(count) < 0.5)
    made, num_tokens = write(
        lengths, pointers, rows, bin_bytes=4 * int(lengths.sum()), threads=3, contiguous=contiguous
    )
    if contiguous:
        pointers = np.zeros(count, np.int64)
        pointers[rows[1:]] = 4 * np.cumsum(lengths[rows], dtype=np.int64)[:-1]
    assert made == view_index_reference(lengths, pointers, rows, np.dtype(np.int32))
    assert num_tokens == int(lengths[rows].sum())


@pytest.mark.parametrize(
    ("pointer", "length"),
    [(41, 1), (44, 0), (-4, 1), (40, 2), (0, -1), (INT64_MAX, 1), (0, 2**31 - 1)],
)
def test_sequences_outside_the_bin_are_refused_with_their_numbers(pointer, length):
    lengths, pointers = np.array([1, length], np.int32), np.array([0, pointer], np.int64)
    with pytest.raises(ValueError, match=rf"sequence 1 has {length} tokens .* a \.bin of 43 bytes"):
        write(lengths, pointers, np.array([0, 1]), bin_bytes=43)


def test_the_end_of_a_sequence_is_computed_without_overflow():
    lengths, pointers = np.array([2], np.int32), np.array([INT64_MAX - 4])
    with pytest.raises(ValueError, match="sequence 0 has 2 tokens of 4 bytes"):
        write(lengths, pointers, np.array([0]), bin_bytes=INT64_MAX)


def test_a_bad_sequence_that_is_not_chosen_does_not_matter():
    lengths, pointers, bin_bytes = small_index()
    pointers[4] = INT64_MAX
    rows = np.array([3, 5])
    made, _ = write(lengths, pointers, rows, bin_bytes=bin_bytes)
    assert made == view_index_reference(lengths, pointers, rows, np.dtype(np.int32))


def masked(descriptor: int, **change) -> tuple[int, int]:
    """Three of ten rows, with some arguments changed."""
    lengths, pointers, bin_bytes = small_index()
    arrays = {"lengths": lengths, "pointers": pointers, "mask": np.array([7, 0], np.uint8)}
    fixed = {"dtype_code": 4, "bytes_per_token": 4, "bin_bytes": bin_bytes}
    return _C.write_masked_index(descriptor, **{**arrays, **fixed, **change})


@pytest.mark.parametrize("name", ["lengths", "pointers", "mask"])
@pytest.mark.parametrize(
    "spoil", [lambda a: a.astype(np.float64), lambda a: np.repeat(a, 2)[::2], lambda a: a[None]]
)
def test_arrays_of_another_type_stride_or_rank_are_refused(name, spoil):
    lengths, pointers, _ = small_index()
    arrays = {"lengths": lengths, "pointers": pointers, "mask": np.array([7, 0], np.uint8)}
    with tempfile.TemporaryFile() as file, pytest.raises(TypeError, match=name):
        masked(file.fileno(), **{name: spoil(arrays[name])})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pointers": np.zeros(9, np.int64)}, "pointers has 9 elements, expected 10"),
        ({"mask": np.zeros(1, np.uint8)}, "mask has 1 elements, expected 2"),
        ({"bytes_per_token": 0}, "tokens of 0 bytes"),
    ],
)
def test_columns_that_do_not_fit_are_refused(change, says):
    with tempfile.TemporaryFile() as file, pytest.raises(ValueError, match=says):
        masked(file.fileno(), **change)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_an_oserror_with_its_number():
    with open("/dev/full", "wb") as file, pytest.raises(OSError, match="space") as raised:
        masked(file.fileno())
    assert raised.value.errno == errno.ENOSPC


def test_many_chunks_copied_by_many_threads_are_the_chosen_bytes_in_order():
    rng = np.random.default_rng(2)
    count = 70_000  # several chunks of rows
    lengths = rng.integers(1, 40, count).astype(np.int32)
    lengths[[5, 40_000]] = 1 << 19  # long enough for a copy inside the kernel
    pointers = np.cumsum(lengths.astype(np.int64) * 4) - lengths * 4
    data = rng.integers(0, 256, int(lengths.sum()) * 4, dtype=np.uint8)
    order = rng.permutation(count)  # rows need not lie in their order
    lengths, pointers = lengths[order], pointers[order]
    rows = np.flatnonzero(rng.random(count) < 0.5)
    expected = b"".join(data[pointers[r] : pointers[r] + 4 * lengths[r]].tobytes() for r in rows)
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
        source.write(data.data)
        source.flush()
        copied = _C.copy_chosen_tokens(
            source.fileno(), target.fileno(), lengths=lengths, pointers=pointers,
            mask=RowMask.of_rows(rows, count).bits, bytes_per_token=4, bin_bytes=len(data),
            threads=4,
        )  # fmt: skip
        target.seek(0)
        assert target.read() == expected
    assert copied == len(expected)


def test_a_bin_that_ends_early_says_so():
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
        source.truncate(1000)
        with pytest.raises(OSError, match="copying a subset's tokens: the file ended early"):
            _C.copy_chosen_tokens(
                source.fileno(), target.fileno(), lengths=np.full(1, 500, np.int32),
                pointers=np.zeros(1, np.int64), mask=np.full(1, 1, np.uint8), bytes_per_token=4,
                bin_bytes=2000,
            )  # fmt: skip


def test_other_threads_run_while_tokens_are_written():
    size = 1 << 28
    block = np.random.default_rng(0).bytes(1 << 20)
    ticks: list[float] = []
    over = threading.Event()

    def tick() -> None:
        while not over.wait(1e-3):
            ticks.append(time.perf_counter())

    other = threading.Thread(target=tick)
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
        # Bytes, not a hole, which some file systems copy in no time.
        for _ in range(size // len(block)):
            source.write(block)
        source.flush()
        other.start()
        start = time.perf_counter()
        copied = _C.copy_chosen_tokens(
            source.fileno(), target.fileno(), lengths=np.full(1 << 14, size >> 16, np.int32),
            pointers=np.arange(1 << 14) * (size >> 14), mask=np.full(1 << 11, 255, np.uint8),
            bytes_per_token=4, bin_bytes=size, threads=1,
        )  # fmt: skip
        end = time.perf_counter()
    over.set()
    other.join()
    assert copied == size
    # With the interpreter lock held, there is none between the two ends of the call.
    quarter = (end - start) / 4
    assert [at for at in ticks if start + quarter < at < end - quarter]
