"""Parameter rules: how Hugging Face tensors become Megatron-Core tensors, and back, bit for bit.

One rule is one row of a family's table. It names the Hugging Face tensors (``{layer}`` stands for
the layer number) and the key of the *global* tensor, i.e. of the whole tensor before any tensor
parallel split, as megatron-core's sharded state dict spells it (without the layer number).

==========  =====================================  =========================================
rule        Hugging Face                           Megatron-Core
==========  =====================================  =========================================
`Direct`    one tensor ``[...]``                   the same
`Gated`     gate ``[F, H]``, up ``[F, H]``         ``[2F, H]`` = [gate; up]
`Qkv`       q ``[A*D, ...]``, k, v ``[G*D, ...]``  ``[(A + 2G)*D, ...]``; for every query group
                                                   its A/G query heads, then its k, then its v
`Vocab`     ``[V, H]``                             ``[padded V, H]``, zero rows below
==========  =====================================  =========================================

All of them only put rows (axis 0) into another order, so a rule is a list of runs of rows. That
list is read in both directions, and any part of a tensor is read without the rest of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from megatron_miniplm.core.errors import CheckpointError

BLOCK_ELEMENTS = 1 << 22
"""How much of a tensor is read at a time: what is read is in memory twice."""

Shape = tuple[int, ...]
Box = tuple[slice, ...]
"""A part of a tensor: a slice with start and stop an axis."""


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor."""
    return tuple(slice(0, size) for size in shape)


class Sliceable(Protocol):
    """A tensor, or something that reads a part of one when asked."""

    def __getitem__(self, box: Box) -> Tensor:
        """That part."""


class Run(NamedTuple):
    """Consecutive rows of one Hugging Face tensor."""

    part: int
    """Which of the rule's tensors."""
    start: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """One row of the table; subclasses say which rows lie where."""

    hf: Sequence[str]
    """Hugging Face names, with ``{layer}`` when there is one tensor per layer."""
    megatron: str
    """Key of the global tensor in megatron-core's sharded state dict, without layer number."""

    @property
    def per_layer(self) -> bool:
        """Whether there is one such parameter in every layer."""
        return "{layer}" in self.hf[0]

    def hf_names(self, layer: int | None = None) -> tuple[str, ...]:
        """Hugging Face names of `layer` (None for a parameter outside the layers)."""
        return tuple(name.format(layer=layer) for name in self.hf)

    @property
    @abstractmethod
    def hf_shapes(self) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors, in the order of `hf`."""

    @property
    @abstractmethod
    def megatron_shape(self) -> Shape:
        """Shape of the global tensor."""

    @property
    def runs(self) -> Sequence[Run]:
        """The rows of the global tensor from the first on; rows after the last run are zero."""
        return [Run(part, 0, shape[0]) for part, shape in enumerate(self.hf_shapes)]

    def read(self, parts: Sequence[Sliceable], box: Box, out: Tensor) -> None:
        """Copy the part `box` of the global tensor into `out`, in the type of `out`.

        `parts` are the Hugging Face tensors, in the order of `hf`; only what `box` needs is read.
        """
        wanted, *columns = box
        width = max(1, math.prod(part.stop - part.start for part in columns))
        at = 0
        for part, start, rows in self.runs:
            first, last = max(wanted.start, at), min(wanted.stop, at + rows)
            for row in range(first, last, step := max(1, BLOCK_ELEMENTS // width)):
                end = min(row + step, last)
                source = slice(start + row - at, start + end - at)
                target = out[row - wanted.start : end - wanted.start]
                target.copy_(parts[part][source, *columns])
            at += rows
        out[max(at - wanted.start, 0) :].zero_()

    def to_megatron(self, tensors: Mapping[str, Tensor], layer: int | None = None) -> Tensor:
        """The global Megatron tensor of `layer`; refuses shapes other than the configuration's."""
        names = self.hf_names(layer)
        parts = [tensors[name] for name in names]
        for name, part, shape in zip(names, parts, self.hf_shapes, strict=True):
            _check_shape(name, tuple(part.shape), shape)
        out = parts[0].new_empty(self.megatron_shape)
        self.read(parts, whole(self.megatron_shape), out)
        return out

    def to_hf(self, tensor: Tensor, layer: int | None = None) -> dict[str, Tensor]:
        """The Hugging Face tensors, by full name (maybe views); the inverse of `to_megatron`."""
        _check_shape(self.megatron, tuple(tensor.shape), self.megatron_shape)
        if len(self.runs) == 1:
            (run,) = self.runs
            return {self.hf_names(layer)[0]: tensor[: run.rows]}
        parts = [tensor.new_empty(shape) for shape in self.hf_shapes]
        at = 0
        for part, start, rows in self.runs:
            parts[part][start : start + rows] = tensor[at : at + rows]
            at += rows
        return dict(zip(self.hf_names(layer), parts, strict=True))


@dataclass(frozen=True, kw_only=True)
class Direct(Rule):
    """One tensor, the same on both sides."""

    shape: Shape

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """One shape: `shape`."""
        return (self.shape,)

    @property
    def megatron_shape(self) -> Shape:
        """`shape`."""
        return self.shape


@dataclass(frozen=True, kw_only=True)
class Gated(Rule):
    """Gate and up projections ``[F, H]`` stacked to ``[2F, H]``."""

    shape: Shape
    """Shape of each of the two."""
    PARTS: ClassVar[int] = 2

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """Gate, up."""
        return (self.shape,) * self.PARTS

    @property
    def megatron_shape(self) -> Shape:
        """``[2F, H]``."""
        return (self.PARTS * self.shape[0], *self.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Qkv(Rule):
    """Query, key and value projections (weights, or biases), interleaved per query group.

    A tensor parallel rank owns whole query groups, so each group's heads must lie together.
    """

    heads: int
    groups: int
    head_dim: int
    columns: Shape
    """What follows the rows: ``(hidden,)`` for weights, ``()`` for biases."""

    @property
    def _rows(self) -> tuple[int, int, int]:
        """Rows of q, k, v within one group."""
        return (self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim)

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """q, k, v."""
        q, k, v = ((self.groups * rows, *self.columns) for rows in self._rows)
        return q, k, v

    @property
    def megatron_shape(self) -> Shape:
        """``[(A + 2G)*D, ...]``."""
        return (self.groups * sum(self._rows), *self.columns)

    @property
    def runs(self) -> Sequence[Run]:
        """Group by group: its queries, its key, its value."""
        return [
            Run(part, group * rows, rows)
            for group in range(self.groups)
            for part, rows in enumerate(self._rows)
        ]


@dataclass(frozen=True, kw_only=True)
class Vocab(Rule):
    """Embedding or output matrix: zero rows pad the vocabulary, and are dropped on the way back.

    The padding is a fixed multiple (never a function of tensor parallelism), so a model is the
    same in every layout; padded columns are excluded from every softmax elsewhere.
    """

    vocab_size: int
    padded_vocab_size: int
    hidden_size: int

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """``[V, H]``."""
        return ((self.vocab_size, self.hidden_size),)

    @property
    def megatron_shape(self) -> Shape:
        """``[padded V, H]``."""
        return (self.padded_vocab_size, self.hidden_size)


def _check_shape(name: str, found: Shape, expected: Shape) -> None:
    if found != expected:
        raise CheckpointError(
            f"{name} has shape {list(found)}, but the model configuration asks for "
            f"{list(expected)}; use the configuration that belongs to these weights"
        )
