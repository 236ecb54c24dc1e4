"""The files of a checkpoint: planned together, then written by every rank alone, in a thread.

megatron.core's ``torch_dist`` format, which its `load` reads: ``__R_0.distcp`` of every rank R,
``.metadata`` (which part of which tensor is where), ``common.pt`` (what is no tensor) and
``metadata.json``. Its `save` is not used: 0.16.1 forks writers and starts a process to collect
their results, which outlive a killed rank; both versions write some files on one rank in the middle
of a collective, so that the others wait for a rank whose disk is full. A thread ends with its
process, and here nothing is written in a collective.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_miniplm.core.errors import CheckpointError
from megatron_miniplm.core.manifest import hash_file
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import Topology

T = TypeVar("T")
Facts = dict[str, dict[str, Any]]
"""File name -> its size and hash."""


class _Planner(MCoreSavePlanner):
    """Knows the data of every item to write, and can keep it as it is now."""

    def take(self, plan: SavePlan, *, copy: bool) -> None:
        """Resolve all data of `plan`; `copy`: to host memory, so that training may go on."""
        self.data = {item.index: super(_Planner, self).resolve_data(item) for item in plan.items}
        for item in plan.items if copy else ():
            if item.type != WriteItemType.BYTE_IO:
                self.data[item.index] = self.data[item.index].detach().to("cpu", copy=True)

    def resolve_data(self, write_item: WriteItem) -> Any:
        """What is to be written, handed out once: a copy is gone when it is on disk."""
        data = self.data.pop(write_item.index)
        # Not left to torch's writer, which copies on a stream of its own.
        return data.detach().cpu() if isinstance(data, torch.Tensor) else data


class ShardFiles:
    """One rank's part of a checkpoint that is being written into `folder`."""

    def __init__(
        self, folder: Path, state: Mapping[str, Any], *, topology: Topology, copy: bool
    ) -> None:
        """Plan (a collective) and start to write; without `copy`, `state` must stay as it is."""
        self.folder, self.topology = folder, topology
        sharded, common = save_preprocess(dict(state), validate_access_integrity=False)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded, keep_only_main_replica=True
        )
        self.planner = _Planner(flatten_state_dict=False)
        self.planner.set_up_planner(
            mcore_to_pyt_state_dict(by_key, False), is_coordinator=topology.rank == 0
        )
        mine = self.planner.create_local_plan()
        self.metadata = self._agree(mine)
        self.plan = replace(mine, storage_data=_StoragePrefix(f"__{topology.rank}_"))
        self.planner.take(self.plan, copy=copy)
        self.common = io.BytesIO()
        torch.save(common, self.common)
        # One thread of torch's: what fails in a second one is lost (2.8 to 2.13).
        self.writer = FileSystemWriter(folder, thread_count=1)
        self.results: list[WriteResult] = []
        self.facts: Facts = {}
        self.error = ""
        self.thread = threading.Thread(
            target=self._write, args=(platform.device(),), name="checkpoint", daemon=True
        )
        self.thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether this rank's files are written, or failed, after at most so many seconds."""
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def finish(self) -> Facts:
        """Say what is where; the facts of all files, on rank 0 (a collective).

        Raises a `CheckpointError` on every rank if any could not write.
        """
        for rank, error in enumerate(self.topology.gather(self.error)):
            if error:
                raise CheckpointError(f"rank {rank}: {error}")
        parts = self._to_rank0((self.results, self.facts))
        facts = {name: fact for _, own in parts for name, fact in own.items()}

        def describe() -> Facts:
            try:
                return self._describe([results for results, _ in parts])
            except OSError as error:
                raise CheckpointError(f"rank 0: {error}") from error

        return facts | self.topology.from_rank0(describe)

    def _to_rank0(self, mine: T) -> list[T]:
        """What every rank has, on rank 0; nothing elsewhere."""
        every: list[Any] = [None] * self.topology.world_size if self.topology.rank == 0 else []
        dist.gather_object(mine, every or None, dst=0)
        return every

    def _agree(self, mine: SavePlan) -> Metadata | None:
        """What all ranks write, on rank 0; refuses gaps and overlaps in a tensor."""
        plans = self._to_rank0(mine)
        made: list[Metadata] = []

        def plan() -> None:
            try:
                made.append(self.planner.create_global_plan(plans)[1])
            except ValueError as error:
                raise CheckpointError(f"the ranks do not hold a whole model: {error}") from error

        self.topology.from_rank0(plan)
        return made[0] if made else None

    def _write(self, device: torch.device) -> None:
        platform.join(device)  # else torch's writer would hold memory of GPU 0 in every rank
        own = [f"__{self.topology.rank}_0.distcp"] if self.plan.items else []
        try:
            if own:
                self.results = self.writer.write_data(self.plan, self.planner).wait()
            if self.topology.rank == 0:
                own.append("common.pt")
                _write_durably(self.folder / "common.pt", self.common.getbuffer())
            self.facts = _facts(self.folder, own)
        except Exception as error:  # noqa: BLE001 - said on every rank
            self.error = _reason(error)
            for name in own:  # what a full disk needs most
                (self.folder / name).unlink(missing_ok=True)

    def _describe(self, results: list[list[WriteResult]]) -> Facts:
        assert self.metadata is not None, "only rank 0 describes the whole"
        self.writer.finish(self.metadata, results)
        text = json.dumps(asdict(CheckpointingConfig("torch_dist", 1)))
        _write_durably(self.folder / "metadata.json", text.encode())
        return _facts(self.folder, [".metadata", "metadata.json"])


def _reason(error: BaseException) -> str:
    """What went wrong first: torch's writer hides a full disk behind an error of its own."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    first = next((one for one in chain if isinstance(one, OSError)), error)
    return f"{type(first).__name__}: {first}"


def _write_durably(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _facts(folder: Path, names: list[str]) -> Facts:
    return {
        name: {"size": (folder / name).stat().st_size, "hash": hash_file(folder / name)}
        for name in names
    }
