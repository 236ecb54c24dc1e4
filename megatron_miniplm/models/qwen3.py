"""The Qwen3 family (dense): RMSNorm of every query and key head, no biases, heads of any width."""

from __future__ import annotations

from megatron_miniplm.models.dialect import Dialect
from megatron_miniplm.models.family import FAMILIES

QWEN3 = Dialect(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    always={"add_qkv_bias": False, "qk_layernorm": True},
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    fixed={"use_sliding_window": (False, None), "attention_bias": (False, None)},
    # Without effect while `use_sliding_window` is false.
    ignored=("sliding_window", "max_window_layers", "layer_types"),
    written={"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
)
FAMILIES.register(QWEN3.name)(QWEN3.family(gguf_architecture="qwen3"))
