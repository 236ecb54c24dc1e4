"""Reading and writing Hugging Face model folders, without `transformers`.

A folder is believed only after a check of names, shapes and types against its config.json, so
that a wrong table shows as an error and not as a model that is a little worse. Tensors are read
lazily, one parameter at a time; a folder is written under a temporary name, fsynced, and appears
by rename.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_miniplm.core.errors import CheckpointError, ConfigError, DataError
from megatron_miniplm.core.manifest import hash_file, hash_parts, read_json
from megatron_miniplm.models.family import ModelConfig, family_of

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")

NOT_SHAPE = ("model", "make_vocab_size_divisible_by", "init_method_std", "max_position_embeddings")
"""Fields of `ModelConfig` that may differ from a folder's: they do not touch its weights."""


def is_hf_folder(path: Path) -> bool:
    """Whether `path` looks like a Hugging Face folder (as against a Megatron checkpoint)."""
    return (Path(path) / CONFIG).is_file()


class HfFolder(Mapping[str, Tensor]):
    """A checked Hugging Face folder: tensor name -> tensor, read when asked for.

    Opening refuses, with a `CheckpointError`, anything missing, unknown, truncated, of another
    shape than config.json says, or not floating point; and with a `ConfigError` a model that this
    program cannot reproduce.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.raw = self._json(CONFIG)
        try:
            self.family = family_of(self.raw)
            self.config = self.family.config_from_hf(self.raw)
        except ConfigError as error:
            raise ConfigError(f"{self.path}/{error}") from error
        self.rules = self.family.rules(self.config)
        self._files = self._open()
        self._check()

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def token_ids(self) -> dict[str, Any]:
        """The special token ids of config.json (bos, eos, pad); -1 there means none."""
        return {name: self.raw[name] for name in TOKEN_IDS if self.raw.get(name) not in (None, -1)}

    @cached_property
    def fingerprint(self) -> str:
        """Content hash over the shape and the weight files (reads them once)."""
        files = sorted({file for file, _ in self._locations()})
        hashes = [hash_file(self.path / file) for file in files]
        return hash_parts(repr(sorted(asdict(self.config).items())), *hashes)

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self.path / name)
        except DataError as error:
            raise CheckpointError(f"not a usable Hugging Face folder: {error}") from error

    def _locations(self) -> Iterator[tuple[str, str | None]]:
        """(file, tensor that the index claims for it), or the one file without a claim."""
        if (self.path / INDEX).is_file():
            index = self._json(INDEX).get("weight_map")
            if not isinstance(index, dict) or not index:
                raise CheckpointError(f"{self.path / INDEX} has no weight_map")
            for tensor, file in index.items():
                if Path(str(file)).name != file:
                    raise CheckpointError(f"{self.path / INDEX}: {file!r} is not a plain file name")
                yield file, tensor
        elif (self.path / WEIGHTS).is_file():
            yield WEIGHTS, None
        else:
            legacy = sorted(self.path.glob("*.bin")) + sorted(self.path.glob("*.pth"))
            hint = (
                f"; {legacy[0].name} is a pickle, which is not read: load it with transformers and "
                "save_pretrained(..., safe_serialization=True) first"
                if legacy
                else ""
            )
            raise CheckpointError(f"{self.path} has neither {WEIGHTS} nor {INDEX}{hint}")

    def _open(self) -> dict[str, Any]:
        """Tensor name -> open file; a sharded folder must hold just what its index claims."""
        opened: dict[str, Any] = {}
        found: dict[str, Any] = {}
        claimed: dict[str, str] = {}
        for file, tensor in self._locations():
            if tensor is not None:
                claimed[tensor] = file
            if file in opened:
                continue
            try:
                opened[file] = safe_open(self.path / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.path / file} is missing, truncated or not safetensors ({error}); "
                    "copy or download it again"
                ) from error
            for name in opened[file].keys():  # noqa: SIM118 - not a mapping
                if name in found:
                    raise CheckpointError(f"{self.path}: {name} is in two files")
                found[name] = opened[file]
        for name, file in claimed.items():
            if found.get(name) is not opened[file]:
                raise CheckpointError(f"{self.path / INDEX}: {name} is not in {file}")
        return found

    def _check(self) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for rule in self.rules:
            for layer in range(self.config.num_layers) if rule.per_layer else (None,):
                expected |= dict(zip(rule.hf_names(layer), rule.hf_shapes, strict=True))
        missing = [name for name in expected if name not in self._files]
        unknown = [name for name in self._files if name not in expected and not self._spare(name)]
        if missing or unknown:
            raise CheckpointError(
                f"{self.path}: its tensors are not those of a {self.family.name} model of its "
                f"{CONFIG}: missing {_some(missing)}; unknown {_some(unknown)}"
            )
        for name, shape in expected.items():
            view = self._files[name].get_slice(name)
            if tuple(view.get_shape()) != shape:
                raise CheckpointError(
                    f"{self.path}: {name} has shape {view.get_shape()}, but {CONFIG} asks for "
                    f"{list(shape)}"
                )
            if view.get_dtype() not in FLOAT_TYPES:
                raise CheckpointError(
                    f"{self.path}: {name} is of type {view.get_dtype()}, not one of "
                    f"{', '.join(FLOAT_TYPES)}: a quantized model must be expanded first"
                )

    def _spare(self, name: str) -> bool:
        """Whether a tensor without a rule may be there: nothing learned, or a tied duplicate."""
        if re.fullmatch(self.family.ignored_tensors, name):
            return True
        twin = self.family.tied_copies.get(name)
        if twin is None or twin not in self._files:
            return False
        if not torch.equal(self[name], self[twin]):
            raise CheckpointError(
                f"{self.path}: {CONFIG} ties {name} to {twin}, but the two differ; "
                "set tie_word_embeddings to false if the model was trained so"
            )
        return True


class HfSource:
    """A source for `build.fill_by_name`: (megatron key, layer, shape) -> full tensor.

    `config` is the shape of the model to fill (default: the folder's own); it may pad the
    vocabulary otherwise, and every other difference that touches weights is refused by name.
    """

    def __init__(
        self, folder: HfFolder, dtype: torch.dtype, *, config: ModelConfig | None = None
    ) -> None:
        self.folder, self.dtype = folder, dtype
        config = config or folder.config
        check_same_shape(config, folder.config, str(folder.path))
        self._rules = {rule.megatron: rule for rule in folder.family.rules(config)}

    def __call__(self, key: str, layer: int | None, shape: tuple[int, ...]) -> Tensor:
        """The full tensor in `dtype`; refuses keys without a rule and shapes that differ."""
        rule = self._rules.get(key)
        if rule is None or rule.per_layer != (layer is not None):
            raise CheckpointError(
                f"the model has a parameter {key} (layer {layer}), for which the "
                f"{self.folder.family.name} family has no rule"
            )
        if tuple(shape) != rule.megatron_shape:
            raise CheckpointError(
                f"{key}: the model asks for shape {list(shape)}, but {self.folder.path} gives "
                f"{list(rule.megatron_shape)}"
            )
        return rule.to_megatron(self.folder, layer).to(self.dtype)


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
