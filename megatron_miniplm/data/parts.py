"""A corpus made in parts, by one process or many machines, and joined without copying a token.

Part p of N takes the input files p, p + N, p + 2 N, ... of the list (globs sorted by name), packed
with buffers of its own, so a corpus depends on its input and N, never on who made which part: N
ranks and one process that is told ``--num-parts N`` write the same bytes. The shards of part 0
come first; domains are numbered in the order in which the parts, one after another, name them.

While it is made, a part is a folder in ``.NAME.parts`` beside PREFIX, on a file system that all
ranks share. It is complete when its record, written last, is there, and is then kept: a run that
was killed makes the other parts only. Whoever completes the last part joins them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import read_json, write_json
from megatron_miniplm.data.preprocess import Preprocessed, add_statistics, check_domain_count
from megatron_miniplm.data.shards import Drafts
from megatron_miniplm.data.sources import STDIN, said
from megatron_miniplm.data.staging import exclusive, sync

_RECORD = "part.json"
_DOMAINS = "domain.npy"


class Made(NamedTuple):
    """One part, or all of them joined."""

    drafts: Drafts
    result: Preprocessed


def this_rank(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Number of this process and how many there are, under torchrun or Slurm's srun; else 0, 1.

    In a batch script, outside a step, Slurm counts tasks that it did not start: one process.
    """
    names = [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")]
    for rank, size in names:
        if rank in environment and size in environment:
            return int(environment[rank]), int(environment[size])
    return 0, 1


def deal(paths: Sequence[str], count: int) -> list[list[str]]:
    """The files of each of `count` parts; refuses standard input and more parts than files."""
    if STDIN in paths:
        raise ConfigError(f"{said(STDIN)} cannot be dealt to {count} parts: give files")
    if count > len(paths):
        raise ConfigError(
            f"{count} parts (--num-parts, or the number of processes), but {len(paths)} input "
            "files: a file is the smallest piece; split the files, or make fewer parts"
        )
    return [list(paths[number::count]) for number in range(count)]


class PartStore:
    """The parts of one corpus on disk.

    `identity` says what the parts are made of and how (JSON-ready); a part of another identity, or
    one whose input files changed in size or time, is made again.
    """

    def __init__(self, prefix: Path, files: Sequence[Sequence[str]], identity: Any) -> None:
        self.folder = prefix.with_name(f".{prefix.name}.parts")
        self.files, self.identity = files, identity

    def make(self, number: int, build: Callable[[Path], Made]) -> None:
        """Have `build` make one part in the folder it is given, unless that part is complete.

        Refuses a part that another process is making. An exception leaves nothing of the part.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = self._part(number)
        with exclusive(folder.with_suffix(".lock"), wait=False):
            if self._record(number) is not None:
                get_logger().info("part %d of %d is complete", number, len(self.files))
                return
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                self._complete(folder, self._identity(number), build(folder))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    def join(self, commit: Callable[[Made], Path]) -> Path | None:
        """Hand all parts to `commit` and remove them; its answer.

        None, and nothing is done, while a part is missing or when another process joined them.
        """
        try:
            with exclusive(self.folder / "join.lock", wait=True):
                records = [self._record(number) for number in range(len(self.files))]
                found = [record for record in records if record is not None]
                if len(found) < len(records):
                    return None
                committed = commit(self._joined(found))
                shutil.rmtree(self.folder, ignore_errors=True)
                return committed
        except FileNotFoundError:
            if self.folder.exists():
                raise
            return None

    def _joined(self, records: Sequence[Mapping[str, Any]]) -> Made:
        names: dict[str, int] = {}
        shards: list[tuple[Path, dict[str, Any]]] = []
        domains = []
        for number, record in enumerate(records):
            folder = self._part(number)
            own = [names.setdefault(name, len(names)) for name in record["domain_names"]]
            if own:
                check_domain_count(len(names), record["domain_names"][-1])
            domains.append(np.array(own, np.uint16)[np.load(folder / _DOMAINS)])
            shards += [(folder / shard["draft"], shard["facts"]) for shard in record["shards"]]
        statistics = add_statistics([record["statistics"] for record in records])
        return Made(Drafts(shards, np.concatenate(domains)), Preprocessed(list(names), statistics))

    def _complete(self, folder: Path, identity: Any, made: Made) -> None:
        """Make a part durable, its record last."""
        np.save(folder / _DOMAINS, made.drafts.domains)
        sync(folder)
        record = {
            "identity": identity,
            "domain_names": made.result.domain_names,
            "statistics": made.result.statistics,
            "shards": [{"draft": path.name, "facts": facts} for path, facts in made.drafts.shards],
        }
        write_json(folder / _RECORD, record)

    def _record(self, number: int) -> dict[str, Any] | None:
        """What a complete part says of itself; None if it is not there or of something else."""
        folder = self._part(number)
        if not (folder / _RECORD).exists():
            return None
        record = read_json(folder / _RECORD)
        if record["identity"] != self._identity(number):
            return None
        for shard in record["shards"]:
            data = folder / f"{shard['draft']}.bin"
            index = folder / f"{shard['draft']}.idx"
            if not index.exists() or not data.exists():
                return None
            if data.stat().st_size != shard["facts"]["bin_bytes"]:
                return None
        return record

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}-of-{len(self.files):05d}"

    def _identity(self, number: int) -> Any:
        """`identity` and the part's files, as JSON gives them back."""
        stats = {path: os.stat(path) for path in self.files[number]}
        files = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()]
        return json.loads(json.dumps([self.identity, files], default=str))
