"""The k highest logits of every row, without sorting rows.

The row is cut into blocks. The k blocks with the highest maxima hold the k highest columns: a
column of another block has k higher ones above it, the maxima of those blocks. So one pass over the
row finds the maxima of blocks of 64, the chosen blocks are cut into blocks of 8 in the same way,
and what is sorted at last is 8 k candidates instead of V columns.

Equal logits (frequent in bf16) are ordered by column, the lowest first, by sorting integers that
say both; so what is found depends on the values alone, not on the device or the cut into shards.

Shapes: C tokens, v columns, n candidates in the order of their columns, k kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCKS = (64, 8)
"""Columns of a block, coarse to fine."""
_LOW_BITS = (1 << 32) - 1


def top_k(logits_Cv: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the k highest logits [C, k] fp32, highest first; their columns [C, k] int64).

    Any 32- or 16-bit floats. What no comparison orders (NaN) is anywhere.
    """
    if not 0 < k <= logits_Cv.shape[1]:
        raise ValueError(f"the {k} highest of {logits_Cv.shape[1]} columns")
    values_Cn, cuts = logits_Cv, []
    for block in BLOCKS:
        if 2 * k * block < values_Cn.shape[1]:
            cut = _Cut.of(values_Cn, k, block)
            values_Cn = cut.candidates(values_Cn)
            cuts.append(cut)
    best_Ck, places_Ck = _best(values_Cn, k)
    for cut in reversed(cuts):
        places_Ck = cut.origins(places_Ck)
    return best_Ck, places_Ck


@dataclass(frozen=True)
class _Cut:
    """Which columns are still candidates: k blocks of every row, and what no whole block holds."""

    block: int
    whole: int
    """Columns in whole blocks."""
    chosen_Ck: torch.Tensor
    """Numbers of the blocks, ascending."""

    @classmethod
    def of(cls, values_Cn: torch.Tensor, k: int, block: int) -> _Cut:
        """The k blocks of the highest maxima."""
        whole = values_Cn.shape[1] // block * block
        _, chosen_Ck = _best(values_Cn[:, :whole].unflatten(1, (-1, block)).amax(2), k)
        return cls(block, whole, chosen_Ck.sort(1).values)

    def candidates(self, values_Cn: torch.Tensor) -> torch.Tensor:
        """Their values, in the order of columns."""
        blocks = values_Cn[:, : self.whole].unflatten(1, (-1, self.block))
        row_C1 = torch.arange(blocks.shape[0], device=values_Cn.device)[:, None]
        found_Cm = blocks[row_C1, self.chosen_Ck].flatten(1)
        if self.whole == values_Cn.shape[1]:
            return found_Cm
        return torch.cat([found_Cm, values_Cn[:, self.whole :]], 1)

    def origins(self, places_Ck: torch.Tensor) -> torch.Tensor:
        """Where candidates were before the cut."""
        last, beyond = self.chosen_Ck.shape[1], places_Ck - self.chosen_Ck.shape[1] * self.block
        block_Ck = self.chosen_Ck.gather(1, (places_Ck // self.block).clamp_max(last - 1))
        inside_Ck = block_Ck * self.block + places_Ck % self.block
        return torch.where(beyond < 0, inside_Ck, self.whole + beyond)


def _best(values_Cn: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best by (highest value, lowest place): values fp32 and places, best first."""
    bits_Cn = (values_Cn.float() + 0.0).view(torch.int32)  # both zeros are equal
    places = torch.arange(_LOW_BITS, _LOW_BITS - bits_Cn.shape[1], -1, device=bits_Cn.device)
    best_Ck = ((_in_order(bits_Cn).long() << 32) + places).topk(k, dim=1).values
    return _in_order((best_Ck >> 32).int()).view(torch.float32), _LOW_BITS - (best_Ck & _LOW_BITS)


def _in_order(bits: torch.Tensor) -> torch.Tensor:
    """Bits of floats as integers of the same order, and back."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
