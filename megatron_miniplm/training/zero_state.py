"""State of the distributed optimizer as parts of global tensors, saved and loaded in parallel.

Every data-parallel rank holds a run of elements of some of its TP and PP shard's parameters. A run
of a row-major tensor is a few boxes of it (of a matrix: a part of a row, whole rows, a part of a
row), and a checkpoint is made of boxes: so each rank saves and loads just what it holds, without a
message or a copy, and any other layout finds it. The keys and shapes are those of megatron.core's
``fully_reshardable``, so either reads what the other wrote; but core gathers the state of all
data-parallel ranks in the host memory of every one of them (12 bytes a parameter of the TP and PP
shard, whatever the number of ranks), and then one of them writes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) along every axis."""


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes that elements `start` to `stop` of a row-major tensor are, in their order.

    At most 2 x len(shape) - 1 of them, none of an empty run.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # a part of one row
        yield from _in_row(last, shape[1:], start - last * row, stop - last * row)
        return
    yield from _in_row(first - 1, shape[1:], start - (first - 1) * row, row)
    if first < last:
        inner = shape[1:]
        yield (first, *(0 for _ in inner)), (last - first, *inner)
    yield from _in_row(last, shape[1:], 0, stop - last * row)


def _in_row(at: int, inner: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in boxes(inner, start, stop):
        yield (at, *offsets), (1, *sizes)


def bytes_of_a_save(
    parameters: int, *, dp_size: int, bf16: bool, distributed_optimizer: bool
) -> tuple[int, int]:
    """(of the first data-parallel rank, of any other): bytes that a rank writes in a save.

    `parameters`: of its TP and PP shard. With --async-save it also copies as many to host memory.
    """
    model = (2 if bf16 else 4) * parameters  # of equal copies, one is written
    moments = 2 * 4 * parameters
    if distributed_optimizer:
        slices = -(-(4 * parameters + moments) // dp_size)  # with the parameters in fp32
        return model + slices, slices
    return model + moments + (4 * parameters if bf16 else 0), 0


class ParallelStateOptimizer(DistributedOptimizer):
    """megatron.core's ZeRO-1 optimizer, each rank of which saves and loads its own slices."""

    def sharded_param_state_fully_reshardable(
        self,
        model_sharded_state_dict: Mapping[str, Any],
        is_loading: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Views of this rank's slices, with their global place."""
        found, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        places = {place.data: place for place in nested_values(found)}
        return {
            f"{at}.{name}": list(self._parts(name, parameter, places[parameter], start, flat))
            for at, (parameter, start) in enumerate(self._slices())
            for name, flat in self._get_main_param_and_optimizer_states(parameter).items()
        }

    def load_parameter_state_from_fully_reshardable(self, state_dict: Mapping[str, Any]) -> None:
        """Set this rank's slices from what was loaded for the above."""
        for at, (parameter, _) in enumerate(self._slices()):
            names = self._get_main_param_and_optimizer_states(parameter)
            parts = {name: state_dict[f"{at}.{name}"] for name in names}
            self._set_main_param_and_optimizer_states(
                parameter,
                {name: torch.cat([part.flatten() for part in parts[name]]) for name in names},
            )

    def _slices(self) -> Iterator[tuple[torch.nn.Parameter, int]]:
        """(parameter, first of its elements that this rank holds)."""
        for of_buffer in self.gbuf_ranges:
            for of_dtype in of_buffer.values():
                for bucket in of_dtype:
                    for parameter, ranges in bucket["param_map"].items():
                        yield parameter, ranges["param"].start

    def _parts(
        self,
        name: str,
        parameter: torch.nn.Parameter,
        place: ShardedTensor | ShardedTensorFactory,
        start: int,
        flat: torch.Tensor,
    ) -> Iterator[ShardedTensor]:
        """`flat`, which begins at element `start` of `parameter`, as boxes of global tensors."""
        whole = nested_values(place.build()) if isinstance(place, ShardedTensorFactory) else [place]
        for shard in whole:
            # A factory divides a parameter into several global tensors (gate and up): views of it.
            assert shard.data.is_contiguous(), f"{shard.key} is not a run of its parameter"
            begin = shard.data.storage_offset() - parameter.storage_offset()
            low = max(begin, start)
            high = min(begin + shard.data.numel(), start + flat.numel())
            at = low - start
            for offsets, sizes in boxes(tuple(shard.local_shape), low - begin, high - begin):
                layers = shard.prepend_axis_num
                local = (*(1 for _ in range(layers)), *sizes)
                inside = shard.global_offset[layers:]
                size = math.prod(sizes)
                yield ShardedTensor(
                    key=f"optimizer.state.{name}.{shard.key}",
                    data=flat.detach()[at : at + size].view(local),
                    dtype=flat.dtype,
                    local_shape=local,
                    global_shape=tuple(shard.global_shape),
                    global_offset=(
                        *shard.global_offset[:layers],
                        *(a + b for a, b in zip(inside, offsets, strict=True)),
                    ),
                    axis_fragmentations=None,  # not a regular grid
                    # Of the copies over TP and PP one is saved; over DP there are none.
                    replica_id=(*shard.replica_id[:2], self.distributed_optimizer_instance_id),
                    allow_shape_mismatch=shard.allow_shape_mismatch,
                )
                at += size
