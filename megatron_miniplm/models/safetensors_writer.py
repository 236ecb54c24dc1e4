"""Writing safetensors one tensor at a time, in any order.

    8 bytes: length of the header (little-endian) | header: JSON, padded with spaces | bytes

Names, shapes and type are known beforehand, so every tensor has its place before the first one is
written, and none has to wait in memory for the others of its file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_miniplm.core.manifest import write_json
from megatron_miniplm.models.hf_folder import INDEX, WEIGHTS
from megatron_miniplm.models.mapping import Shape
from megatron_miniplm.models.tensor_files import FLOAT_TYPES

_ALIGNMENT = 8


class _Place(NamedTuple):
    file: Path
    start: int


class SafetensorsWriter:
    """The weight files of a folder: one, or several of at most `limit` bytes and an index.

    One process lays them out; several may then write, each its own tensors.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, Shape], dtype: torch.dtype, *, limit: int
    ) -> None:
        self.folder = folder
        self._sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
        groups = _grouped(self._sizes, limit)
        self._headers: dict[Path, bytes] = {}
        self._places: dict[str, _Place] = {}
        kind = next(kind for kind, known in FLOAT_TYPES.items() if known == dtype)
        for at, group in enumerate(groups):
            several = f"model-{at + 1:05d}-of-{len(groups):05d}.safetensors"
            file = folder / (WEIGHTS if len(groups) == 1 else several)
            self._plan(file, {name: shapes[name] for name in group}, kind)

    def lay_out(self) -> None:
        """Make the files, with room for every tensor, and the index."""
        for file, header in self._headers.items():
            size = sum(self._sizes[name] for name, at in self._places.items() if at.file == file)
            with file.open("wb") as output:
                output.write(header)
                output.truncate(len(header) + size)
        if len(self._headers) > 1:
            weight_map = {name: place.file.name for name, place in self._places.items()}
            total = sum(self._sizes.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(self.folder / INDEX, index)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a contiguous CPU tensor of the announced shape and type."""
        place = self._places[name]
        with place.file.open("r+b") as file:
            file.seek(place.start)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def _plan(self, path: Path, shapes: Mapping[str, Shape], kind: str) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + self._sizes[name]
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._headers[path] = len(text).to_bytes(_ALIGNMENT, "little") + text
        first = len(self._headers[path])
        for name in shapes:
            self._places[name] = _Place(path, first + header[name]["data_offsets"][0])


def _grouped(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, cut into files of at most `limit` bytes (or of one tensor)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups
