"""The modules that Megatron-Core's local spec lacks.

SDPA attention, an RMSNorm that knows sequence parallelism, and a GPT whose last stage hands its
hidden states to the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megatron_miniplm.models.head import Head


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


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the mark that makes Megatron reduce its gradient over TP under SP."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def block_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Layers of this stage (or chunk of it), with our attention and norm in Megatron's layer."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.self_attention.submodules.core_attention = SdpaAttention
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )


class Decoder(GPTModel):
    """GPTModel whose last stage calls ``process(Head)`` instead of building logits.

    megatron.core 0.18+ has ``output_processor`` for this; overriding `_postprocess`, which core
    calls with keywords only, serves every supported version.
    """

    process: Callable[[Head], Any] | None = None
    make_head: Callable[[torch.Tensor, torch.Tensor], Head]

    def forward(
        self, *args: Any, process: Callable[[Head], Any] | None = None, **kwargs: Any
    ) -> Any:
        """Hidden states for the next stage, or on the last stage what `process` returns."""
        self.process = process
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.process = None

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not self.post_process or self.process is None:
            return super()._postprocess(
                hidden_states, input_ids, position_ids, labels, *args, **kwargs
            )
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return self.process(self.make_head(hidden_states, weight))
