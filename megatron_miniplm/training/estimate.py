"""What a run will take, before it takes it: memory of every stage, FLOPs, time and disk.

Per rank, for P parameters of which its stage and tensor-parallel share hold p, and D data-parallel
ranks (Megatron-LM's ``theoretical_memory_usage.py`` has the same table)::

                        bf16                                fp32
    weights             2 p                                 4 p
    gradients           4 p   (summed in fp32)              4 p
    optimizer          12 p   (fp32 weights, m, v)          8 p   (m, v)
      with ZeRO-1      12 p / D                             8 p / D

Gradients, and with ZeRO-1 weights and optimizer state too, lie in megatron.core's buffers, whose
padding is counted. Activations: what a layer keeps of a micro-batch (`models.outline`), times the
layers and micro-batches that a stage holds at its fullest. 1F1B: stage k of K holds K - k of them.
Interleaved, v chunks a rank: 2 (K - k - 1) + (v - 1) K + 1 chunk passes (Narayanan et al.,
arXiv 2104.04473; for stage 0 that is 1F1B's memory times 1 + (K - 1) / (K v), as in Korthikanti
et al., arXiv 2205.05198, section 4.2.3). A recomputed layer keeps its input.

Not counted: CUDA's context, NCCL's buffers and the allocator's fragmentation (leave a few GB),
and the optimizer's temporaries, which come when activations are gone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.flops import count_parameters
from megatron_miniplm.models.head import TILE_BYTES
from megatron_miniplm.models.logit_loss import CHUNK_BYTES
from megatron_miniplm.models.outline import Outline, layers_of_chunks, outline, saved_by_layer
from megatron_miniplm.models.recompute import RecomputeConfig
from megatron_miniplm.parallel.topology import Layout, Topology
from megatron_miniplm.teachers.teacher import Beside, Signals

_ALIVE = 0.25
"""Gradients that are alive at once in a layer's backward pass, as a part of what the layer keeps:
measured, between 0.1 and 0.3 (`tests/parallel/test_estimate.py`)."""
_GRADIENT, _MASTER, _MOMENTS = 4, 4, 8
"""Bytes of an element: its gradient, its fp32 weight beside a bf16 one, Adam's two moments."""


@dataclass(frozen=True, kw_only=True)
class MemorySetting:
    """What memory depends on: the model and how it is trained."""

    shape: ModelConfig
    layout: Layout
    virtual_stages: int
    micro_batch_size: int
    micro_batches: int
    """Of one rank in one update."""
    seq_length: int
    dtype: torch.dtype
    distributed_optimizer: bool
    recompute: RecomputeConfig
    teacher: Beside | Signals | None
    device: str
    """cuda or cpu."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on every rank of one pipeline stage at its fullest moment."""

    parameters: int
    """Not bytes but elements."""
    weights: int
    gradients: int
    optimizer: int
    """The largest share of a data-parallel rank."""
    activations: int
    """Kept for the backward pass, by the micro-batches that are in flight."""
    working: int
    """What a layer's backward pass has beside that; where every layer is recomputed, all that one
    keeps, too. (Of some, the first ones: their turn comes when what the others kept is free.)"""
    head: int
    """The last stage's loss: a chunk of logits, hidden states and their gradient."""
    teacher_weights: int
    teacher_hidden: int
    """Its final hidden states of all micro-batches of an update, on the last stage; of a stored
    teacher, its signals of one micro-batch."""

    @property
    def total(self) -> int:
        """All of it; the loss is done when the first layer's backward pass begins."""
        apart = ("parameters", "working", "head")
        held = sum(value for name, value in vars(self).items() if name not in apart)
        return held + max(self.working, self.head)


def memory_of_stages(setting: MemorySetting, topology: Topology) -> list[StageMemory]:
    """Memory by pipeline stage (inside of `topology.alone`); refuses what megatron.core refuses."""
    shape, layout = setting.shape, setting.layout
    parts = outline(shape, topology, layout.tp_size)
    chunks = layers_of_chunks(shape, layout, setting.virtual_stages)
    saved = saved_by_layer(
        shape, topology, layout, micro_batch_size=setting.micro_batch_size,
        seq_length=setting.seq_length, dtype=setting.dtype, fused=setting.device == "cuda",
    )  # fmt: skip
    taught = _teacher_stages(setting, topology)
    return [
        _stage(setting, parts, at, layers, saved, *taught[at]) for at, layers in enumerate(chunks)
    ]


def _stage(
    setting: MemorySetting,
    parts: Outline,
    at: int,
    chunks: Sequence[int],
    saved: int,
    teacher_weights: int,
    teacher_hidden: int,
) -> StageMemory:
    size, zero, ranks = setting.dtype.itemsize, setting.distributed_optimizer, setting.layout
    last = at == ranks.pp_size - 1
    held = [
        parts.chunk(layers, first=at == 0 and number == 0, last=last and number == len(chunks) - 1)
        for number, layers in enumerate(chunks)
    ]
    elements = sum(map(sum, held))
    shared = parts.tied and ranks.pp_size > 1
    buffers = sum(
        buffer_elements(
            each, ranks.dp_size, zero=zero,
            alone=_own_buckets(
                each,
                first=shared and at == 0 and number == 0,
                last=shared and last and number == len(chunks) - 1,
            ),
        )
        for number, each in enumerate(held)
    )  # fmt: skip
    of_optimizer = _MOMENTS + (_MASTER if setting.dtype != torch.float32 else 0)
    share = -(-buffers // ranks.dp_size) if zero else elements
    hidden = setting.seq_length * setting.micro_batch_size * setting.shape.hidden_size * size
    mine = hidden // ranks.tp_size if ranks.sequence_parallel else hidden
    again = [_recomputed(setting.recompute, layers) for layers in chunks]
    kept = [
        (layers - n) * saved + n * mine + (0 if last or ranks.pp_size == 1 else mine)
        for layers, n in zip(chunks, again, strict=True)
    ]
    passes = passes_in_flight(at, ranks.pp_size, len(chunks), micro_batches=setting.micro_batches)
    # The chunks of a stage have equally many layers, and hold passes in turn.
    activations = passes * max(kept)
    return StageMemory(
        parameters=elements,
        weights=size * (buffers if zero else elements),
        gradients=_GRADIENT * (buffers if zero else elements),
        optimizer=of_optimizer * share,
        activations=activations,
        working=round(_ALIVE * saved) + (saved if again == list(chunks) else 0),
        head=_head(setting, hidden, mine) if last else 0,
        teacher_weights=teacher_weights,
        teacher_hidden=teacher_hidden,
    )


def passes_in_flight(stage: int, stages: int, chunks: int, *, micro_batches: int) -> int:
    """Forward passes of a chunk whose backward pass has not begun, at most, on a pipeline stage."""
    if chunks == 1:
        return min(micro_batches, stages - stage)
    return min(micro_batches * chunks, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1)


def buffer_elements(
    parameters: Sequence[int], dp_size: int, *, zero: bool, alone: Sequence[int] = ()
) -> int:
    """Length of megatron.core's buffer of these parameters (`_ParamAndGradBuffer`).

    With ZeRO-1, a parameter begins at a multiple of 64 and a bucket at one of lcm(D, 128); `alone`:
    places of parameters with a bucket of their own (a tied matrix that two stages hold). The others
    are one bucket: those of an overlapped reduction, and their padding, are not counted.
    """
    if not zero:
        return sum(parameters)
    unit = math.lcm(dp_size, 128)
    end, fresh = 0, True
    for place in reversed(range(len(parameters))):
        end = _up(end, 64)
        if place in alone and not fresh:
            end = _up(end, unit)
        end += parameters[place]
        fresh = place in alone
        if fresh:
            end = _up(end, unit)
    return _up(end, unit)


def checkpoint_bytes(shape: ModelConfig, *, bf16: bool, distributed_optimizer: bool) -> int:
    """Size of one checkpoint: the model and the optimizer's state, each once.

    The distributed optimizer stores fp32 weights also beside a model in fp32.
    """
    padded = count_parameters(replace(shape, vocab_size=shape.padded_vocab_size))
    master = _MASTER if bf16 or distributed_optimizer else 0
    return padded * ((2 if bf16 else 4) + master + _MOMENTS)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _own_buckets(parameters: Sequence[int], *, first: bool, last: bool) -> list[int]:
    """Place of the tied matrix in a chunk that shares it with the model's other end."""
    if first:
        return [0]
    return [len(parameters) - 1] if last else []


def _recomputed(config: RecomputeConfig, layers: int) -> int:
    """How many layers of a chunk compute again what others keep."""
    if config.recompute_granularity != "full":  # what `selective` saves is not counted
        return 0
    asked = config.recompute_num_layers
    return layers if asked is None else min(layers, asked)


def _head(setting: MemorySetting, hidden: int, mine: int) -> int:
    """The final norm's input, the gradient of the hidden states, and one chunk of logits."""
    size, tokens = setting.dtype.itemsize, setting.seq_length * setting.micro_batch_size
    columns = setting.shape.padded_vocab_size // setting.layout.tp_size
    row = columns * size
    if isinstance(setting.teacher, Beside) or (setting.teacher and setting.teacher.matrix_width):
        row += columns * setting.teacher.dtype.itemsize
    chunk = min(tokens * row, max(row, CHUNK_BYTES[setting.device]))
    rows = max(1, chunk // row)
    if setting.device == "cpu" and setting.dtype != torch.float32:
        chunk += min(TILE_BYTES, 4 * rows * columns)  # there, gradients are added up in fp32
    # The whole sequence goes through the head: under sequence parallelism it is gathered first.
    gathered = hidden if setting.layout.sequence_parallel else 0
    return 2 * mine + hidden + gathered + chunk


def _teacher_stages(setting: MemorySetting, topology: Topology) -> list[tuple[int, int]]:
    """(weights, signals) in bytes of every stage; zeros without a teacher."""
    teacher, layout = setting.teacher, setting.layout
    if teacher is None:
        return [(0, 0)] * layout.pp_size
    size = teacher.dtype.itemsize
    if isinstance(teacher, Signals):
        rows = setting.shape.padded_vocab_size // layout.tp_size
        signals = setting.seq_length * setting.micro_batch_size * teacher.token_bytes
        last = (size * rows * teacher.matrix_width, signals)
        return [(0, 0)] * (layout.pp_size - 1) + [last]
    parts = outline(teacher.shape, topology, layout.tp_size)
    hidden = setting.seq_length * setting.micro_batch_size * teacher.shape.hidden_size * size
    if layout.sequence_parallel:
        hidden //= layout.tp_size
    stages = layers_of_chunks(teacher.shape, layout)
    return [
        (
            size * sum(parts.chunk(layers, first=at == 0, last=at == layout.pp_size - 1)),
            setting.micro_batches * hidden if at == layout.pp_size - 1 else 0,
        )
        for at, (layers,) in enumerate(stages)
    ]
