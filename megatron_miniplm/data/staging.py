"""How the files of one artifact appear at PREFIX together, or not at all.

Files are made in a hidden folder ``.NAME.partial`` beside PREFIX and moved to their names when
all are complete; the manifest is written last. A killed process leaves at most that folder, which
the next run with the same prefix clears. Should it be killed between the moves, the folder's list
of moved names tells the next run which files are its own litter and not somebody's data.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.manifest import Manifest, fsync_directory, read_manifest

_MOVES = "moves.json"
_LOCK = "lock"
_COLUMNS = (".ids.npy", ".domain.npy", ".prompt_len.npy", ".tokenizer")


def with_suffix(prefix: Path, suffix: str) -> Path:
    """`prefix` and `suffix` joined; a prefix may hold dots (``data/pile.ref``)."""
    return prefix.with_name(prefix.name + suffix)


@contextmanager
def writing(prefix: Path) -> Iterator[None]:
    """Name the artifact where the disk refuses: it is full, read-only, over quota, broken."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{prefix} could not be written: {error}") from error


@contextmanager
def exclusive(path: Path, *, wait: bool, guards: Path | None = None) -> Iterator[None]:
    """Hold the lock file `path`; without `wait`, refuse when another process holds it.

    `guards` is what the lock is for, by default the lock's folder. A lock dies with its process.
    File systems without locks are taken at their word.
    """
    with path.open("ab") as file:
        try:
            _lock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ConfigError(
                f"another process is writing {guards or path.parent}: wait for it, or choose "
                f"another name"
            ) from None
        yield


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Hold the lock file `path` together with others who share it, and with no `exclusive` one."""
    with path.open("ab") as file:
        _lock(file, fcntl.LOCK_SH)
        yield


def _lock(file: BinaryIO, operation: int) -> None:
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP):
            raise


class Staging:
    """Context manager: make files with `file`, then `commit`; anything else leaves no trace."""

    def __init__(self, prefix: Path, *, kind: str, overwrite: bool = False) -> None:
        self.prefix, self.kind, self.overwrite = Path(prefix), kind, overwrite
        if not self.prefix.name:
            raise ConfigError(f"{str(prefix)!r} is not a prefix: give FOLDER/NAME")
        self.folder = with_suffix(self.prefix.with_name("." + self.prefix.name), ".partial")
        self.manifest_path = with_suffix(self.prefix, ".json")

    def __enter__(self) -> Staging:
        self._refuse_finished()
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(exclusive(self.folder / _LOCK, wait=False))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self._clear_litter()
            if not self.overwrite:
                self._refuse_foreign(_shard_files(self.prefix))
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def sweep(self) -> None:
        """Remove what a killed run left beside a finished artifact; not what a living one makes."""
        if self.folder.is_dir():
            with suppress(ConfigError), exclusive(self.folder / _LOCK, wait=False):
                shutil.rmtree(self.folder, ignore_errors=True)

    def file(self, suffix: str) -> Path:
        """Where to make the file that will be PREFIX + `suffix`."""
        return self.folder / (self.prefix.name + suffix)

    def commit(self, manifest: Manifest) -> Path:
        """Move every made file to its name, then write the manifest; returns its path."""
        made = sorted(path for path in self.folder.iterdir() if path.name not in (_LOCK, _MOVES))
        targets = [self.prefix.with_name(path.name) for path in made]
        old = set(targets)
        if self.overwrite:
            old |= {*_shard_files(self.prefix), *_columns(self.prefix)}
        else:
            self._refuse_foreign(targets)
        for path in made:
            sync(path)
        moves = self.folder / _MOVES
        moves.write_text(json.dumps([target.name for target in targets]))
        sync(moves)
        fsync_directory(self.folder)
        # From here until the manifest is there, PREFIX holds no artifact.
        self.manifest_path.unlink(missing_ok=True)
        fsync_directory(self.prefix.parent)
        for path in old:
            _remove(path)
            remove_index_cache(path)
        for path, target in zip(made, targets, strict=True):
            path.rename(target)
        fsync_directory(self.prefix.parent)
        manifest.write(self.manifest_path)
        return self.manifest_path

    def _refuse_finished(self) -> None:
        if not self.manifest_path.exists():
            return
        if not self.overwrite:
            raise ConfigError(
                f"{self.prefix} is finished already ({self.manifest_path} exists): choose another "
                f"prefix, or pass --overwrite to replace it"
            )
        found = read_manifest(self.manifest_path).kind
        if found != self.kind:
            raise ConfigError(
                f"--overwrite would replace a {found} by a {self.kind} at {self.prefix}: remove "
                f"it by hand if that is meant, or choose another prefix"
            )

    def _clear_litter(self) -> None:
        """Remove what a killed run left; its moved files only where no artifact claims them."""
        moves = self.folder / _MOVES
        if moves.exists() and not self.manifest_path.exists():
            try:
                names = json.loads(moves.read_text())
            except ValueError:
                names = []  # the kill hit before the list was complete: nothing had moved
            for name in names:
                if name.startswith(self.prefix.name):
                    _remove(self.prefix.with_name(name))
        drafts = f".{self.manifest_path.name}.tmp"
        for path in [*self.folder.iterdir(), *self.prefix.parent.iterdir()]:
            ours = path.parent == self.folder and path.name != _LOCK
            if ours or path.name.startswith(drafts):
                _remove(path)

    def _refuse_foreign(self, paths: Iterable[Path]) -> None:
        present = sorted(str(path) for path in paths if path.is_symlink() or path.exists())
        if present:
            raise DataError(
                f"{present[0]} exists, but no artifact of ours is at {self.prefix}: choose another "
                f"prefix, or pass --overwrite to replace it"
            )


def _shard_files(prefix: Path) -> list[Path]:
    """Files beside PREFIX that are named like its shards."""
    pattern = re.compile(re.escape(prefix.name) + r"-\d{5}-of-\d{5}\.(bin|idx)")
    if not prefix.parent.is_dir():
        return []
    return [path for path in prefix.parent.iterdir() if pattern.fullmatch(path.name)]


def _columns(prefix: Path) -> list[Path]:
    return [with_suffix(prefix, suffix) for suffix in _COLUMNS]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_index_cache(shard_file: Path) -> None:
    """Remove the index cache that Megatron's GPTDataset keeps for this shard.

    It lies in SHARD/cache and is keyed by path and settings, never by content (megatron-core
    gpt_dataset.py, unique_description), so a rewritten shard would be read by the old indices.
    """
    if shard_file.suffix != ".idx":
        return
    folder = shard_file.with_suffix("")
    if (folder / "cache").is_dir():
        shutil.rmtree(folder / "cache")
        if not any(folder.iterdir()):
            folder.rmdir()


def sync(path: Path) -> None:
    """Make a file, or a folder and all in it, durable; a link needs only its folder synced."""
    if path.is_symlink():
        return
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
