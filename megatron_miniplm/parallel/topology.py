"""Who is where: the process layout (TP, PP, DP), made once and passed around explicitly.

The only importer of ``megatron.core.parallel_state``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from megatron_miniplm.core.errors import ConfigError, MiniPLMError
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.ranks import Ranks

S = TypeVar("S")
T = TypeVar("T")
_PATIENCE_S = 20.0


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """How the processes that torchrun started work together."""

    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication library; auto: nccl on GPUs, gloo on CPUs."""
    distributed_timeout_minutes: int = 10
    """Give up on a collective after this many minutes (a dead rank ends the others)."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(JobConfig):
    """Process layout; data-parallel ranks are what torchrun starts beyond TP x PP."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer (TP)."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are divided over (PP)."""
    sequence_parallel: bool = False
    """Divide activations outside attention and MLP over the TP ranks, along the sequence."""
    deterministic_mode: bool = False
    """On a GPU, take only kernels that give the same bits every time; the CPU's always do."""

    def __post_init__(self) -> None:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError("--sequence-parallel needs --tensor-model-parallel-size above 1")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a job, and how its ranks agree: as long as none is started, one speaks for all."""

    world_size: int
    tp_size: int
    pp_size: int
    dp_size: int
    sequence_parallel: bool

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> Layout:
        """How so many processes are laid out; refuses misfits."""
        tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
        if world_size < 1 or world_size % (tp * pp):
            raise ConfigError(
                f"{world_size} processes cannot hold TP {tp} x PP {pp}: start a multiple of "
                f"{tp * pp} (torchrun --nproc-per-node {tp * pp} ...)"
            )
        return cls(
            world_size=world_size, tp_size=tp, pp_size=pp, dp_size=world_size // (tp * pp),
            sequence_parallel=config.sequence_parallel,
        )  # fmt: skip

    def from_rank0(self, ask: Callable[[], T]) -> T:
        """The answer to `ask`."""
        return ask()

    def share(self, items: Sequence[S], act: Callable[[S], T]) -> list[T]:
        """`act` of every item, in order."""
        return [act(item) for item in items]


@dataclass(frozen=True, kw_only=True)
class Topology(Layout):
    """A process's place in a job that runs, and the groups that it communicates in."""

    rank: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def ranks(self) -> Ranks:
        """All processes of the job, whatever each of them holds."""
        return Ranks(rank=self.rank, size=self.world_size)

    def from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Broadcast `values` of the last pipeline stage to every stage; in place."""
        if self.pp_size > 1:
            source = dist.get_global_rank(self.pp_group, self.pp_size - 1)
            dist.broadcast(values, source, group=self.pp_group)
        return values

    def from_rank0(self, ask: Callable[[], T]) -> T:
        """The answer of rank 0 to `ask`, or the error that it raised there, on every rank.

        What ranks must agree on is asked once: a shared file system may show them different files.
        """
        said: list[Any] = [None, None]
        if self.rank == 0:
            try:
                said[0] = ask()
            except MiniPLMError as error:
                said[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(said, src=0)
        if said[1] is not None:
            raise said[1]
        return cast(T, said[0])

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in rank order (a collective)."""
        return self.ranks.gather(value)

    def share(self, items: Sequence[S], act: Callable[[S], T]) -> list[T]:
        """`act` of every item, in order, each done by one rank (a collective).

        What it raises on one rank is raised on all. It may take longer than a collective's timeout:
        a rank that is done is never kept waiting in one for long.
        """
        if self.world_size == 1:
            return [act(item) for item in items]
        mine = items[self.rank :: self.world_size]
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(lambda: [act(item) for item in mine])
            while self.any_rank(not wait([work], _PATIENCE_S).done):
                pass
        error = work.exception()
        parts = self.gather((error, [] if error else work.result()))
        for raised, _ in parts:
            if raised is not None:
                raise raised
        size = self.world_size
        return [parts[at % size][1][at // size] for at in range(len(items))]

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank of the job says so (a collective)."""
        if self.world_size == 1:
            return flag
        said = torch.tensor([int(flag)], device=platform.device())
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said.item())


def initialize(config: ParallelConfig) -> Topology:
    """Join the job that torchrun started (or a job of one) and lay it out; refuses misfits."""
    platform.activate(deterministic=config.deterministic_mode)
    _join(config)
    try:
        layout = Layout.of(config, dist.get_world_size())
    except ConfigError:
        dist.destroy_process_group()
        raise
    parallel_state.initialize_model_parallel(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
    )
    # Its fork() is a no-op: no CUDA random state is needed, since there is no dropout.
    initialize_rng_tracker(inference_rng_tracker=True)
    return Topology(
        **vars(layout),
        rank=dist.get_rank(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
    )


@contextmanager
def alone() -> Iterator[Topology]:
    """A job of this process and no other, whatever torchrun says, on the CPU.

    In it megatron.core builds models, and on torch's meta device any size of them.
    """
    platform.activate()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield initialize(ParallelConfig())
    finally:
        shutdown()


def shutdown() -> None:
    """Leave the job and free its groups (`destroy_model_parallel` alone keeps their sockets)."""
    # megatron.core remembers the last 32 rotary embeddings of a process, each of which holds a
    # group: its sockets and threads would go on, and the threads of a group that others have left
    # take all the time that they get.
    RotaryEmbedding.forward.cache_clear()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(config: ParallelConfig) -> None:
    if dist.is_initialized():
        return
    backend = config.distributed_backend
    if backend == "auto":
        backend = "gloo" if platform.on_cpu() else "nccl"
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    if not platform.on_cpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
