r"""Megatron's indexed dataset on disk: the bytes of an ``.idx`` file, read with checks.

``.bin`` holds tokens back to back and nothing else. ``.idx`` (little-endian) holds, for N
sequences in D - 1 documents::

    0   9 bytes  MMIDIDX\0\0            34          int32[N]  lengths, in tokens
    9   uint64   version, 1             34 + 4 N    int64[N]  pointers, in bytes into .bin
    17  uint8    dtype code             34 + 12 N   int64[D]  document boundaries, 0 ... N
    18  uint64   N
    26  uint64   D

Ours have one sequence a document, hence D = N + 1 and 20 N + 42 bytes. The stock reader checks
neither pointers nor the file's length (it returns uninitialised memory for a pointer out of range
when it does not map the file), so everything is checked here, when a file is opened.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.data.mapped import drop_pages

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
UINT16_VOCABULARY = 65_500  # Megatron's own limit, below 2**16 on purpose
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Index:
    """One ``.idx`` file: where each sequence lies in the ``.bin``.

    The arrays are views into the mapped file and may be unaligned.
    """

    dtype: np.dtype
    """Type of a token in the ``.bin``."""
    lengths: np.ndarray
    """int32[N], tokens."""
    pointers: np.ndarray
    """int64[N], bytes."""
    raw: np.ndarray
    """uint8, the whole file."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's choice of token type: uint16 below 65,500 entries, else int32."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCABULARY else np.int32)


def dtype_code(dtype: np.dtype) -> int:
    """The ``.idx`` code of a token type; refuses types that Megatron has no code for."""
    for code, known in DTYPE_CODES.items():
        if np.dtype(known) == dtype:
            return code
    raise DataError(f"tokens of type {dtype} cannot be stored in an .idx file")


def contiguous_index(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """Bytes of the ``.idx`` of sequences that lie back to back, one sequence a document.

    `lengths` is int[N] in tokens; all byte arithmetic is 64-bit.
    """
    count = len(lengths)
    pointers = np.zeros(count, np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= dtype.itemsize
    return b"".join(
        (
            HEADER.pack(MAGIC, VERSION, dtype_code(dtype), count, count + 1),
            lengths.astype("<i4").tobytes(),
            pointers.astype("<i8").tobytes(),
            np.arange(count + 1, dtype="<i8").tobytes(),
        )
    )


def read_index(path: Path) -> Index:
    """Map an ``.idx`` file; refuses a wrong magic, version, dtype code or file length."""
    try:
        raw = np.memmap(path, np.uint8, mode="r")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: the artifact is incomplete") from None
    except ValueError as error:
        raise DataError(f"{path} is empty: {error}") from error
    if len(raw) < HEADER.size:
        raise DataError(f"{path} has {len(raw)} bytes, fewer than its header of {HEADER.size}")
    magic, version, code, count, documents = HEADER.unpack(raw[: HEADER.size].tobytes())
    if magic != MAGIC or version != VERSION or code not in DTYPE_CODES:
        raise DataError(
            f"{path} is not a Megatron index: magic {magic!r}, version {version}, dtype code "
            f"{code}; expected {MAGIC!r}, {VERSION}, one of {sorted(DTYPE_CODES)}"
        )
    expected = HEADER.size + 12 * count + 8 * documents
    if len(raw) != expected:
        raise DataError(
            f"{path} has {len(raw)} bytes, but {count} sequences in {documents} document "
            f"boundaries take {expected}: the file is truncated or overwritten"
        )
    return Index(
        dtype=np.dtype(DTYPE_CODES[code]),
        lengths=np.frombuffer(raw, "<i4", count, HEADER.size),
        pointers=np.frombuffer(raw, "<i8", count, HEADER.size + 4 * count),
        raw=raw,
    )


def check_pointers(index: Index, *, bin_bytes: int, path: Path) -> int:
    """The number of tokens of an index.

    Refuses one whose sequences do not all lie inside a ``.bin`` of `bin_bytes` bytes.
    """
    num_tokens = 0
    for start in range(0, len(index.lengths), _BLOCK):
        pointers = index.pointers[start : start + _BLOCK]
        lengths = index.lengths[start : start + _BLOCK]
        ends = pointers + lengths.astype(np.int64) * index.dtype.itemsize
        bad = np.flatnonzero((pointers < 0) | (lengths < 0) | (ends > bin_bytes) | (ends < 0))
        if len(bad):
            at = bad[0]
            raise DataError(
                f"{path}: sequence {start + at} spans bytes {pointers[at]} to {ends[at]}, but its "
                f".bin has {bin_bytes}; the index is corrupt or leads into another file"
            )
        num_tokens += int(lengths.sum(dtype=np.int64))
        drop_pages(index.raw)
    return num_tokens
