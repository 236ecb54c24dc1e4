"""Columns in mapped files, read once from front to back in little memory.

Pages of a mapping that were read count as this process's memory until they are given back, so
whoever streams over a column of any size drops them behind itself.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_miniplm.core.errors import DataError

BLOCK_ROWS = 1 << 20


def mapping_of(column: np.ndarray) -> mmap.mmap | None:
    """The read-only file mapping that a column lies in, whose pages may be dropped; else None."""
    base: object = column
    while isinstance(base, np.ndarray | memoryview):
        if isinstance(base, np.memmap) and base.mode != "r":
            return None
        base = base.obj if isinstance(base, memoryview) else base.base
    return base if isinstance(base, mmap.mmap) else None


def load_column(
    path: Path, count: int, dtype: npt.DTypeLike, *, remedy: str = "restore it"
) -> np.ndarray:
    """A per-instance column in an ``.npy`` file, mapped; refuses another length or type.

    `remedy` is what the refusal tells the user to do.
    """
    try:
        column: np.ndarray = np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; {remedy}") from error
    if column.shape != (count,) or column.dtype != dtype:
        raise DataError(
            f"{path} holds {column.dtype}{list(column.shape)}, expected "
            f"{np.dtype(dtype)}[{count}]; {remedy}"
        )
    return column


def drop_pages(column: np.ndarray) -> None:
    """Give all pages of a column's file mapping back; other memory is left alone."""
    mapped = mapping_of(column)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


def blocks(column: np.ndarray, rows: int = BLOCK_ROWS) -> Iterator[np.ndarray]:
    """Views of `rows` rows at a time; pages of one are dropped once the next is asked for."""
    for start in range(0, len(column), rows):
        yield column[start : start + rows]
        drop_pages(column)


def hash_streams(name: str, *streams: tuple[int, Iterable[np.ndarray]]) -> str:
    """`core.manifest.hash_parts` of `name` and byte streams, each with its size, in little memory.

    A stream yields contiguous arrays; refuses one that is not as long as it says.
    """
    digest = xxhash.xxh3_128()
    data = name.encode()
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)
    for size, arrays in streams:
        digest.update(size.to_bytes(8, "little"))
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data.cast("B"))
            size -= array.nbytes
        if size:
            raise ValueError(f"a stream differs from its size by {size} bytes")
    return digest.hexdigest()


def all_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
