"""A model that some other program wrote, under Hugging Face's names: checked, then read in parts.

A source is believed only after a check of the names, shapes and types of all its tensors against
its configuration, so that a wrong table shows as an error and not as a model that is a little
worse.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_miniplm.core.errors import CheckpointError
from megatron_miniplm.core.manifest import hash_file, hash_parts
from megatron_miniplm.models.family import ModelConfig, ModelFamily
from megatron_miniplm.models.global_tensors import GlobalSource, Parameter
from megatron_miniplm.models.mapping import Box, Shape
from megatron_miniplm.models.tensor_files import Stored
from megatron_miniplm.parallel.topology import Layout

NOT_SHAPE = ("model", "make_vocab_size_divisible_by", "init_method_std", "max_position_embeddings")
"""Fields of `ModelConfig` that may differ from a source's: they do not touch its weights."""


class ForeignSource(GlobalSource):
    """Weights that another program wrote, in files of its own."""

    path: Path
    config: ModelConfig
    token_ids: Mapping[str, Any]
    """``bos_token_id``, ``eos_token_id``, ``pad_token_id``, as far as the model has them."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that hold the weights."""

    @abstractmethod
    def identify(self, hashes: Sequence[str]) -> str:
        """The fingerprint that follows from the hashes of `files`."""

    @cached_property
    def fingerprint(self) -> str:
        """What this model is, whatever it is called (reads its files once)."""
        return self.identify([hash_file(path) for path in self.files()])

    def shared_fingerprint(self, layout: Layout) -> str:
        """The same, but every rank reads its share of the files (a collective)."""
        return self.identify(layout.share(self.files(), hash_file))


class Pretrained(Mapping[str, Tensor], ForeignSource):
    """Tensor name -> whole tensor, read when asked for; a subclass opens a format."""

    family: ModelFamily
    tensors: Mapping[str, Stored]
    described_in: str
    """What the errors call the place of the configuration."""

    def identify(self, hashes: Sequence[str]) -> str:
        """See `ForeignSource.identify`: hash of the shape and of the files with weights."""
        return hash_parts(repr(sorted(asdict(self.config).items())), *hashes)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter of the model."""
        yield from parameters_of(self.family, self.config)

    def shape(self, key: str, layer: int | None) -> Shape | None:
        """Shape of a parameter, None if this family has no such one."""
        rule = self._rules.get(key)
        return rule.megatron_shape if rule and rule.per_layer == (layer is not None) else None

    @torch.no_grad()
    def read(self, key: str, layer: int | None, box: Box, out: Tensor) -> None:
        """Copy the part `box` of a global Megatron tensor into `out`, in the type of `out`."""
        rule = self._rules[key]
        rule.read([self.tensors[name].open() for name in rule.hf_names(layer)], box, out)

    def _check(self) -> None:
        """Settle the rules; refuse what is missing, unknown, of another shape, or not numbers."""
        self._rules = {rule.megatron: rule for rule in self.family.rules(self.config)}
        expected = hf_tensors_of(self.family, self.config)
        missing = [name for name in expected if name not in self.tensors]
        unknown = [name for name in self.tensors if name not in expected and not self._spare(name)]
        if missing or unknown:
            raise CheckpointError(
                f"{self.path}: its tensors are not those of a {self.family.name} model of its "
                f"{self.described_in}: missing {_some(missing)}; unknown {_some(unknown)}"
            )
        for name, shape in expected.items():
            found = self.tensors[name]
            if found.shape != shape:
                raise CheckpointError(
                    f"{self.path}: {name} has shape {list(found.shape)}, but {self.described_in} "
                    f"asks for {list(shape)}"
                )
            if not found.readable:
                raise CheckpointError(
                    f"{self.path}: {name} is of type {found.kind}, which is not floating point: a "
                    "quantized model must be expanded first"
                )

    def _spare(self, name: str) -> bool:
        """Whether a tensor without a rule may be there: nothing learned, or a tied duplicate."""
        if re.fullmatch(self.family.ignored_tensors, name):
            return True
        twin = self.family.tied_copies.get(name)
        if twin is None or twin not in self.tensors:
            return False
        if not torch.equal(self[name], self[twin]):
            raise CheckpointError(
                f"{self.path}: {self.described_in} ties {name} to {twin}, but the two differ; "
                "set tie_word_embeddings to false if the model was trained so"
            )
        return True


def parameters_of(family: ModelFamily, config: ModelConfig) -> Iterator[Parameter]:
    """Every parameter of a model of that shape."""
    for rule in family.rules(config):
        for layer in range(config.num_layers) if rule.per_layer else (None,):
            yield rule.megatron, layer, rule.megatron_shape


def hf_tensors_of(family: ModelFamily, config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every Hugging Face tensor of a model of that shape."""
    return {
        name: shape
        for rule in family.rules(config)
        for layer in (range(config.num_layers) if rule.per_layer else (None,))
        for name, shape in zip(rule.hf_names(layer), rule.hf_shapes, strict=True)
    }


def check_same_shape(wanted: ModelConfig, found: ModelConfig, source: str) -> None:
    """Refuse, naming the first differing flag, to put weights of `source` into another shape."""
    for name, value in _shape(found).items():
        if _shape(wanted)[name] != value:
            flag = "--" + name.replace("_", "-")
            raise CheckpointError(
                f"{source} has {name} = {value!r}, but the model asked for has "
                f"{_shape(wanted)[name]!r}; pass {flag} {value}, or load another model"
            )


def _shape(config: ModelConfig) -> dict[str, Any]:
    """Fields that decide the weights and what they compute, defaults filled in."""
    fields = {name: value for name, value in asdict(config).items() if name not in NOT_SHAPE}
    fields |= {"num_query_groups": config.query_groups, "kv_channels": config.head_dim}
    if not config.use_rope_scaling:
        fields.pop("rope_scaling_factor")
    return fields


def _some(names: list[str], limit: int = 5) -> str:
    """The first few names, and how many more."""
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more
