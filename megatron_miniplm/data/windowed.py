"""A folder that any number of processes fill part by part, and any of them may be killed.

While incomplete it holds ``journal/`` (`data.journal`), with a note for each finished part: a
window of rows of the corpus, or what has a name of its own. When all are there, one process
assembles the artifact, whose manifest is written last.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from megatron_miniplm.core.errors import ConfigError, LineageError
from megatron_miniplm.core.manifest import NO_PARENTS, Parent, read_manifest
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.journal import Journal, differences
from megatron_miniplm.data.staging import exclusive, shared, writing


class WindowedWriter(ABC):
    """Fills one folder; several processes may fill the same one.

    `config` is what must be equal for that (the model's identity, the precision, ...). `overwrite`
    removes what is there: with several processes, one passes it, before the others start.
    """

    kind: ClassVar[str]
    """Of the artifact, as in its manifest."""
    files: ClassVar[tuple[str, ...]]
    """Names in the folder, beside the manifest, ``run.json`` and the journal."""

    def __init__(
        self,
        path: Path,
        *,
        corpus: Corpus,
        window: int,
        config: Mapping[str, Any],
        parents: Mapping[str, Parent] = NO_PARENTS,
        overwrite: bool = False,
    ) -> None:
        self.path, self.window = Path(path).absolute(), window
        self.num_windows = -(-len(corpus) // window)
        self._corpus, self._config, self._parents = corpus, plain(config), dict(parents)
        self._journal = Journal(self.path / "journal")
        self._refuse_foreign()
        if overwrite:
            self._remove_old()
        with writing(self.path):
            self._join()

    @property
    def finished(self) -> bool:
        """Whether the artifact is complete, by this process or another."""
        return self._manifest_path.exists()

    def rows(self, number: int) -> range:
        """The rows of one window."""
        start = number * self.window
        return range(start, min(start + self.window, len(self._corpus)))

    def todo(self, shard: tuple[int, int] = (0, 1)) -> list[int]:
        """Windows not yet written, of those that fall to job i of n (``shard = (i, n)``)."""
        i, n = shard
        if not 0 <= i < n:
            raise ConfigError(f"--shard {i}/{n}: job i of n needs 0 <= i < n")
        if self.finished:
            return []
        written = set(self._journal.names())
        return [w for w in range(i, self.num_windows, n) if self._window_name(w) not in written]

    def finish(self) -> bool:
        """Assemble the artifact if every window is there; False while other jobs still run."""
        try:
            if self.todo():
                return False
            self._assemble_alone()
        except FileNotFoundError:
            # Another process finished between two of these lines and took the journal away.
            if not self.finished:
                raise
        return True

    @abstractmethod
    def _assemble(self) -> None:
        """Make the artifact of the notes, its manifest last."""

    @property
    def _manifest_path(self) -> Path:
        return self.path / "manifest.json"

    def _note(self, name: str, act: Callable[[], bytes]) -> None:
        """Write a part by `act`, and note what that gives; a part that is there is left as it is.

        Another process may be at the same part (a job that was started again beside the one that it
        replaces): it is waited for. Nobody assembles meanwhile.
        """
        mine = self._journal.folder / f"{name}.lock"
        with writing(self.path):
            try:
                with shared(self._lock), exclusive(mine, wait=True):
                    if self.finished:
                        self._journal.remove()
                        return
                    if not self._journal.path(name).exists():
                        self._journal.write(name, act())
                    mine.unlink(missing_ok=True)
            except FileNotFoundError:
                # The artifact was finished before this began, and the journal is gone.
                if not self.finished:
                    raise

    def _assemble_alone(self) -> None:
        with exclusive(self._lock, wait=True):
            if not self.finished:
                with writing(self.path):
                    self._remove_drafts()
                    self._assemble()
        self._journal.remove()

    @property
    def _lock(self) -> Path:
        """Held alone by who assembles, and together by those who write parts."""
        return self._journal.folder / "lock"

    @staticmethod
    def _window_name(number: int) -> str:
        return f"{number:08d}"

    def _identity(self) -> dict[str, Any]:
        return {
            "corpus": self._corpus.fingerprint,
            "num_instances": len(self._corpus),
            "window": self.window,
            "config": self._config,
        }

    def _join(self) -> None:
        """Start the folder, or check that the one there is of the same job."""
        if self.finished:
            manifest = read_manifest(self._manifest_path, self.kind)
            found = self._identity() | {
                "corpus": manifest.parents["corpus"].fingerprint,
                "config": dict(manifest.config),
            }
            self._refuse_other(found, "finished already")
            return
        self._refuse_other(self._journal.join(self._identity()), "being filled")

    def _refuse_other(self, found: Mapping[str, Any], state: str) -> None:
        mine = self._identity()
        if found == mine:
            return
        raise LineageError(
            f"{self.path} is {state} by another job: {differences(found, mine)}. Choose another "
            f"--output, or pass --overwrite"
        )

    @property
    def _ours(self) -> tuple[str, ...]:
        return ("manifest.json", *self.files, "run.json", "journal")

    def _refuse_foreign(self) -> None:
        present = self.path.iterdir() if self.path.is_dir() else ()
        foreign = [path for path in present if path.name not in self._ours and path.name[0] != "."]
        if foreign:
            raise ConfigError(
                f"{self.path} holds something else than {self.kind} ({foreign[0].name}): choose "
                f"another --output"
            )

    def _remove_drafts(self) -> None:
        """Remove what one that was killed while it assembled had not renamed yet."""
        for name in self._ours:
            for draft in self.path.glob(f".{name}.tmp*"):
                draft.unlink()

    def _remove_old(self) -> None:
        """Remove what an earlier job left, the manifest first."""
        for name in self._ours:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a JSON file."""
    return dict(json.loads(json.dumps(dict(values), default=str)))
