"""The Llama family (Llama 2, 3, 3.1, 3.2, SmolLM2): no biases, optional Llama 3 rotary scaling.

The preset is MiniPLM's cross-family student (arXiv 2410.17215). What the paper does not give
(epsilon, rotary base and scaling, context) is Llama 3.1's own.
"""

from __future__ import annotations

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.dialect import Dialect
from megatron_miniplm.models.family import FAMILIES, ModelConfig


def refuse_odd_heads(config: ModelConfig) -> None:
    """Refuse widths that transformers does not load."""
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

LLAMA = Dialect(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    always={"add_qkv_bias": False, "qk_layernorm": False},
    defaults={"max_position_embeddings": 2048},
    fixed={
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "sliding_window": (None,),
    },
    written={"attention_bias": False, "mlp_bias": False},
    check_shape=refuse_odd_heads,
)
FAMILIES.register(LLAMA.name)(
    LLAMA.family(
        gguf_architecture="llama",
        gguf_pairs_rows=True,
        presets={LLAMA_212M.model: LLAMA_212M},
    )
)
