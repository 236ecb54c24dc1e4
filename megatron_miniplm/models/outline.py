"""A model's parts without its memory: how many numbers a rank holds, and what a layer keeps.

Nothing here knows an architecture. A tensor-parallel rank's share of a layer is a narrower layer
(`Architecture.divided` says in which sizes), so megatron.core builds that layer on torch's meta
device, which has shapes and no memory, and one forward pass shows what autograd saves::

    saved(t) = full + divided / t         bytes of a layer's micro-batch on one of t ranks
    with --sequence-parallel              (full + divided) / t

`full` is what has the width of the residual stream, which only sequence parallelism divides
(Korthikanti et al., arXiv 2205.05198, section 4; `tests/unit/test_estimate.py` has the closed form
of a Llama-shaped layer). On a GPU, attention and RMSNorm are fused kernels, of which autograd keeps
inputs, output and one fp32 statistic a row (FlashAttention's log-sum-exp; the norm's 1 / rms).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch.overrides import TorchFunctionMode

from megatron_miniplm.models.build import build_model, transformer_config
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.family import ModelConfig, get_family
from megatron_miniplm.parallel.topology import Layout, Topology

_META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Outline:
    """One tensor-parallel rank's share of a model: elements of each parameter, by part."""

    embedding: tuple[int, ...]
    layer: tuple[int, ...]
    """Of one layer; all are alike."""
    final: tuple[int, ...]
    """The norm after the last layer."""
    head: tuple[int, ...]
    """The output matrix; where it is tied, stages that lack the embedding have a copy of it."""
    tied: bool

    def chunk(self, layers: int, *, first: bool, last: bool) -> list[int]:
        """Elements of every parameter of so many layers, with the ends of the model or without."""
        own_head = self.head if last and not (self.tied and first) else ()
        return [
            *(self.embedding if first else ()),
            *(layers * self.layer),
            *(self.final if last else ()),
            *own_head,
        ]


def outline(shape: ModelConfig, topology: Topology, tp_size: int) -> Outline:
    """What one of `tp_size` ranks holds (inside of `topology.alone`)."""
    found: dict[str, list[int]] = {"embedding": [], "layers": [], "final": [], "output": []}
    for name, value in _one_layer(shape, topology, tp_size, torch.float32).named_parameters():
        part = next(part for part in ("layers", "final", "output", "embedding") if part in name)
        found[part].append(value.numel())
    tied = not shape.untie_embeddings_and_output_weights
    return Outline(
        embedding=tuple(found["embedding"]),
        layer=tuple(found["layers"]),
        final=tuple(found["final"]),
        head=tuple(found["embedding" if tied else "output"]),
        tied=tied,
    )


def layers_of_chunks(
    shape: ModelConfig, layout: Layout, virtual_stages: int = 1
) -> list[list[int]]:
    """Layers of every chunk of every pipeline stage, [stage][chunk], as megatron.core deals them.

    Refuses what core refuses of this shape in this layout.
    """
    core = transformer_config(shape, layout, torch.float32, virtual_stages=virtual_stages)
    chunks = range(virtual_stages) if virtual_stages > 1 else [None]
    return [
        [get_num_layers_to_build(core, at, stage) for at in chunks]
        for stage in range(layout.pp_size)
    ]


def saved_by_layer(
    shape: ModelConfig,
    topology: Topology,
    layout: Layout,
    *,
    micro_batch_size: int,
    seq_length: int,
    dtype: torch.dtype,
    fused: bool,
) -> int:
    """Bytes that one layer keeps of one micro-batch for its backward pass, on one rank.

    `fused`: with the GPU's kernels. Inside of `topology.alone`.
    """

    def saved(ranks: int) -> int:
        decoder: Any = _one_layer(shape, topology, ranks, dtype).decoders[0].decoder
        layer = decoder.layers[0]
        size = (seq_length, micro_batch_size, shape.hidden_size)
        hidden = torch.empty(size, dtype=dtype, device=_META, requires_grad=True)
        angles = torch.empty(seq_length, 1, 1, shape.head_dim, device=_META)
        rope = get_family(shape.model_family).architecture.position_embedding == "rope"
        storages = {each.untyped_storage()._cdata for each in layer.parameters()}
        total = 0

        def keep(value: torch.Tensor) -> torch.Tensor:
            nonlocal total
            storage = value.untyped_storage()
            if storage._cdata not in storages:
                storages.add(storage._cdata)
                total += storage.nbytes()
            return value

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
        with hooks, _KernelsOf(fused=fused):
            out = layer(hidden, attention_mask=None, rotary_pos_emb=angles if rope else None)
        del out  # until here, so that no storage's address is used twice
        return total

    ranks = layout.tp_size
    mine = saved(ranks)
    if not layout.sequence_parallel:
        return mine
    whole = saved(1)
    full = (ranks * mine - whole) / (ranks - 1)
    return round(mine - full + full / ranks)


def share_of(shape: ModelConfig, tp_size: int) -> ModelConfig:
    """The shape of what one tensor-parallel rank holds, as if it were a model of its own."""
    divided = get_family(shape.model_family).architecture.divided(shape)
    sizes: dict[str, Any] = {
        name.removeprefix("--").replace("-", "_"): size // tp_size for name, size in divided.items()
    }
    if "num_attention_heads" in sizes:
        sizes["kv_channels"] = shape.head_dim
    columns = shape.padded_vocab_size // tp_size
    return replace(shape, **sizes, vocab_size=columns, make_vocab_size_divisible_by=1)


def _one_layer(
    shape: ModelConfig, topology: Topology, tp_size: int, dtype: torch.dtype
) -> ModelChunks:
    share = replace(share_of(shape, tp_size), num_layers=1)
    with _META:
        return build_model(
            share, topology, valid_vocab=share.vocab_size or 0, dtype=dtype, device=_META
        )


class _KernelsOf(TorchFunctionMode):
    """Lets attention, and with `fused` the norm, keep what their kernels keep.

    On the meta device torch would put them together from small operations.
    """

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, or what stands for it."""
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        if self.fused and func in (F.rms_norm, torch.rms_norm):
            value, weight = args[0], (kwargs or {}).get("weight", args[2] if args[2:] else None)
            return _Norm.apply(value, weight)
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """q, k, v [b, heads, s, d] -> [b, heads, s, d] in memory of [s, b, heads, d]."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        """Keeps inputs, output and the log-sum-exp of every row."""
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3]).float())
        return out


class _Norm(torch.autograd.Function):
    """x -> x / rms(x) * weight."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, weight: torch.Tensor) -> Any:
        """Keeps its input and 1 / rms of every row."""
        ctx.save_for_backward(value, weight, value.new_empty(value.shape[:-1]).float())
        return torch.empty_like(value)
