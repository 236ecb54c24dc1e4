"""Functions that ranks of the pool run by name: saves and their optimizer state."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_miniplm.core.errors import CheckpointError
from megatron_miniplm.models.build import InitialWeights, build_model, fill_by_name
from megatron_miniplm.models.checkpoint import (
    CheckpointWriter,
    TrainedModel,
    checkpoint_metadata,
    iteration_folder,
    load_state,
    save_checkpoint,
    verify_checkpoint,
)
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.parallel.topology import ParallelConfig, Topology, initialize, shutdown
from megatron_miniplm.training.optimizer import OptimizationConfig, build_optimizer
from megatron_miniplm.training.step import wrap_for_training
from megatron_miniplm.training.timers import Timers
from megatron_miniplm.training.zero_state import ParallelStateOptimizer

SHAPE = ModelConfig(
    num_layers=3, hidden_size=48, ffn_hidden_size=80, num_attention_heads=4, vocab_size=300
)


def trained(shape: ModelConfig, iteration: int) -> TrainedModel:
    return TrainedModel(
        config=shape, valid_vocab=1, tokenizer_fingerprint="", iteration=iteration,
        consumed_samples=0,
    )  # fmt: skip


def change_while_saving(save: str) -> float:
    """Save a tensor in the background while it changes; the seconds until `start` returned."""
    topology = initialize(ParallelConfig())
    try:
        values = torch.full((1 << 22,), 1.0)
        place = partial(ShardedTensor.from_rank_offsets, "values")
        state = {"values": place(values, (0, topology.rank, topology.world_size),
                                 replica_id=(0, 0, 0))}  # fmt: skip
        writer = CheckpointWriter(Path(save), topology)
        started = time.monotonic()
        writer.start(trained(SHAPE, 1), state, parents={}, config={}, copy=True)
        seconds = time.monotonic() - started
        assert not list(Path(save).glob("iter_*")), "there is a checkpoint before it is finished"
        values.add_(1)  # training goes on
        folder = writer.finish(wait=True)
        assert folder is not None
        found = torch.empty_like(values)
        state = {"values": place(found, (0, topology.rank, topology.world_size),
                                 replica_id=(0, 0, 0))}  # fmt: skip
        load_state(folder, state, topology=topology)
        assert found.eq(1).all()
        return seconds
    finally:
        shutdown()


def verify_in_different_views(save: str) -> str:
    """What verification says where a shared file system shows rank 1 one checkpoint less."""
    topology = initialize(ParallelConfig())
    try:
        for at in (1, 2, 3):
            state = {"values": ShardedTensor.from_rank_offsets(
                "values", torch.ones(1), (0, topology.rank, topology.world_size)
            )}  # fmt: skip
            save_checkpoint(
                Path(save, "run"), trained(SHAPE, at), state, topology=topology, parents={},
                config={},
            )  # fmt: skip
        mine = Path(save, f"seen by {topology.rank}")
        shutil.copytree(Path(save, "run"), mine)
        for at in (2, 3):
            (iteration_folder(mine, at) / "common.pt").write_bytes(b"damaged")
        if topology.rank == 1:
            (iteration_folder(mine, 2) / "manifest.json").unlink()
        try:
            verify_checkpoint(iteration_folder(mine, 3), topology=topology)
        except CheckpointError as error:
            return str(error).partition("nothing was loaded")[2]
        return "intact"
    finally:
        shutdown()


def optimizer_of(
    topology: Topology, shape: ModelConfig, *, seed: int, bf16: bool
) -> tuple[ModelChunks, Any]:
    """A model and its distributed optimizer, whose state is of random numbers."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = build_model(shape, topology, valid_vocab=shape.vocab_size or 0, dtype=dtype)
    fill_by_name(model, InitialWeights(shape, seed))
    flags = OptimizationConfig(use_distributed_optimizer=True)
    wrapped = wrap_for_training(model, flags, bf16=bf16, timers=Timers())
    optimizer = build_optimizer(flags, wrapped, bf16=bf16)
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    part.state_dict()  # allocates
    torch.manual_seed(seed + topology.dp_rank)  # equal where a parameter is on all TP ranks
    for state in part.optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].normal_()
    return model, optimizer


def states(optimizer: Any) -> list[torch.Tensor]:
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return [
        tensor
        for of_group in part.optimizer.param_groups
        for main in of_group["params"]
        for tensor in (main, *(part.optimizer.state[main][n] for n in ("exp_avg", "exp_avg_sq")))
    ]


def both_forms(save: str, *, tp: int, bf16: bool) -> list[str]:
    """Write and read a state by our methods and by megatron.core's; the files of ours."""
    topology = initialize(ParallelConfig(tensor_model_parallel_size=tp))
    stock = {
        name: getattr(DistributedOptimizer, name)
        for name in (
            "sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable"
        )
    }  # fmt: skip
    ours = {name: getattr(ParallelStateOptimizer, name) for name in stock}

    def use(methods: dict[str, Any]) -> None:
        for name, method in methods.items():
            setattr(ParallelStateOptimizer, name, method)

    def sharded(model: ModelChunks, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
        state = {"model": model.sharded_state_dict(metadata=checkpoint_metadata())}
        state["optimizer"] = optimizer.sharded_state_dict(
            state, is_loading=is_loading, metadata=checkpoint_metadata()
        )
        return state

    try:
        model, optimizer = optimizer_of(topology, SHAPE, seed=1, bf16=bf16)
        expected = [tensor.clone() for tensor in states(optimizer)]
        for number, (writing, reading) in enumerate([(ours, ours), (ours, stock), (stock, ours)]):
            use(writing)
            folder = save_checkpoint(
                Path(save), trained(SHAPE, number), sharded(model, optimizer, is_loading=False),
                topology=topology, parents={}, config={},
            )  # fmt: skip
            use(reading)
            other_model, other = optimizer_of(topology, SHAPE, seed=2, bf16=bf16)
            assert not all(map(torch.equal, states(other), expected))
            loaded = dist_checkpointing.load(
                sharded(other_model, other, is_loading=True), str(folder)
            )
            other.load_state_dict(loaded["optimizer"])
            for found, wanted in zip(states(other), expected, strict=True):
                assert torch.equal(found, wanted)
        return sorted(path.name for path in Path(save, "iter_0000000").glob("*.distcp"))
    finally:
        use(ours)
        shutdown()


def cost_of_a_save(save: str, *, shape: ModelConfig, stock: bool) -> dict[str, float]:
    """Of a save with the distributed optimizer: parameters, peak bytes beyond before, seconds."""
    topology = initialize(ParallelConfig())
    name = "sharded_param_state_fully_reshardable"
    ours = getattr(ParallelStateOptimizer, name)
    if stock:
        setattr(ParallelStateOptimizer, name, getattr(DistributedOptimizer, name))
    try:
        model, optimizer = optimizer_of(topology, shape, seed=1, bf16=False)
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        started = time.monotonic()
        state = {"model": model.sharded_state_dict(metadata=checkpoint_metadata())}
        state["optimizer"] = optimizer.sharded_state_dict(state, metadata=checkpoint_metadata())
        folder = save_checkpoint(
            Path(save), trained(shape, 1), state, topology=topology, parents={}, config={}
        )
        seconds = time.monotonic() - started
        own = folder / f"__{topology.rank}_0.distcp"
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "peak": _memory("VmHWM") - before,
            "seconds": seconds,
            "written": own.stat().st_size if own.exists() else 0,
        }
    finally:
        setattr(ParallelStateOptimizer, name, ours)
        shutdown()


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(kilobytes)
