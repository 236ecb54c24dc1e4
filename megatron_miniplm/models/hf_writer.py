"""Writing a Hugging Face folder: config.json, safetensors, tokenizer, model card.

The folder is written under a temporary name beside its place, every file fsynced, and appears by
rename: killed at any moment, it is either whole or absent.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_miniplm.core.errors import CheckpointError, ConfigError, DataError
from megatron_miniplm.core.log import progress
from megatron_miniplm.core.manifest import (
    Manifest,
    Parent,
    fsync_directory,
    hash_file,
    read_json,
    write_json,
)
from megatron_miniplm.data.staging import sync
from megatron_miniplm.models.build import named_shards
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.convert import (
    CONFIG,
    INDEX,
    TOKEN_IDS,
    WEIGHTS,
    HfFolder,
    is_hf_folder,
)
from megatron_miniplm.models.family import ModelConfig, get_family
from megatron_miniplm.models.flops import count_parameters

MAX_SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "tokenizer_meta.json",
)  # fmt: skip
TOKENIZER_MODELS = ("tokenizer.json", "tokenizer.model", "vocab.json")
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class HfExtras:
    """What a folder holds beside the weights."""

    tokenizer_folder: Path | None = None
    """Folder whose tokenizer files are copied."""
    token_ids: Mapping[str, Any] = field(default_factory=dict)
    """``bos_token_id``, ``eos_token_id``, ``pad_token_id`` for config.json."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """Facts for the model card: fingerprints, method, iterations, losses."""
    parents: Mapping[str, Parent] = field(default_factory=dict)
    """What the model was made from, for the folder's manifest."""


def global_tensors(model: ModelChunks) -> Iterator[tuple[str, int | None, Tensor]]:
    """(megatron key, layer, global tensor) of a model that is whole in this process.

    megatron.core names the gate and up halves of one parameter as two shards: they are joined.
    Refuses a model of which this process holds only a part.
    """
    joined: dict[tuple[str, int | None], tuple[Tensor, int]] = {}
    for shard in named_shards(model):
        axes = shard.prepend_axis_num
        key = (shard.key, int(shard.global_offset[0]) if axes else None)
        shape = tuple(shard.global_shape[axes:])
        whole, filled = joined.pop(key, (shard.data.new_empty(shape), 0))
        spans = zip(shard.global_offset[axes:], shard.local_shape, strict=True)
        whole[tuple(slice(start, start + size) for start, size in spans)] = shard.data
        filled += shard.data.numel()
        if filled == whole.numel():
            yield *key, whole
        else:
            joined[key] = (whole, filled)
    if joined:
        raise CheckpointError(f"this process holds only a part of {next(iter(joined))[0]}")


def write_hf_folder(
    path: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, int | None, Tensor]],
    *,
    dtype: torch.dtype,
    extras: HfExtras | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model given as (megatron key, layer, global tensor), in any order.

    Refuses an existing folder without `overwrite`, a parameter that is unknown, missing, given
    twice or of another shape, weights that are not finite, and token ids beyond the vocabulary.
    """
    extras = extras or HfExtras()
    hf_config = get_family(config.model_family).config_to_hf(config)
    hf_config |= _token_ids(extras.token_ids, config)
    hf_config["torch_dtype"] = str(dtype).removeprefix("torch.")
    with _new_folder(Path(path), overwrite) as folder:
        shards = _Shards(folder, max_shard_bytes)
        with progress("writing", count_parameters(config), "parameters") as bar:
            for name, tensor in _hf_tensors(config, tensors):
                shards.add(name, _storable(name, tensor, dtype))
                bar.advance(tensor.numel())
        shards.finish()
        if extras.tokenizer_folder is not None:
            _copy_tokenizer(extras.tokenizer_folder, folder, config)
        generation = {"_from_model_config": True, **_token_ids(extras.token_ids, config)}
        write_json(folder / "generation_config.json", generation)
        card = _model_card(Path(path).name, config, extras.lineage)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / CONFIG, hf_config)
        _manifest(folder, extras.parents).write(folder / "manifest.json")


def _manifest(folder: Path, parents: Mapping[str, Parent]) -> Manifest:
    """Fingerprint and lineage of a finished folder, and the hash of its every file."""
    files = {
        path.name: {"size": path.stat().st_size, "hash": hash_file(path)}
        for path in sorted(folder.iterdir())
    }
    return Manifest(
        kind="huggingface",
        fingerprint=HfFolder(folder).fingerprint,
        parents=parents,
        content={"files": files},
    )


def _hf_tensors(
    config: ModelConfig, tensors: Iterable[tuple[str, int | None, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor; refuses an incomplete, repeated or unknown parameter."""
    rules = {rule.megatron: rule for rule in get_family(config.model_family).rules(config)}
    due = {
        (rule.megatron, layer)
        for rule in rules.values()
        for layer in (range(config.num_layers) if rule.per_layer else (None,))
    }
    for key, layer, tensor in tensors:
        if (key, layer) not in due:
            why = "was given twice" if key in rules else "has no rule in this family"
            raise CheckpointError(f"parameter {key} (layer {layer}) {why} or is out of range")
        due.discard((key, layer))
        yield from rules[key].to_hf(tensor, layer).items()
    if due:
        key, layer = min(due, key=str)
        raise CheckpointError(
            f"{len(due)} parameters were not given, e.g. {key} (layer {layer}): the checkpoint is "
            "incomplete or of another shape"
        )


def _storable(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{name} has NaN or infinite values: the training has diverged")
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous()


class _Shards:
    """Safetensors files of limited size; their final names need the total, so come at the end."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.contents: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self.pending and self.pending_bytes + tensor.nbytes > self.limit:
            self._flush()
        self.pending[name] = tensor
        self.pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def finish(self) -> None:
        self._flush()
        count = len(self.contents)
        if count == 1:
            self._part(0).rename(self.folder / WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.contents):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_json(self.folder / INDEX, index)

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"

    def _flush(self) -> None:
        file = self._part(len(self.contents))
        save_file(self.pending, file, metadata={"format": "pt"})
        self.contents.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0


@contextmanager
def _new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `path` on success and vanishes on failure."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not overwrite:
            raise ConfigError(f"{path} exists; choose another --save or pass --overwrite")
        if not is_hf_folder(path):
            raise ConfigError(
                f"{path} exists and is not a Hugging Face folder; --overwrite does not remove it"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name per target, so that what a killed run left is removed by the next one.
    partial, old = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old"))
    for stale in (partial, old):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync(partial)
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    fsync_directory(path.parent)


def _token_ids(given: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The ids for config.json; eos may be a list of them."""
    for name, value in given.items():
        ids = value if isinstance(value, list) else [value]
        if name not in TOKEN_IDS:
            raise ConfigError(f"{name} is not one of {', '.join(TOKEN_IDS)}")
        if not all(isinstance(one, int) and 0 <= one < (config.vocab_size or 0) for one in ids):
            raise ConfigError(
                f"{name} = {value!r} is not a token of a vocabulary of {config.vocab_size}"
            )
    return dict(given)


def _copy_tokenizer(source: Path, folder: Path, config: ModelConfig) -> None:
    """Copy the tokenizer files; a bare tokenizer.json gets the settings that transformers needs."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not any(name in TOKENIZER_MODELS for name in names):
        raise DataError(f"{source} holds no tokenizer ({' or '.join(TOKENIZER_MODELS)})")
    for name in names:
        shutil.copyfile(source / name, folder / name)
    if "tokenizer.json" in names and "tokenizer_config.json" not in names:
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        if "tokenizer_meta.json" in names:
            settings["eos_token"] = read_json(source / "tokenizer_meta.json").get("eod_token")
        write_json(folder / "tokenizer_config.json", settings)


def _model_card(name: str, config: ModelConfig, lineage: Mapping[str, Any]) -> str:
    """README.md: what the model is and where it came from."""
    facts = {
        "parameters": f"{count_parameters(config):,}",
        "family": config.model_family,
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "MLP width": config.ffn_hidden_size,
        "query heads / key-value heads": f"{config.num_attention_heads} / {config.query_groups}",
        "vocabulary": config.vocab_size,
        "tied embeddings": not config.untie_embeddings_and_output_weights,
        **lineage,
    }
    cell = {key: " ".join(str(value).split()).replace("|", "\\|") for key, value in facts.items()}
    rows = "\n".join(f"| {key} | {value} |" for key, value in cell.items())
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
    return f"{head}\n# {name}\n\nWritten by `megatron_miniplm`.\n\n| | |\n|---|---|\n{rows}\n"
