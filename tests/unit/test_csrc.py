"""The native view-index writer against its numpy definition, and everything it must refuse."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_miniplm import _C
from megatron_miniplm.data.indexed import dtype_code
from megatron_miniplm.data.subset import view_index_reference

INT64_MAX = 2**63 - 1


def write(lengths, pointers, rows, *, bin_bytes, dtype=np.int32) -> tuple[bytes, int]:
    dtype = np.dtype(dtype)
    with tempfile.TemporaryFile() as file:
        num_tokens = _C.write_view_index(
            file.fileno(),
            lengths=lengths,
            pointers=pointers,
            rows=rows,
            dtype_code=dtype_code(dtype),
            bytes_per_token=dtype.itemsize,
            bin_bytes=bin_bytes,
        )
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


@pytest.mark.parametrize("count", [65_535, 65_536, 65_537, 200_001])
def test_index_is_whole_across_the_writer_s_blocks(count):
    lengths = np.full(count + 5, 3, np.int32)
    pointers = np.arange(count + 5, dtype=np.int64) * 12
    rows = np.arange(5, count + 5)
    made, num_tokens = write(lengths, pointers, rows, bin_bytes=12 * (count + 5))
    assert made == view_index_reference(lengths, pointers, rows, np.dtype(np.int32))
    assert num_tokens == 3 * count


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([3, 2], "row 2 at position 1 does not come after row 3"),
        ([4, 4], "row 4 at position 1 does not come after row 4"),
        ([-1, 2], "row -1 at position 0 is outside an index of 10"),
        ([0, 10], "row 10 at position 1 is outside an index of 10"),
    ],
)
def test_rows_that_do_not_ascend_in_range_are_refused_with_their_numbers(rows, says):
    lengths, pointers, bin_bytes = small_index()
    with pytest.raises(ValueError, match=says):
        write(lengths, pointers, np.array(rows), bin_bytes=bin_bytes)


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


@pytest.mark.parametrize("name", ["lengths", "pointers", "rows"])
@pytest.mark.parametrize(
    "spoil", [lambda a: a.astype(np.float64), lambda a: a[::2], lambda a: a[None]]
)
def test_arrays_of_another_type_stride_or_rank_are_refused(name, spoil):
    lengths, pointers, bin_bytes = small_index()
    arrays = {"lengths": lengths, "pointers": pointers, "rows": np.arange(4)}
    arrays[name] = spoil(arrays[name])
    with pytest.raises(TypeError, match=name):
        write(**arrays, bin_bytes=bin_bytes)


def test_columns_of_different_lengths_are_refused():
    lengths, pointers, bin_bytes = small_index()
    with pytest.raises(ValueError, match="10 elements, but pointers has 9"):
        write(lengths, pointers[:-1], np.arange(3), bin_bytes=bin_bytes)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_an_oserror_with_its_number():
    lengths, pointers, bin_bytes = small_index()
    with open("/dev/full", "wb") as file, pytest.raises(OSError, match="space") as raised:
        _C.write_view_index(
            file.fileno(), lengths=lengths, pointers=pointers, rows=np.arange(3),
            dtype_code=4, bytes_per_token=4, bin_bytes=bin_bytes,
        )  # fmt: skip
    assert raised.value.errno == errno.ENOSPC


_PIPE = """
import os, threading
import numpy as np
from megatron_miniplm import _C
count = 200_000
reader, writer = os.pipe()
thread = threading.Thread(target=lambda: (_C.write_view_index(writer,
    lengths=np.ones(count, np.int32), pointers=np.zeros(count, np.int64), rows=np.arange(count),
    dtype_code=4, bytes_per_token=4, bin_bytes=4), os.close(writer)))
thread.start()
total = 0
while block := os.read(reader, 1 << 16):
    total += len(block)
assert total == 20 * count + 42, total
"""


def test_other_threads_run_while_an_index_is_written():
    # A pipe holds 64 KiB: a writer that kept the interpreter lock would wait for ever.
    subprocess.run([sys.executable, "-c", _PIPE], check=True, timeout=60)
