"""--save: whose it is, where the run in it goes on, and whether there is room for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_miniplm.core.config import write_run
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.staging import exclusive
from megatron_miniplm.models.checkpoint import (
    LOCK,
    read_trained_model,
    refuse_foreign_folder,
    remove_unfinished,
    start_over,
)
from megatron_miniplm.training.resume import (
    Parents,
    ThisRun,
    can_continue,
    refuse_another_run,
    resume_point,
)
from megatron_miniplm.training.run_config import RunConfig


def find_start(config: RunConfig, now: ThisRun) -> Path | None:
    """The checkpoint to continue from; None to begin. Refuses what belongs to another run.

    --overwrite replaces a run that is finished, its stores as well, or has other settings; an
    unfinished run of these very settings continues all the same, so that a requeued job keeps its
    progress.
    """
    save = Path(config.save)
    refuse_foreign_folder(save, "pretrain")
    folder = _resume_point(config)
    if folder is None:
        return None
    if config.overwrite:
        _, found = read_trained_model(folder)
        left = config.training.updates_left(found.iteration, found.consumed_samples)
        finished = not left and not config.capture.awaits_assembly(found.iteration)
        if finished or not can_continue(folder, now):
            return None
    refuse_another_run(folder, now)
    return folder


def _resume_point(config: RunConfig) -> Path | None:
    # With --load, --ckpt-step speaks of what is loaded.
    return resume_point(Path(config.save), None if config.load else config.ckpt_step)


def check_place(config: RunConfig, checkpoint: int) -> None:
    """Refuse a folder that cannot be written, is another job's, or has no room for a checkpoint.

    Whose GPUs are elsewhere has perhaps its disk there, too: then the room is only warned about.
    """
    save = Path(config.save)
    there = next(path for path in (save, *save.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--save {save}: nothing can be written into {there}")
    free = shutil.disk_usage(there).free
    if free < checkpoint:
        short = (
            f"--save {save}: a checkpoint of this model takes {checkpoint / 1e9:.2f} GB, but "
            f"{free / 1e9:.2f} GB are free there: make room, or save elsewhere"
        )
        if config.rehearsal.dry_run_world_size is None:
            raise ConfigError(short)
        get_logger().warning("%s", short)
    if (save / LOCK).exists():
        with exclusive(save / LOCK, wait=False):
            pass


@contextmanager
def own_folder(config: RunConfig, resume_from: Path | None) -> Iterator[None]:
    """Hold --save for this job alone; refuses if another job holds it, or came in between."""
    save = Path(config.save)
    save.mkdir(parents=True, exist_ok=True)
    with exclusive(save / LOCK, wait=False):
        found = _resume_point(config)
        if found != resume_from and not (config.overwrite and resume_from is None):
            raise ConfigError(f"another job wrote to {save} meanwhile ({found}): start again")
        remove_unfinished(save)
        yield


def begin(config: RunConfig, save: Path, corpus: Corpus, sources: Parents) -> None:
    """Clear --save of an earlier run and say what this one is."""
    fingerprints = {role: fingerprint for role, (fingerprint, _) in sources.items()}
    write_run(save / "run.json", "pretrain", config, **fingerprints)
    start_over(save)
    corpus.tokenizer().save(save / "tokenizer")
