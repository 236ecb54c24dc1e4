"""The Qwen family (Qwen1.5, Qwen2, Qwen2.5): biases on q, k and v, and the papers' students.

Presets are Table 6 of MiniPLM (arXiv 2410.17215) and its three teachers. The logit width is
151,936 although the tokenizer has 151,646 entries. Whether the 300M model was tied is not
published: it is tied here, like its neighbours 200M and 500M (246.8M parameters; 363.5M untied).

``pd-*`` are the students of Pre-training Distillation (arXiv 2410.16215),
whose teacher is GLM-4. Their shapes are published, the rest is not: the q, k, v biases and the
vocabulary of 151,552 are GLM-4's, with which the sizes come out as the paper rounds them; epsilon
and rotary base are Qwen's.
"""

from __future__ import annotations

from typing import Any

from megatron_miniplm.models.dialect import Dialect
from megatron_miniplm.models.family import FAMILIES, ModelConfig


def _preset(name: str, hidden: int, ffn: int, layers: int, heads: int, **other: Any) -> ModelConfig:
    settings: dict[str, Any] = {
        "model": name, "model_family": "qwen", "hidden_size": hidden, "ffn_hidden_size": ffn,
        "num_layers": layers, "num_attention_heads": heads, "num_query_groups": heads,
        "vocab_size": 151936, "add_qkv_bias": True, "norm_epsilon": 1e-6,
        "rotary_base": 1_000_000.0, "max_position_embeddings": 32768, "init_method_std": 0.02,
        "untie_embeddings_and_output_weights": False,
    }  # fmt: skip
    return ModelConfig(**{**settings, **other})


UNTIED = {"untie_embeddings_and_output_weights": True}
GLM = {"vocab_size": 151552, "max_position_embeddings": 4096}
PRESETS = (
    _preset("qwen1.5-104m", 512, 1408, 8, 8),
    _preset("qwen1.5-200m", 768, 2112, 12, 12),
    _preset("qwen1.5-300m", 768, 2112, 18, 12),
    _preset("qwen1.5-500m", 1024, 2816, 24, 16),
    _preset("qwen1.5-1.2b", 1536, 4224, 24, 16, **UNTIED),
    _preset("qwen1.5-0.5b", 1024, 2816, 24, 16),
    _preset("qwen1.5-1.8b", 2048, 5504, 24, 16, **UNTIED),
    _preset("qwen1.5-4b", 2560, 6912, 40, 20, rotary_base=5_000_000.0, **UNTIED),
    _preset("pd-330m", 1024, 4096, 12, 16, num_query_groups=2, **GLM),
    _preset("pd-670m", 1024, 4096, 24, 16, num_query_groups=2, **GLM, **UNTIED),
    _preset("pd-1.9b", 2048, 6912, 24, 16, num_query_groups=2, **GLM, **UNTIED),
    _preset("pd-3.8b", 3072, 8192, 28, 24, num_query_groups=8, **GLM, **UNTIED),
    _preset("pd-6.8b", 4096, 12800, 28, 32, num_query_groups=8, **GLM, **UNTIED),
)

QWEN = Dialect(
    name="qwen",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    always={"add_qkv_bias": True, "qk_layernorm": False},
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    fixed={"use_sliding_window": (False, None), "use_mrope": (False, None)},
    # Without effect while `use_sliding_window` is false. Null is written as well: some versions of
    # transformers 4 warn about any width, used or not.
    ignored=("sliding_window", "max_window_layers", "layer_types"),
    written={"use_sliding_window": False, "sliding_window": None},
)
FAMILIES.register(QWEN.name)(
    QWEN.family(
        gguf_architecture="qwen2",
        presets={preset.model: preset for preset in PRESETS},
    )
)
