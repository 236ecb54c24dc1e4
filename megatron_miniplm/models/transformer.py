"""The layer of the Llama-shaped families: attention with rotary positions, and a gated MLP.

Transformer Engine's layer where that is used (`engine`), else megatron.core's local one, with SDPA
and our norm where its specification without Transformer Engine has nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_miniplm.models.family import Architecture, ModelConfig
from megatron_miniplm.models.layers import RMSNorm
from megatron_miniplm.models.transformer_reader import TransformerReader

GATED_MATRICES = 3


class SdpaAttention(MegatronModule):
    """Causal attention over [s, b, heads, dim]: torch's kernel, flash attention on a GPU."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        **unused: Any,
    ) -> None:
        super().__init__(config)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """[s, b, heads * dim]; padding is on the right, so causality is the only mask needed."""
        length, batch, heads, dim = query.shape
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1]
        )
        return out.permute(2, 0, 1, 3).reshape(length, batch, heads * dim)


def _layer(config: ModelConfig, core: TransformerConfig) -> Any:
    if core.transformer_impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.self_attention.submodules.core_attention = SdpaAttention
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    return layer


def _settings(config: ModelConfig, tp_size: int) -> Mapping[str, Any]:
    return {
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.query_groups,
        "kv_channels": config.head_dim,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_qkv_bias": config.add_qkv_bias,
        "qk_layernorm": config.qk_layernorm,
    }


def _divided(config: ModelConfig) -> Mapping[str, int]:
    return {
        "--num-attention-heads": config.num_attention_heads,
        "--num-query-groups": config.query_groups,
        "--ffn-hidden-size": config.ffn_hidden_size,
    }


def _multiplications(config: ModelConfig, seq_length: int) -> int:
    hidden = config.hidden_size
    query = config.num_attention_heads * config.head_dim
    key = config.query_groups * config.head_dim
    matrices = hidden * (query + 2 * key) + query * hidden
    causal_attention = query * seq_length
    return matrices + GATED_MATRICES * hidden * config.ffn_hidden_size + causal_attention


TRANSFORMER = Architecture(
    layer=_layer,
    settings=_settings,
    position_embedding="rope",
    divided=_divided,
    multiplications=_multiplications,
    initial=lambda config, key, shape, generator: None,
    reader=TransformerReader,
)
