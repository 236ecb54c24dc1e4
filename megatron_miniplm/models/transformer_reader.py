"""A transformer that remembers what it read: new tokens in, logits of what follows out.

megatron.core's modules are made to be trained: one token takes them some sixty small calls a layer.
Here the same is computed of the same parameters, where they lie, in a dozen (x: residual stream):

    x += proj(attention(rope(qkv(norm(x)))))     x += fc2(silu(gate) * up), gate, up = fc1(norm(x))

A layer that has a parameter or a module which this does not know is refused, not approximated.

Shapes: n rows, s new positions, t positions read so far (the new ones included), g key/value heads
of this rank with r query heads each, d their width. For each of the g, ``qkv`` gives r queries, a
key and a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.layers import Decoder, run_hooks_of_calls
from megatron_miniplm.parallel.vocab import gather_shards

_MODULES: Mapping[str, tuple[str, ...]] = {
    "": ("TransformerLayer",),
    "self_attention": ("SelfAttention",),
    "self_attention.core_attention": ("SdpaAttention", "TEDotProductAttention"),
    "mlp": ("MLP",),
}
"""Classes that say what is computed, beside the parameters."""
_PARAMETERS: Mapping[str, str] = {
    "input_layernorm.weight": "attention_norm",
    "self_attention.linear_qkv.layer_norm_weight": "attention_norm",
    "self_attention.linear_qkv.weight": "qkv",
    "self_attention.linear_qkv.bias": "qkv_bias",
    "self_attention.q_layernorm.weight": "q_norm",
    "self_attention.k_layernorm.weight": "k_norm",
    "self_attention.linear_proj.weight": "proj",
    "pre_mlp_layernorm.weight": "mlp_norm",
    "mlp.linear_fc1.layer_norm_weight": "mlp_norm",
    "mlp.linear_fc1.weight": "fc1",
    "mlp.linear_fc2.weight": "fc2",
}
"""Of a layer -> field of `_Layer`; Transformer Engine has norms in the linear layer after them."""

BLOCK = 1024
"""Tokens of a prompt that pass through the layers together (at least a row's): few enough that what
is computed in between stays near."""


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """Parameters of a layer: this rank's part of them under tensor parallelism."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    proj: torch.Tensor
    mlp_norm: torch.Tensor
    fc1: torch.Tensor
    fc2: torch.Tensor

    @classmethod
    def of(cls, layer: torch.nn.Module) -> _Layer:
        for path, known in _MODULES.items():
            if (name := type(layer.get_submodule(path)).__name__) not in known:
                raise _unknown(f"{path or 'the layer'} is {name}, not {' or '.join(known)}")
        found = {}
        for name, parameter in layer.named_parameters():
            if name not in _PARAMETERS:
                raise _unknown(f"a layer has {name}")
            found[_PARAMETERS[name]] = parameter
        return cls(**found)


class TransformerReader:
    """Reads with a decoder whose parameters do not change meanwhile."""

    def __init__(self, decoder: Decoder, rows: int, length: int) -> None:
        config = decoder.config
        _refuse_settings(config)
        for module in decoder.modules():
            run_hooks_of_calls(module)
        self._decoder, self._whole = decoder, config.tensor_model_parallel_size == 1
        self._layers = [_Layer.of(layer) for layer in decoder.decoder.layers]
        self._epsilon, self._width = config.layernorm_epsilon, config.kv_channels
        self._queries = config.num_attention_heads // config.num_query_groups
        weight = self._layers[0].qkv
        groups = weight.shape[0] // ((self._queries + 2) * self._width)
        self._memory = weight.new_empty((len(self._layers), 2, rows, groups, length, self._width))
        self._position = 0
        angles = decoder.rotary_pos_emb(length)  # [t, 1, 1, d]
        half = self._width // 2
        self._cosine = angles.cos().to(weight.dtype)
        self._sine = angles[..., :half].sin().to(weight.dtype)

    def __call__(self, tokens_ns: torch.Tensor) -> torch.Tensor:
        """Read the next tokens of the first n rows; [n, V] logits of what follows.

        The first call may have any s, every later one has s = 1.
        """
        count, length = tokens_ns.shape
        assert self._position == 0 or length == 1, "tokens after the first pass come one by one"
        step = max(1, BLOCK // length)
        starts = range(0, count, step)
        last = [self._read(tokens_ns[start : start + step], start) for start in starts]
        self._position += length
        last_nh = last[0] if len(last) == 1 else torch.cat(last)
        return _logits(self._decoder.head(self._decoder.decoder.final_layernorm(last_nh)[None]))

    def _read(self, tokens_ns: torch.Tensor, first: int) -> torch.Tensor:
        """[n, h] after the last token of rows `first` and following."""
        shape = tokens_ns.shape
        x = self._decoder.embedding.word_embeddings(tokens_ns).flatten(0, 1)
        memories = self._memory[:, :, first : first + len(tokens_ns)]
        for layer, memory in zip(self._layers, memories.unbind(), strict=True):
            qkv = F.linear(self._norm(x, layer.attention_norm), layer.qkv, layer.qkv_bias)
            self._add(x, self._attention(layer, memory, qkv.unflatten(0, shape)), layer.proj)
            gate, up = F.linear(self._norm(x, layer.mlp_norm), layer.fc1).chunk(2, -1)
            self._add(x, F.silu(gate).mul_(up), layer.fc2)
        return x.unflatten(0, shape)[:, -1]

    def move(self, old: np.ndarray, new: np.ndarray) -> None:
        """Put what is remembered of rows `old` where rows `new` were."""
        read = self._memory[..., : self._position, :]
        read[:, :, new] = read[:, :, old]

    def _attention(
        self, layer: _Layer, memory: torch.Tensor, qkv_nsx: torch.Tensor
    ) -> torch.Tensor:
        """[n * s, g * r * d]: what the new positions take from all that they see."""
        length = qkv_nsx.shape[1]
        start, stop = self._position, self._position + length
        r = self._queries
        qkv = qkv_nsx.unflatten(-1, (-1, r + 2, self._width))
        turned = self._turned(layer, qkv[..., : r + 1, :], slice(start, stop))
        keys, values = memory[..., :stop, :]
        keys[:, :, start:] = turned[..., r, :].transpose(1, 2)
        values[:, :, start:] = qkv[..., r + 1, :].transpose(1, 2)
        queries = turned[..., :r, :]
        if length == 1:
            # It sees everything: the queries of a group may stand where positions do.
            out = F.scaled_dot_product_attention(queries[:, 0], keys, values)
            return out.flatten(1)
        out = F.scaled_dot_product_attention(
            queries.flatten(2, 3).transpose(1, 2), keys, values, is_causal=True, enable_gqa=r > 1
        )
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def _turned(self, layer: _Layer, qk: torch.Tensor, span: slice) -> torch.Tensor:
        """Queries and keys [n, s, g, r + 1, d], normed where the model does that, and rotated."""
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk.split([self._queries, 1], dim=-2)
            qk = torch.cat((self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)), dim=-2)
        turned = qk * self._cosine[span]
        (a, b), (turned_a, turned_b) = qk.chunk(2, -1), turned.chunk(2, -1)
        turned_a.addcmul_(b, self._sine[span], value=-1)
        turned_b.addcmul_(a, self._sine[span])
        return turned

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self._epsilon)

    def _add(self, x: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor) -> None:
        """Add inner @ weight^T, of which every TP rank has a part of the sum."""
        if self._whole:
            x.addmm_(inner, weight.t())
        else:
            x += reduce_from_tensor_model_parallel_region(F.linear(inner, weight))


def _logits(head: Head) -> torch.Tensor:
    """[n, V] logits after the last position, of all real columns, on every TP rank."""
    shards_wnv = gather_shards(head.hidden_sbh[-1] @ head.weight_vh.t(), head.shard)
    return shards_wnv.movedim(0, 1).flatten(1)[:, : head.shard.valid]


def _refuse_settings(config: TransformerConfig) -> None:
    if config.fp8 is not None:
        raise _unknown(f"--fp8-format {config.fp8}")
    if config.activation_func is not F.silu or not config.gated_linear_unit:
        raise _unknown("another MLP than the gated SiLU one")


def _unknown(what: str) -> ConfigError:
    return ConfigError(
        f"generation does not know what to do with this model: {what}. Its architecture needs a "
        "reader of its own (models/family.py)"
    )
