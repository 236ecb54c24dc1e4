"""A corpus that a model continues: which part of an instance is the prompt, and the windows done.

Row i of the new corpus begins as row i of its source does, in the same domain. While it is made,
``.NAME.generated`` beside PREFIX holds the identity of the job and a file for each finished window
of rows (`data.journal`): int32 lengths[n], int32 tokens[sum].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.core.manifest import Parent, read_manifest
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.journal import Journal, differences
from megatron_miniplm.data.staging import exclusive, shared, with_suffix, writing
from megatron_miniplm.data.writer import CorpusWriter

WINDOW = 512

ShortInstances = Literal["fraction", "copy"]


def prompt_lengths(lengths: np.ndarray, prompt_length: int, short: ShortInstances) -> np.ndarray:
    """Tokens of each instance (int[N]) that are its prompt, int64[N], at least 1.

    Of an instance that is not longer than a prompt: three quarters ("fraction"), or all of it
    ("copy": it stays as it is).
    """
    lengths = lengths.astype(np.int64)
    rest = np.maximum(lengths * 3 // 4, 1) if short == "fraction" else lengths
    return np.where(lengths > prompt_length, prompt_length, rest)


class GenerationWriter:
    """Fills windows, by several processes and jobs if there are, and makes a corpus of them.

    `identity` is what decides the tokens, beside the prompts (JSON-ready); windows of another
    identity are refused, or with `overwrite` removed. With several processes, one makes its writer
    before the others do; only one job may overwrite.
    """

    window = WINDOW

    def __init__(
        self,
        prefix: Path,
        *,
        source: Corpus,
        prompt_length: int,
        short_instances: ShortInstances,
        identity: Mapping[str, Any],
        parents: Mapping[str, Parent],
        instances_per_shard: int,
        overwrite: bool = False,
    ) -> None:
        self.prefix, self.source, self.prompt_length = Path(prefix), source, prompt_length
        self.prompts = prompt_lengths(source.lengths, prompt_length, short_instances)
        self.overwrite, self._parents = overwrite, parents
        self._instances_per_shard = instances_per_shard
        made_by = {"prompt_length": prompt_length, "short_instances": short_instances, **identity}
        self._identity = json.loads(
            json.dumps({"source": source.fingerprint, "window": self.window, **made_by})
        )
        self._journal = Journal(self.prefix.with_name(f".{self.prefix.name}.generated"))
        self._made = False
        if not self.finished:
            self._join()

    @property
    def path(self) -> Path:
        """The manifest of the corpus."""
        return with_suffix(self.prefix, ".json")

    @property
    def finished(self) -> bool:
        """Whether the corpus is there, by this job or another; refuses one of another identity."""
        if self._made or self.overwrite or not self.path.exists():
            return self._made
        if read_manifest(self.path).config != self._identity:
            raise ConfigError(
                f"{self.prefix} is finished already, by another command ({self.path} exists): "
                "choose another prefix, or pass --overwrite to replace it"
            )
        return True

    def todo(self, shard: tuple[int, int] = (0, 1)) -> list[int]:
        """Windows not yet written, of those that fall to job i of n (``shard = (i, n)``)."""
        i, n = shard
        if self.finished:
            return []
        count = -(-len(self.source) // self.window)
        written = set(self._journal.names())
        return [number for number in range(i, count, n) if _name(number) not in written]

    def rows(self, number: int) -> np.ndarray:
        """int64[n], the rows of one window."""
        start = number * self.window
        return np.arange(start, min(start + self.window, len(self.source)))

    def write_window(self, number: int, instances: Sequence[np.ndarray]) -> None:
        """Record the instances of a window, in the order of its rows, durably."""
        rows = self.rows(number)
        lengths = np.array([len(tokens) for tokens in instances], "<i4")
        if len(lengths) != len(rows) or (lengths > self.source.lengths[rows]).any():
            raise DataError(
                f"window {number} of {self.prefix} has {len(rows)} rows, but got {len(lengths)} "
                f"instances of up to {lengths.max(initial=0)} tokens"
            )
        data = lengths.tobytes() + np.concatenate(instances).astype("<i4").tobytes()
        with writing(self.prefix):
            try:
                with shared(self._lock):
                    if self.finished:
                        self._journal.remove()
                    else:
                        self._journal.write(_name(number), data)
            except FileNotFoundError:
                # Another job made the corpus before this began, and the journal is gone.
                if not self.finished:
                    raise

    def finish(self) -> bool:
        """Make the corpus if every window is there; False while other jobs still run."""
        try:
            if self.todo():
                return False
            if not self.finished:
                with exclusive(self._lock, wait=True):
                    if not self.finished:
                        self._make()
        except FileNotFoundError:
            # Another job finished between two of these lines and took the journal away.
            if not self.finished:
                raise
        self._journal.remove()
        return True

    def _make(self) -> None:
        counts = dict.fromkeys(("instances", "prompt_tokens", "generated_tokens"), 0)
        counts |= dict.fromkeys(("ended_early", "short_instances"), 0)
        with (
            writing(self.prefix),
            CorpusWriter(
                self.prefix,
                tokenizer=self.source.tokenizer(),
                seq_length=self.source.seq_length,
                config=self._identity,
                parents=self._parents,
                instances_per_shard=self._instances_per_shard,
                overwrite=self.overwrite,
            ) as writer,
        ):
            for number in range(-(-len(self.source) // self.window)):
                rows, (lengths, tokens) = self.rows(number), self._read(number)
                writer.add(tokens, lengths, self.source.domains[rows])
                counts["instances"] += len(rows)
                counts["prompt_tokens"] += int(self.prompts[rows].sum())
                counts["generated_tokens"] += int((lengths - self.prompts[rows]).sum())
                counts["ended_early"] += int((lengths < self.source.lengths[rows]).sum())
                short = self.source.lengths[rows] <= self.prompt_length
                counts["short_instances"] += int(short.sum())
            writer.finish(self.source.domain_names, counts, prompt_lengths=self.prompts)
        self._made = True

    @property
    def _lock(self) -> Path:
        """Held alone by who makes the corpus, and together by those who write windows."""
        return self._journal.folder / "lock"

    def _join(self) -> None:
        """Start the folder of windows, or check that the one there is of the same job."""
        with writing(self.prefix):
            found = self._journal.join(self._identity)
            if found != self._identity and self.overwrite:
                self._journal.remove()
                found = self._journal.join(self._identity)
        if found != self._identity:
            raise LineageError(
                f"{self._journal.folder} is being filled by another job: "
                f"{differences(found, self._identity)}. Choose another --output-prefix, or pass "
                "--overwrite"
            )

    def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(lengths, tokens) of a window."""
        data, count = self._journal.read(_name(number)), len(self.rows(number))
        return np.frombuffer(data, "<i4", count), np.frombuffer(data, "<i4", -1, 4 * count)


def _name(number: int) -> str:
    return f"{number:08d}"
