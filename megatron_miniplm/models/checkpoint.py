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

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from megatron_miniplm.core.errors import CheckpointError, ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import (
    Manifest,
    Parent,
    atomic_file,
    file_problem,
    fsync_directory,
    hash_parts,
    read_json,
    read_manifest,
)
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.global_tensors import GlobalTensors, fill_from
from megatron_miniplm.models.shard_files import Facts, ShardFiles
from megatron_miniplm.models.value_head import TargetScale
from megatron_miniplm.parallel.topology import Topology

T = TypeVar("T")
LATEST = "latest_checkpointed_iteration.txt"
LOCK = "lock"
_MANIFEST = "manifest.json"
_PATIENCE_S = 20.0


class SaveFailedError(CheckpointError):
    """A checkpoint could not be written; the earlier ones are as they were."""


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
    targets: TargetScale | None = None
    """What its head for a number of each instance was trained on; None: it has no such head."""


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
    return complete_checkpoint(save, int(text))


def complete_checkpoint(save: Path, iteration: int) -> Path:
    """The checkpoint of that iteration; refuses one that is not there."""
    folder = iteration_folder(save, iteration)
    if not (folder / _MANIFEST).exists():
        raise CheckpointError(
            f"{folder} has no complete checkpoint; there are {', '.join(_others(folder)) or 'none'}"
            f": go on from one of these with --ckpt-step (or write its number into {LATEST})"
        )
    return folder


class CheckpointWriter:
    """Writes the checkpoints of one folder, one at a time; atomic and durable.

    `start` and `finish` are collectives. Between them, files are written by a thread of every rank
    and there is no checkpoint yet: a kill loses only that one. Of a save that fails, nothing stays.
    """

    def __init__(self, save: Path, topology: Topology) -> None:
        self.save, self.topology = Path(save), topology
        self.pending: _Pending | None = None

    def start(
        self,
        trained: TrainedModel,
        state: Mapping[str, Any],
        *,
        parents: Mapping[str, tuple[str, Path]],
        config: Mapping[str, Any],
        copy: bool,
    ) -> None:
        """Begin to write every rank's `state` (a sharded state dict).

        `parents` gives the (fingerprint, path) of what the model was made from, by role. `copy`:
        what is written is of this moment even if the tensors change; otherwise they must not.
        """
        assert self.pending is None, "finish the last save first"
        folder = iteration_folder(self.save, trained.iteration)
        temporary = folder.with_name(f".{folder.name}.tmp")
        with _said_as_failure(folder):
            self.topology.from_rank0(lambda: _make_empty(temporary))
            files = ShardFiles(temporary, state, topology=self.topology, copy=copy)
        self.pending = _Pending(folder, trained, files, parents, config)

    def finish(self, *, wait: bool) -> Path | None:
        """Make a save a checkpoint once all ranks have written: its folder, None if not yet.

        `wait`: not before they have. Raises `SaveFailedError` on every rank if it is not to be.
        """
        if self.pending is None:
            return None
        files = self.pending.files
        while self.topology.any_rank(not files.wait(_PATIENCE_S if wait else 0.0)):
            if not wait:
                return None
        pending, self.pending = self.pending, None
        try:
            with _said_as_failure(pending.folder):
                facts = files.finish()
                self.topology.from_rank0(lambda: _publish(pending, facts))
        except SaveFailedError:
            if self.topology.rank == 0:
                shutil.rmtree(files.folder, ignore_errors=True)
            raise
        return pending.folder


def save_checkpoint(
    save: Path,
    trained: TrainedModel,
    state: Mapping[str, Any],
    *,
    topology: Topology,
    parents: Mapping[str, tuple[str, Path]],
    config: Mapping[str, Any],
) -> Path:
    """Write one checkpoint and wait for it: see `CheckpointWriter`."""
    writer = CheckpointWriter(save, topology)
    writer.start(trained, state, parents=parents, config=config, copy=False)
    finished = writer.finish(wait=True)
    assert finished is not None, "it waits until it is there"
    return finished


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    folder: Path
    trained: TrainedModel
    files: ShardFiles
    parents: Mapping[str, tuple[str, Path]]
    config: Mapping[str, Any]


@contextmanager
def _said_as_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise SaveFailedError(f"{folder} could not be saved: {error}") from error


def _make_empty(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _publish(pending: _Pending, files: Facts) -> None:
    """The manifest, then the name, then `latest` (rank 0)."""
    folder, manifest_path = pending.folder, pending.folder / _MANIFEST
    manifest = Manifest(
        kind="checkpoint",
        fingerprint=hash_parts(*(f"{name}:{files[name]['hash']}" for name in sorted(files))),
        parents={
            role: Parent.of(print_, path, named_in=manifest_path)
            for role, (print_, path) in pending.parents.items()
        },
        config=pending.config,
        content={
            **asdict(pending.trained), "files": files, "tokenizer": {"path": "../tokenizer"}
        },
    )  # fmt: skip
    try:
        manifest.write(pending.files.folder / _MANIFEST)
        _remove_checkpoint(folder)
        pending.files.folder.replace(folder)
        fsync_directory(folder.parent)
        with atomic_file(folder.parent / LATEST) as file:
            file.write(f"{pending.trained.iteration}\n".encode())
    except OSError as error:
        raise CheckpointError(str(error)) from error


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
        try:
            _remove_checkpoint(folder)
        except OSError as error:  # what was to be saved is saved
            get_logger().error("%s could not be removed, and training goes on: %s", folder, error)


def _remove_checkpoint(folder: Path) -> None:
    (folder / _MANIFEST).unlink(missing_ok=True)  # from here on it does not open
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
        targets=TargetScale(**targets) if (targets := content.get("targets")) else None,
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
    """Compare every file with the manifest; the ranks share the work and agree on the answer.

    The message of what it raises names the newest earlier checkpoint that is intact.
    """
    if not (problem := _problem(folder, topology)):
        return
    for earlier in reversed(_asked_once(lambda: _others(folder), topology)):
        if earlier < folder.name and not _problem(folder.with_name(earlier), topology):
            raise CheckpointError(
                f"{problem}; nothing was loaded. {earlier} is intact: go on from it with "
                f"--ckpt-step {int(earlier.removeprefix('iter_'))}"
            )
    raise CheckpointError(f"{problem}; nothing was loaded, and no earlier checkpoint is intact")


def _asked_once(ask: Callable[[], T], topology: Topology | None) -> T:
    # What the ranks do together follows from it, and a shared file system may show them different
    # folders.
    return topology.from_rank0(ask) if topology else ask()


def _problem(folder: Path, topology: Topology | None) -> str:
    """What is wrong with a checkpoint's files; empty if nothing is."""

    def listed() -> Mapping[str, Mapping[str, Any]]:
        files: Mapping[str, Mapping[str, Any]] = read_manifest(
            folder / _MANIFEST, "checkpoint"
        ).content["files"]
        return files

    files = _asked_once(listed, topology)

    def check(name: str) -> str:
        return file_problem(folder / name, files[name])

    names = sorted(files)
    found = topology.share(names, check) if topology else [check(name) for name in names]
    return next(filter(None, found), "")


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


def remove_unfinished(save: Path) -> None:
    """Remove what killed saves left in SAVE; a running one must not be there."""
    for folder in save.glob(".iter_*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def start_over(save: Path) -> None:
    """Remove what an earlier run left in SAVE, and nothing else; what marks it complete first."""
    (save / LATEST).unlink(missing_ok=True)
    remove_unfinished(save)
    for folder in [*save.glob("iter_*"), save / "tokenizer"]:
        shutil.rmtree(folder, ignore_errors=True)
    (save / "metrics.jsonl").unlink(missing_ok=True)


def _others(folder: Path) -> list[str]:
    others = folder.parent.glob("iter_*/" + _MANIFEST)
    return sorted(path.parent.name for path in others if path.parent != folder)
