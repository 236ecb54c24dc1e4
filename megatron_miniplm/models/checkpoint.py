"""Checkpoints: megatron.core's reshardable directories, made safe to trust.

    SAVE/iter_0000100/            __R_I.distcp ..., common.pt, metadata.json    (megatron.core)
                      manifest.json   size and hash of every file, the model's shape: written last
    SAVE/latest_checkpointed_iteration.txt
    SAVE/tokenizer/

Stock loading has no checksum (52-56 of 60 flipped bits loaded silently, with 0.16.1 and 0.19.2) and
writes into live parameters as it reads. So a save goes to a fresh directory that is renamed when
every byte is on disk, and a load first verifies every file against the manifest.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from megatron_miniplm.core.errors import CheckpointError, ConfigError
from megatron_miniplm.core.manifest import (
    Manifest,
    Parent,
    atomic_file,
    file_problem,
    fsync_directory,
    hash_file,
    hash_parts,
    read_json,
    read_manifest,
    relative_path,
)
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.global_tensors import GlobalTensors, fill_from
from megatron_miniplm.parallel.topology import Topology

LATEST = "latest_checkpointed_iteration.txt"
LOCK = "lock"
_MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What a checkpoint says about the model in it."""

    config: ModelConfig
    valid_vocab: int
    """Real vocabulary of the tokenizer it was trained with."""
    tokenizer_fingerprint: str
    """Tokenizer it was trained with."""
    iteration: int
    consumed_samples: int


def checkpoint_metadata() -> dict[str, Any]:
    """Options of every sharded state dict: a fresh one a call, since core writes into it."""
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def iteration_folder(save: Path, iteration: int) -> Path:
    """Where the checkpoint of that iteration is."""
    return Path(save) / f"iter_{iteration:07d}"


def latest_checkpoint(save: Path) -> Path | None:
    """Newest complete checkpoint under SAVE, or None; `save` may also be one iteration's folder."""
    save = Path(save)
    if (save / _MANIFEST).exists() and re.fullmatch(r"iter_\d{7}", save.name):
        return save
    tracker = save / LATEST
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise CheckpointError(f"{tracker} holds {text!r}, not an iteration")
    folder = iteration_folder(save, int(text))
    if not (folder / _MANIFEST).exists():
        raise CheckpointError(
            f"{tracker} names iteration {text}, but {folder} has no complete checkpoint; write "
            f"the number of an older complete one into {LATEST}"
        )
    return folder


def save_checkpoint(
    save: Path,
    trained: TrainedModel,
    state: Mapping[str, Any],
    *,
    topology: Topology,
    parents: Mapping[str, tuple[str, Path]],
    config: Mapping[str, Any],
) -> Path:
    """Write one checkpoint from every rank's `state` (sharded state dict); atomic and durable.

    `parents` gives the (fingerprint, path) of what the model was made from, by role.
    """
    folder = iteration_folder(save, trained.iteration)
    temporary = folder.with_name(f".{folder.name}.tmp")
    if topology.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(dict(state), str(temporary))
    dist.barrier()
    files = _hash_all(temporary, topology)
    if topology.rank == 0:
        manifest_path = folder / _MANIFEST
        manifest = Manifest(
            kind="checkpoint",
            fingerprint=hash_parts(*(f"{name}:{fact['hash']}" for name, fact in files.items())),
            parents={
                role: Parent(fingerprint=print_, path=relative_path(path, manifest_path))
                for role, (print_, path) in parents.items()
            },
            config=config,
            content={**asdict(trained), "files": files, "tokenizer": {"path": "../tokenizer"}},
        )
        manifest.write(temporary / _MANIFEST)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        fsync_directory(folder.parent)
        with atomic_file(Path(save) / LATEST) as file:
            file.write(f"{trained.iteration}\n".encode())
    dist.barrier()
    return folder


@dataclass(frozen=True, kw_only=True)
class RetentionConfig:
    """Which checkpoints of a run stay."""

    save_keep_last: int | None = None
    """Keep the last so many checkpoints; default: all."""
    save_retain_interval: int | None = None
    """With --save-keep-last: also keep those whose iteration is a multiple of this."""

    def __post_init__(self) -> None:
        for name in ("save_keep_last", "save_retain_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.save_retain_interval is not None and self.save_keep_last is None:
            raise ConfigError(
                f"--save-retain-interval {self.save_retain_interval} has no effect without "
                "--save-keep-last: all checkpoints are kept"
            )


def remove_old_checkpoints(save: Path, retention: RetentionConfig, *, saved: int) -> None:
    """Remove the complete checkpoints that need not stay (rank 0, after iteration `saved`).

    Later ones stay: they are from before the run was taken back to an earlier checkpoint.
    """
    if retention.save_keep_last is None:
        return
    there = (int(path.parent.name[len("iter_") :]) for path in save.glob(f"iter_*/{_MANIFEST}"))
    before = sorted(iteration for iteration in there if iteration <= saved)
    for iteration in before[: -retention.save_keep_last]:
        if retention.save_retain_interval and iteration % retention.save_retain_interval == 0:
            continue
        folder = iteration_folder(save, iteration)
        (folder / _MANIFEST).unlink()  # from here on it does not open
        shutil.rmtree(folder, ignore_errors=True)


def read_trained_model(folder: Path) -> tuple[Manifest, TrainedModel]:
    """The manifest of one checkpoint and what it says about its model."""
    manifest = read_manifest(folder / _MANIFEST, "checkpoint")
    content = manifest.content
    return manifest, TrainedModel(
        config=ModelConfig(**content["config"]),
        valid_vocab=content["valid_vocab"],
        tokenizer_fingerprint=content["tokenizer_fingerprint"],
        iteration=content["iteration"],
        consumed_samples=content["consumed_samples"],
    )


def load_state(folder: Path, state: dict[str, Any], *, topology: Topology) -> dict[str, Any]:
    """Fill `state` (this layout's sharded state dict) from a checkpoint verified beforehand."""
    verify_checkpoint(folder, topology=topology)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder))
    except (CheckpointingException, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not fit this model: {error}") from error
    return loaded


def load_weights(folder: Path, model: ModelChunks, *, topology: Topology) -> None:
    """Weights only, into a model of any layout (before it is wrapped)."""
    verify_checkpoint(folder, topology=topology)
    fill_from(model, GlobalTensors(folder))


def verify_checkpoint(folder: Path, *, topology: Topology | None = None) -> None:
    """Compare every file with the manifest; the ranks share the work and agree on the answer."""
    files: Mapping[str, Mapping[str, Any]] = read_manifest(
        folder / _MANIFEST, "checkpoint"
    ).content["files"]

    def check(name: str) -> str:
        return file_problem(folder / name, files[name])

    names = sorted(files)
    found = topology.share(names, check) if topology else [check(name) for name in names]
    if problem := next(filter(None, found), ""):
        raise CheckpointError(
            f"{problem}; nothing was loaded. Older checkpoints: "
            f"{', '.join(_others(folder)) or 'none'} (write the iteration into {LATEST})"
        )


def refuse_foreign_folder(save: Path, verb: str) -> None:
    """SAVE may be new, empty, or what an earlier run of the same verb left; nothing else."""
    if save.exists() and not save.is_dir():
        raise ConfigError(f"--save {save} is a file, not a folder")
    if not save.is_dir() or not any(path.name != LOCK for path in save.iterdir()):
        return
    if not (save / "run.json").exists():
        raise ConfigError(
            f"--save {save} is not empty and holds no run (no run.json): choose another folder"
        )
    made_by = read_json(save / "run.json").get("verb")
    if made_by != verb:
        raise ConfigError(
            f"--save {save} was made by `{made_by}`, not by `{verb}`: choose another folder"
        )


def start_over(save: Path) -> None:
    """Remove what an earlier run left in SAVE, and nothing else; what marks it complete first."""
    (save / LATEST).unlink(missing_ok=True)
    for folder in [*save.glob("iter_*"), *save.glob(".iter_*.tmp"), save / "tokenizer"]:
        shutil.rmtree(folder, ignore_errors=True)
    (save / "metrics.jsonl").unlink(missing_ok=True)


def _others(folder: Path) -> list[str]:
    others = folder.parent.glob("iter_*/" + _MANIFEST)
    return sorted(path.parent.name for path in others if path.parent != folder)


def _hash_all(folder: Path, topology: Topology) -> dict[str, dict[str, Any]]:
    """Size and hash of every file, each made durable; every rank does its share."""
    names = topology.from_rank0(lambda: sorted(path.name for path in folder.iterdir()))

    def describe(name: str) -> dict[str, Any]:
        path = folder / name
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return {"size": path.stat().st_size, "hash": hash_file(path)}

    return dict(zip(names, topology.share(names, describe), strict=True))
