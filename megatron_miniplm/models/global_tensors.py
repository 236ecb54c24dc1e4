"""Models by global tensor: read in parts, saved from shares, without building the model.

megatron.core's ``torch_dist`` format is PyTorch's distributed checkpoint: ``.metadata`` says which
box of which global tensor lies in which file, and where. A parameter of a layer has a leading axis
of layers (or, in some Megatron-LM checkpoints, the layer's number in its key). What this program
converts is saved as whole tensors, each by one rank; a model of any layout loads them.

The metadata is a pickle: a Megatron checkpoint is trusted input (docs/checkpoints.md).
"""

from __future__ import annotations

import io
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_miniplm.core.errors import CheckpointError
from megatron_miniplm.models.build import VOCABULARY_KEYS, named_shards
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.mapping import Box, Shape, whole
from megatron_miniplm.models.value_head import VALUE_HEAD

LAYERS = "decoder.layers."
EXTRA_STATES = (
    "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip
Parameter = tuple[str, int | None, Shape]
"""(megatron key, layer, global shape)."""


class GlobalSource(ABC):
    """Weights that can be read a part at a time, by megatron's names."""

    @abstractmethod
    def shape(self, key: str, layer: int | None) -> Shape | None:
        """Shape of a parameter, None if there is no such one."""

    @abstractmethod
    def read(self, key: str, layer: int | None, box: Box, out: Tensor) -> None:
        """Copy the part `box` of a parameter into `out`, in the type of `out`."""

    def load(self, parameter: Parameter, dtype: torch.dtype) -> Tensor:
        """A whole parameter; refuses one that is missing or of another shape."""
        key, layer, shape = parameter
        _refuse_misfit(self, parameter, free_rows=False)
        out = torch.empty(shape, dtype=dtype)
        self.read(key, layer, whole(shape), out)
        return out


@torch.no_grad()
def fill_from(model: ModelChunks, source: GlobalSource) -> None:
    """Set this rank's parameters (before the model is wrapped), reading those parts only.

    The model's vocabulary may be narrower or wider: rows beyond the source's become zero. A head
    for a number of each instance stays as it is where the source has none.
    """
    for shard in named_shards(model):
        axes = shard.prepend_axis_num
        layer = int(shard.global_offset[0]) if axes else None
        if shard.key.startswith(VALUE_HEAD) and source.shape(shard.key, layer) is None:
            continue
        wanted = (shard.key, layer, tuple(shard.global_shape[axes:]))
        rows = _refuse_misfit(source, wanted, free_rows=shard.key in VOCABULARY_KEYS)[0]
        starts = zip(shard.global_offset[axes:], shard.local_shape, strict=True)
        first, *columns = (slice(start, start + size) for start, size in starts)
        inside = slice(first.start, max(first.start, min(first.stop, rows)))
        size = inside.stop - inside.start
        if size:
            source.read(shard.key, layer, (inside, *columns), shard.data[:size])
        shard.data[size:].zero_()


def _refuse_misfit(source: GlobalSource, wanted: Parameter, *, free_rows: bool) -> Shape:
    """The source's shape of a parameter; refuses one that it lacks or has otherwise."""
    key, layer, shape = wanted
    found = source.shape(key, layer)
    if found is None:
        raise CheckpointError(f"the source has no parameter {key} (layer {layer})")
    if found[free_rows:] != shape[free_rows:]:
        raise CheckpointError(
            f"{key} (layer {layer}): the model asks for shape {list(shape)}, but the source has "
            f"{list(found)}"
        )
    return found


def share(parameters: Iterable[Parameter], rank: int, ranks: int) -> list[Parameter]:
    """The parameters that one of `ranks` ranks holds: whole ones, about as many bytes each."""
    loads = [0] * ranks
    mine = []
    largest_first = sorted(parameters, key=lambda one: -torch.Size(one[2]).numel())
    for parameter in largest_first:
        lightest = loads.index(min(loads))
        loads[lightest] += torch.Size(parameter[2]).numel()
        if lightest == rank:
            mine.append(parameter)
    return mine


def sharded(key: str, layer: int | None, tensor: Tensor, num_layers: int) -> ShardedTensor:
    """A whole parameter as megatron.core saves it, for ``dist_checkpointing.save``."""
    if layer is None:
        return ShardedTensor.from_rank_offsets(key, tensor)
    offset = (0, layer, num_layers)
    return ShardedTensor.from_rank_offsets(key, tensor, offset, prepend_axis_num=1)


def extra_states(weights: Collection[str], num_layers: int) -> dict[str, ShardedObject]:
    """What a stock GPTModel looks for beside its tensors: Transformer Engine's states, empty.

    `weights` are the keys of the model's parameters: a module that it lacks has no state.
    """
    modules = [module for module in EXTRA_STATES if f"{LAYERS}{module}.weight" in weights]
    keys = [f"{LAYERS}{module}._extra_state" for module in modules]
    return {
        f"{key}/{layer}": ShardedObject(key, None, (num_layers,), (layer,))
        for key in keys
        for layer in range(num_layers)
    }


@dataclass(frozen=True)
class GlobalTensors(GlobalSource):
    """The global tensors of a finished checkpoint (`folder` is one iteration)."""

    folder: Path

    def shape(self, key: str, layer: int | None) -> Shape | None:
        """Shape of a parameter, None if the checkpoint lacks it."""
        found = self._find(key, layer)
        if found is None:
            return None
        name, at = found
        return tuple(self._tensors[name].size[len(at) :])

    def read(self, key: str, layer: int | None, box: Box, out: Tensor) -> None:
        """Copy the part `box` of a parameter into `out`, in the type of `out`."""
        found = self._find(key, layer)
        if found is None:
            raise CheckpointError(f"{self.folder} has no parameter {key} (layer {layer})")
        name, at = found
        wanted = (*at, *box)
        covered = 0
        for chunk in self._tensors[name].chunks:
            spans = list(zip(wanted, chunk.offsets, chunk.sizes, strict=True))
            low = [max(want.start, start) for want, start, _ in spans]
            high = [min(want.stop, start + size) for want, start, size in spans]
            if any(first >= last for first, last in zip(low, high, strict=True)):
                continue
            edges = list(zip(low, high, spans, strict=True))
            inside = tuple(slice(a - start, b - start) for a, b, (_, start, _) in edges)
            target = tuple(slice(a - want.start, b - want.start) for a, b, (want, _, _) in edges)
            part = self._load(name, chunk.offsets)[inside]
            out[target[len(at) :]].copy_(part.reshape(part.shape[len(at) :]))
            covered += part.numel()
        if covered != out.numel():
            raise CheckpointError(f"{self.folder} holds only a part of {name}: it is incomplete")

    def load(self, parameter: Parameter, dtype: torch.dtype) -> Tensor:
        """See `GlobalSource.load`; what was stored whole is not copied again."""
        key, layer, shape = parameter
        name, at = self._find(key, layer) or ("", ())
        stored = self._tensors.get(name)
        sizes = torch.Size((*(1 for _ in at), *shape))
        offsets = torch.Size((*(axis.start for axis in at), *(0 for _ in shape)))
        if (
            stored
            and stored.size[len(at) :] == shape
            and ChunkStorageMetadata(offsets, sizes) in stored.chunks
        ):
            return self._load(name, offsets).reshape(shape).to(dtype)
        return super().load(parameter, dtype)

    def layers(self, key: str) -> int | None:
        """Length of a key's leading axis of layers; None where a layer's number is in the key."""
        return self._tensors[key].size[0] if key in self._tensors else None

    def names(self) -> list[str]:
        """Names of all tensors, as they are stored."""
        return sorted(self._tensors)

    def _find(self, key: str, layer: int | None) -> tuple[str, Box] | None:
        """(stored name, the box of the leading axes that is this layer)."""
        if layer is None:
            return (key, ()) if key in self._tensors else None
        if key in self._tensors:
            return key, (slice(layer, layer + 1),)
        single = f"{LAYERS}{layer}.{key.removeprefix(LAYERS)}"
        return (single, ()) if single in self._tensors else None

    @cached_property
    def _metadata(self) -> Any:
        try:
            return FileSystemReader(self.folder).read_metadata()
        except Exception as error:
            raise CheckpointError(f"{self.folder} has no readable .metadata: {error}") from error

    @cached_property
    def _tensors(self) -> Mapping[str, TensorStorageMetadata]:
        found = self._metadata.state_dict_metadata
        return {
            name: value for name, value in found.items() if isinstance(value, TensorStorageMetadata)
        }

    def _load(self, name: str, offsets: torch.Size) -> Tensor:
        """One stored chunk."""
        place = self._metadata.storage_data[MetadataIndex(name, offsets)]
        try:
            with (self.folder / place.relative_path).open("rb") as file:
                part = io.BufferedReader(_FilePart(file, place.offset, place.length))
                chunk: Tensor = torch.load(part, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {error}") from error
        return chunk


class _FilePart(io.RawIOBase):
    """A file within a file, so that the stored tensor need not be in memory as bytes as well."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.IOBase.seek`."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        self.at = base + offset
        return self.at

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase.readinto`."""
        view = memoryview(buffer)[: max(self.length - self.at, 0)]
        self.file.seek(self.start + self.at)
        count = self.file.readinto(view)  # type: ignore[attr-defined]
        self.at += count
        return int(count)
