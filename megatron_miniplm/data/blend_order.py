"""The order in which a blend of corpora is consumed: exact shares, and no state but a number.

It goes in blocks of B samples. At the end of a block, after n samples in all, corpus k of weight
w_k has given

    c_k(n) = floor((w_1 + ... + w_k) n) - floor((w_1 + ... + w_k-1) n)

samples, in exact arithmetic: less than one from w_k n. (B w_k >= 1 keeps it from falling.) A keyed
permutation mixes the corpora inside a block, and each corpus has its own `SampleOrder`, with its
own epochs. One corpus alone has its `SampleOrder` and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megatron_miniplm.data.instances import Permutation, SampleOrder

_BLOCK = 1 << 10
MAX_BLOCK = 1 << 20
"""The rarest corpus gives one of so many samples."""


class BlendOrder:
    """The endless stream of a blend's rows; any part of it in time proportional to the part."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[Fraction], *, seed: int) -> None:
        """`sizes`: instances of each corpus; `weights`: above 0, of any sum."""
        share = sum(weights)
        self.seed = seed
        self.sizes = np.array(sizes, dtype=np.int64)
        self._denominator = math.lcm(*((w / share).denominator for w in weights))
        whole = [int(w / share * self._denominator) for w in weights]
        self._edges = [sum(whole[:k]) for k in range(len(whole) + 1)]
        self._starts = np.cumsum([0, *sizes])
        self._orders = [SampleOrder(n, seed=seed, stream=k) for k, n in enumerate(sizes)]
        self.block = max(_BLOCK, 1 << (-(-self._denominator // min(whole)) - 1).bit_length())
        self._counted = (0, np.zeros(len(whole), np.int64))  # the last answer of `consumed`

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows (int64[count]) of samples ``first .. first + count`` of the stream."""
        parts = []
        while count:
            block, start = divmod(first, self.block)
            taken = min(count, self.block - start)
            parts.append(self._rows_of_block(block, start, taken))
            first, count = first + taken, count - taken
        return np.concatenate(parts)

    def consumed(self, samples: int) -> np.ndarray:
        """int64[K]: samples of each corpus among the first `samples` of the stream.

        Counts on from the start of the block, or from the last answer where that is inside of it:
        a block can be a million samples, and training asks every few.
        """
        block = samples // self.block
        start = block * self.block
        known, counts = self._counted
        if not start <= known <= samples:
            known, counts = start, self._quota(block)
        sources = self._places(block, known - start, samples - known)[0]
        counts = counts + np.bincount(sources, minlength=len(self.sizes))
        self._counted = samples, counts
        return counts

    def _rows_of_block(self, block: int, start: int, count: int) -> np.ndarray:
        sources, samples = self._places(block, start, count)
        out = np.empty(count, np.int64)
        for source, order in enumerate(self._orders):
            here = sources == source
            out[here] = self._starts[source] + order.at(samples[here])
        return out

    def _places(self, block: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, which sample of its own order) of `count` samples of a block."""
        slots = np.arange(start, start + count)
        if len(self.sizes) > 1:
            slots = Permutation(
                self.block, seed=self.seed, epoch=block, stream=len(self.sizes)
            )(slots)  # fmt: skip
        before = self._quota(block)
        here = np.cumsum(self._quota(block + 1) - before)  # ends of the corpora among the slots
        sources = np.searchsorted(here, slots, side="right")
        return sources, slots + (before - np.concatenate([[0], here[:-1]]))[sources]

    def _quota(self, block: int) -> np.ndarray:
        """int64[K]: samples of each corpus before a block."""
        floors = [edge * block * self.block // self._denominator for edge in self._edges]
        return np.diff(np.array(floors, dtype=np.int64))
