"""A corpus that a model continues: which part of an instance is the prompt, and the windows done.

Row i of the new corpus begins as row i of its source does, in the same domain. While it is made,
``.NAME.generated`` beside PREFIX holds the identity of the job and a file for each finished window
of rows, so that any number of processes fill it and any of them may be killed. A window file is
int32 lengths[n], int32 tokens[sum], and their 16-byte xxh3 digest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.core.manifest import Parent, atomic_file, read_json, read_manifest
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.staging import with_suffix, writing
from megatron_miniplm.data.writer import CorpusWriter

WINDOW = 512
_DIGEST_BYTES = 16

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
    """Fills windows, by several processes if there are, and makes a corpus of them.

    `identity` is what decides the tokens (JSON-ready); windows of another identity are refused, or
    with `overwrite` removed. With several processes, one makes its writer before the others do.
    """

    window = WINDOW

    def __init__(
        self,
        prefix: Path,
        *,
        source: Corpus,
        prompts: np.ndarray,
        identity: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        self.prefix, self.source, self.prompts = Path(prefix), source, prompts
        self.overwrite = overwrite
        self._identity = json.loads(
            json.dumps({"source": source.fingerprint, "window": self.window, **identity})
        )
        self._folder = self.prefix.with_name(f".{self.prefix.name}.generated")
        self.finished = self._is_finished()
        if not self.finished:
            self._join()

    def todo(self) -> list[int]:
        """Windows not yet written."""
        if self.finished:
            return []
        count = -(-len(self.source) // self.window)
        return [number for number in range(count) if not self._path(number).exists()]

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
        with writing(self.prefix), atomic_file(self._path(number)) as file:
            file.write(data + xxhash.xxh3_128(data).digest())

    def finish(self, *, parents: Mapping[str, Parent], instances_per_shard: int) -> Path:
        """Make the corpus of the windows, all of which are there; returns its manifest's path."""
        if self.finished:
            shutil.rmtree(self._folder, ignore_errors=True)
            return with_suffix(self.prefix, ".json")
        counts = dict.fromkeys(("instances", "prompt_tokens", "generated_tokens"), 0)
        counts |= dict.fromkeys(("ended_early", "short_instances"), 0)
        with (
            writing(self.prefix),
            CorpusWriter(
                self.prefix,
                tokenizer=self.source.tokenizer(),
                seq_length=self.source.seq_length,
                config=self._identity,
                parents=parents,
                instances_per_shard=instances_per_shard,
                overwrite=self.overwrite,
            ) as writer,
        ):
            longest = int(self.prompts.max())
            for number in range(-(-len(self.source) // self.window)):
                rows, (lengths, tokens) = self.rows(number), self._read(number)
                writer.add(tokens, lengths, self.source.domains[rows])
                counts["instances"] += len(rows)
                counts["prompt_tokens"] += int(self.prompts[rows].sum())
                counts["generated_tokens"] += int((lengths - self.prompts[rows]).sum())
                counts["ended_early"] += int((lengths < self.source.lengths[rows]).sum())
                counts["short_instances"] += int((self.prompts[rows] < longest).sum())
            manifest = writer.finish(self.source.domain_names, counts, prompt_lengths=self.prompts)
        shutil.rmtree(self._folder, ignore_errors=True)
        return manifest

    def _is_finished(self) -> bool:
        """Whether the artifact is there; refuses one of another identity."""
        path = with_suffix(self.prefix, ".json")
        if self.overwrite or not path.exists():
            return False
        if read_manifest(path).config != self._identity:
            raise ConfigError(
                f"{self.prefix} is finished already, by another command ({path} exists): choose "
                "another prefix, or pass --overwrite to replace it"
            )
        return True

    def _join(self) -> None:
        """Start the folder of windows, or check that the one there is of the same job."""
        with writing(self.prefix):
            path = self._folder / "identity.json"
            if self.overwrite and path.exists() and read_json(path) != self._identity:
                shutil.rmtree(self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)
            # Linking is atomic and fails where the name exists: of several starters, one writes it.
            draft = self._folder / f".identity.{os.uname().nodename}.{os.getpid()}"
            draft.write_text(json.dumps(self._identity, indent=1))
            try:
                os.link(draft, path)
            except FileExistsError:
                self._refuse_other(read_json(path))
            finally:
                draft.unlink()

    def _refuse_other(self, found: Mapping[str, Any]) -> None:
        differing = [
            f"{name} is {found.get(name)!r} there and {mine!r} here"
            for name, mine in self._identity.items()
            if found.get(name) != mine
        ]
        if differing:
            raise LineageError(
                f"{self._folder} is being filled by another job: {'; '.join(differing)}. Choose "
                "another --output-prefix, or pass --overwrite"
            )

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.window"

    def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(lengths, tokens) of a window; removes a file that is corrupt."""
        path, count = self._path(number), len(self.rows(number))
        raw = path.read_bytes()
        data, digest = raw[:-_DIGEST_BYTES], raw[-_DIGEST_BYTES:]
        if len(data) < 4 * count or xxhash.xxh3_128(data).digest() != digest:
            path.unlink()
            raise DataError(
                f"{path} is corrupt ({len(raw)} bytes, wrong checksum) and was removed: run the "
                "same `generate` command again to fill it"
            )
        return np.frombuffer(data, "<i4", count), np.frombuffer(data, "<i4", -1, 4 * count)
