"""Tensors in files of other programs, read one part at a time: safetensors and PyTorch's zip files.

A file is mapped anew for every part and let go after it, so what has been read does not stay in the
process's memory. Nothing in a file is executed: safetensors has no code, and PyTorch's files
are unpickled with ``weights_only``, which knows tensors and containers and refuses the rest.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_miniplm.core.errors import CheckpointError
from megatron_miniplm.models.mapping import Box, Shape, Sliceable, whole

FLOAT_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
"""Names that safetensors has for the types that weights may be stored in."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file: what it is, and how to get at it."""

    shape: Shape
    kind: str
    """Type as its file calls it; one of FLOAT_TYPES, or of a quantisation that `open` undoes."""
    readable: bool
    """Whether `open` gives floating point numbers."""
    open: Callable[[], Sliceable]

    def load(self) -> Tensor:
        """The whole tensor."""
        return self.open()[whole(self.shape)]


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Tensors of a ``.safetensors`` file by name; refuses one that is truncated or no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is missing, truncated or not safetensors ({error}); copy or download it again"
        ) from error
    return {
        name: Stored(
            shape=tuple(view.get_shape()),
            kind=view.get_dtype(),
            readable=view.get_dtype() in FLOAT_TYPES,
            open=partial(_SafetensorsView, path, name),
        )
        for name, view in views.items()
    }


def open_pickled(path: Path) -> dict[str, Stored]:
    """Tensors of a PyTorch ``.bin`` file by name; refuses whatever is more than named tensors."""
    kinds = {dtype: kind for kind, dtype in FLOAT_TYPES.items()}
    return {
        name: Stored(
            shape=tuple(tensor.shape),
            kind=kinds.get(tensor.dtype, str(tensor.dtype)),
            readable=tensor.dtype in kinds,
            open=partial(_PickledView, path, name),
        )
        for name, tensor in _unpickle(path).items()
    }


@dataclass(frozen=True)
class _SafetensorsView:
    path: Path
    name: str

    def __getitem__(self, box: Box) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            part: Tensor = file.get_slice(self.name)[box]
            return part


@dataclass(frozen=True)
class _PickledView:
    path: Path
    name: str

    def __getitem__(self, box: Box) -> Tensor:
        return _unpickle(self.path)[self.name][box]


def _unpickle(path: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} is missing, truncated, in PyTorch's format from before 1.6, or holds more "
            f"than tensors, which is not read because it could run code: {_first_line(error)}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(one, Tensor) for one in state.values()):
        raise CheckpointError(f"{path} holds something else than named tensors")
    return {str(name): tensor.detach() for name, tensor in state.items()}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
