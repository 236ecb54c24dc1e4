"""A choice of rows as one bit a row: 125 MB for 1,000,000,000 rows, whatever part is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_BLOCK_ROWS = 1 << 20
_BITS_SET = np.array([bin(value).count("1") for value in range(256)], np.uint8)


@dataclass(frozen=True, kw_only=True)
class RowMask:
    """Rows of one shard that are chosen."""

    bits: np.ndarray
    """uint8[ceil(num_rows / 8)]: bit r % 8 of byte r // 8 is set if row r is chosen."""
    num_rows: int
    """Rows of the shard, chosen or not."""

    @classmethod
    def of_rows(cls, rows: np.ndarray, num_rows: int) -> RowMask:
        """The mask with `rows` (int64, in [0, num_rows))."""
        chosen = np.zeros(num_rows, bool)
        chosen[rows] = True
        return cls(bits=np.packbits(chosen, bitorder="little"), num_rows=num_rows)

    def count(self) -> int:
        """How many rows are chosen."""
        step = _BLOCK_ROWS
        parts = (self.bits[at : at + step] for at in range(0, len(self.bits), step))
        return sum(int(_BITS_SET[part].sum(dtype=np.int64)) for part in parts)

    def is_chosen(self, start: int, stop: int) -> np.ndarray:
        """bool[stop - start], for rows from `start`, a multiple of 8."""
        part = self.bits[start // 8 : -(-stop // 8)]
        return np.unpackbits(part, count=stop - start, bitorder="little").view(bool)

    def are_chosen(self, rows: np.ndarray) -> np.ndarray:
        """bool[n], for any rows (int64[n])."""
        return (self.bits[rows >> 3] >> (rows & 7).astype(np.uint8) & 1).view(bool)

    def blocks(self, size: int = _BLOCK_ROWS) -> Iterator[np.ndarray]:
        """int64 chosen rows, ascending, of `size` (a multiple of 8) rows at a time."""
        for start in range(0, self.num_rows, size):
            stop = min(start + size, self.num_rows)
            yield np.flatnonzero(self.is_chosen(start, stop)) + start

    def rows(self) -> np.ndarray:
        """int64[K], ascending: all chosen rows."""
        return np.concatenate([np.zeros(0, np.int64), *self.blocks()])
