"""The Llama family (Llama 2, 3, 3.1, 3.2, SmolLM2): no biases, optional Llama 3 rotary scaling.

The preset is the paper's cross-family student (spec/algorithms 2.2). What the paper does not give
(epsilon, rotary base and scaling, context) is Llama 3.1's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.decoder import (
    IGNORED_TENSORS,
    TIED_COPIES,
    decoder_rules,
    read_config,
    require,
    write_config,
)
from megatron_miniplm.models.family import FAMILIES, ModelConfig, ModelFamily
from megatron_miniplm.models.mapping import Rule
from megatron_miniplm.models.transformer import TRANSFORMER

ARCHITECTURE, MODEL_TYPE = "LlamaForCausalLM", "llama"

DEFAULTS: Mapping[str, Any] = {"max_position_embeddings": 2048}
FIXED: Mapping[str, Sequence[Any]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """config.json -> shape; refuses biases and every field that it does not know."""
    return read_config(
        raw, "llama", model_type=MODEL_TYPE, defaults=DEFAULTS, fixed=FIXED, add_qkv_bias=False
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Shape -> config.json; refuses q, k, v biases and widths that transformers does not load."""
    _check(config)
    return {
        **write_config(config, architecture=ARCHITECTURE, model_type=MODEL_TYPE),
        "attention_bias": False,
        "mlp_bias": False,
    }


def rules(config: ModelConfig) -> Sequence[Rule]:
    """Parameter table of that shape."""
    _check(config)
    return decoder_rules(config)


def _check(config: ModelConfig) -> None:
    require(config, add_qkv_bias=False, qk_layernorm=False)
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"--hidden-size {config.hidden_size} is not a multiple of --num-attention-heads "
            f"{config.num_attention_heads}: transformers refuses such a Llama, even with head_dim"
        )


LLAMA_212M = ModelConfig(
    model="llama3.1-212m", model_family="llama", hidden_size=768, ffn_hidden_size=3072,
    num_layers=12, num_attention_heads=12, num_query_groups=12, vocab_size=128256,
    add_qkv_bias=False, norm_epsilon=1e-5, rotary_base=500_000.0, use_rope_scaling=True,
    rope_scaling_factor=8.0, max_position_embeddings=131072, init_method_std=0.02,
    untie_embeddings_and_output_weights=False,
)  # fmt: skip

LLAMA = ModelFamily(
    name="llama",
    architecture=TRANSFORMER,
    architectures=(ARCHITECTURE,),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    rules=rules,
    tied_copies=TIED_COPIES,
    ignored_tensors=IGNORED_TENSORS,
    gguf_architecture="llama",
    gguf_pairs_rows=True,
    presets={LLAMA_212M.model: LLAMA_212M},
)
FAMILIES.register(LLAMA.name)(LLAMA)
