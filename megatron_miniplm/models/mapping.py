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
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_miniplm.core.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """One row of the table; subclasses say how the tensors are put together and taken apart."""

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

    @abstractmethod
    def _join(self, parts: Sequence[Tensor]) -> Tensor: ...

    @abstractmethod
    def _split(self, whole: Tensor) -> Sequence[Tensor]: ...

    def to_megatron(self, tensors: Mapping[str, Tensor], layer: int | None = None) -> Tensor:
        """The global Megatron tensor of `layer`; refuses shapes other than the configuration's."""
        names = self.hf_names(layer)
        parts = [tensors[name] for name in names]
        for name, part, shape in zip(names, parts, self.hf_shapes, strict=True):
            _check_shape(name, tuple(part.shape), shape)
        return self._join(parts)

    def to_hf(self, tensor: Tensor, layer: int | None = None) -> dict[str, Tensor]:
        """The Hugging Face tensors, by full name; the exact inverse of `to_megatron`."""
        _check_shape(self.megatron, tuple(tensor.shape), self.megatron_shape)
        parts = [part.contiguous() for part in self._split(tensor)]
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

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def _split(self, whole: Tensor) -> Sequence[Tensor]:
        return (whole,)


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

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def _split(self, whole: Tensor) -> Sequence[Tensor]:
        return whole.split(self.shape[0])


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

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        grouped = [
            part.reshape(self.groups, rows, *self.columns)
            for part, rows in zip(parts, self._rows, strict=True)
        ]
        return torch.cat(grouped, dim=1).reshape(self.megatron_shape)

    def _split(self, whole: Tensor) -> Sequence[Tensor]:
        grouped = whole.reshape(self.groups, sum(self._rows), *self.columns)
        parts = grouped.split(self._rows, dim=1)
        return [part.reshape(shape) for part, shape in zip(parts, self.hf_shapes, strict=True)]


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

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        padding = part.new_zeros(self.padded_vocab_size - self.vocab_size, self.hidden_size)
        return torch.cat([part, padding])

    def _split(self, whole: Tensor) -> Sequence[Tensor]:
        return (whole[: self.vocab_size],)


def _check_shape(name: str, found: Shape, expected: Shape) -> None:
    if found != expected:
        raise CheckpointError(
            f"{name} has shape {list(found)}, but the model configuration asks for "
            f"{list(expected)}; use the configuration that belongs to these weights"
        )
