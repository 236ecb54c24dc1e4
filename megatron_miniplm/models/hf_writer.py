"""Writing a Hugging Face folder: config.json, safetensors, tokenizer, model card.

The folder is written under a temporary name beside its place, every file fsynced, and appears by
rename: killed at any moment, it is either whole or absent.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_miniplm.core.errors import CheckpointError, ConfigError, DataError, MiniPLMError
from megatron_miniplm.core.log import progress
from megatron_miniplm.core.manifest import (
    Manifest,
    Parent,
    fsync_directory,
    hash_file,
    read_json,
    read_manifest,
    write_json,
)
from megatron_miniplm.data.staging import sync
from megatron_miniplm.models.family import ModelConfig, get_family
from megatron_miniplm.models.flops import count_parameters
from megatron_miniplm.models.global_tensors import Parameter, share
from megatron_miniplm.models.hf_folder import CONFIG, TOKEN_IDS, HfFolder
from megatron_miniplm.models.pretrained import hf_tensors_of, parameters_of
from megatron_miniplm.models.safetensors_writer import SafetensorsWriter

KIND, MANIFEST = "huggingface", "manifest.json"
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


def write_hf_folder(
    path: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, int | None, Tensor]],
    *,
    dtype: torch.dtype,
    extras: HfExtras | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the model given as (megatron key, layer, global tensor), in any order.

    Refuses an existing folder without `overwrite`, a parameter that is unknown, missing, given
    twice or of another shape, weights that are not finite, and token ids beyond the vocabulary.
    No more than one parameter is in memory at a time. Under torchrun every rank calls this, with
    the parameters of its own `share`. Rank 0 calls `check` with the folder, complete but for its
    name: what it raises leaves nothing.
    """
    extras = extras or HfExtras()
    family = get_family(config.model_family)
    hf_config = family.config_to_hf(config)
    hf_config |= _token_ids(extras.token_ids, config)
    hf_config["torch_dtype"] = str(dtype).removeprefix("torch.")
    rank, ranks = _place()
    with _new_folder(Path(path), overwrite) if rank == 0 else nullcontext(_partial(path)) as folder:
        writer = SafetensorsWriter(
            folder, hf_tensors_of(family, config), dtype, limit=max_shard_bytes
        )
        if rank == 0:
            writer.lay_out()
        _wait_for_all(ranks)
        due = share(parameters_of(family, config), rank, ranks)
        total = sum(math.prod(shape) for _, _, shape in due)
        with progress("writing (this rank)", total, "parameters") as bar:
            for name, tensor in _hf_tensors(config, tensors, due):
                writer.write(name, _storable(name, tensor, dtype))
                bar.advance(tensor.numel())
        _wait_for_all(ranks)
        if rank == 0:
            _finish(folder, config, extras, hf_config, Path(path).name)
            check(folder)


def _finish(
    folder: Path, config: ModelConfig, extras: HfExtras, hf_config: Mapping[str, Any], name: str
) -> None:
    """All that is beside the weights."""
    if extras.tokenizer_folder is not None:
        _copy_tokenizer(extras.tokenizer_folder, folder, config)
    generation = {"_from_model_config": True, **_token_ids(extras.token_ids, config)}
    write_json(folder / "generation_config.json", generation)
    card = _model_card(name, config, extras.lineage)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_json(folder / CONFIG, hf_config)
    _manifest(folder, extras.parents).write(folder / MANIFEST)


def _place() -> tuple[int, int]:
    """(rank, number of ranks) of this process; (0, 1) where there is no job."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _wait_for_all(ranks: int) -> None:
    if ranks > 1:
        dist.barrier()


def _manifest(folder: Path, parents: Mapping[str, Parent]) -> Manifest:
    """Fingerprint and lineage of a finished folder, and the hash of its every file."""
    hashes = {path: hash_file(path) for path in sorted(folder.iterdir())}
    files = {path.name: {"size": path.stat().st_size, "hash": hashes[path]} for path in hashes}
    model = HfFolder(folder)
    return Manifest(
        kind=KIND,
        fingerprint=model.identify([hashes[path] for path in model.files()]),
        parents=parents,
        content={"files": files},
    )


def _hf_tensors(
    config: ModelConfig,
    tensors: Iterable[tuple[str, int | None, Tensor]],
    expected: Iterable[Parameter],
) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor; refuses an incomplete, repeated or unknown parameter."""
    rules = {rule.megatron: rule for rule in get_family(config.model_family).rules(config)}
    due = {(key, layer) for key, layer, _ in expected}
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
    low, high = torch.aminmax(tensor)  # NaN if any is
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(f"{name} has NaN or infinite values: the training has diverged")
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous()


def refuse_to_replace(path: Path, *, overwrite: bool) -> None:
    """Refuse a `path` that is not free; `overwrite` frees what an earlier conversion left there."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{path} exists; choose another --save or pass --overwrite")
    try:
        read_manifest(path / MANIFEST, KIND)
    except (OSError, MiniPLMError) as error:
        raise ConfigError(
            f"{path} exists and was not made by `convert` ({error}): --overwrite does not remove "
            "it, choose another --save"
        ) from error


def _partial(path: Path) -> Path:
    """Where a folder is made: one name a target, so that the next run removes a killed one's."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def _new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `path` on success and vanishes on failure."""
    refuse_to_replace(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = _partial(path), path.with_name(f".{path.name}.old")
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
