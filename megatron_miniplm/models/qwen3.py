"""The Qwen3 family (dense): RMSNorm of every query and key head, no biases, heads of any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_miniplm.models.decoder import (
    IGNORED_TENSORS,
    TIED_COPIES,
    decoder_rules,
    read_config,
    refuse_sliding_layers,
    require,
    write_config,
)
from megatron_miniplm.models.family import FAMILIES, ModelConfig, ModelFamily
from megatron_miniplm.models.mapping import Rule
from megatron_miniplm.models.transformer import TRANSFORMER

ARCHITECTURE, MODEL_TYPE = "Qwen3ForCausalLM", "qwen3"

DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "head_dim": 128,
}
FIXED: Mapping[str, Sequence[Any]] = {
    "use_sliding_window": (False, None),
    "attention_bias": (False, None),
}
IGNORED = ("sliding_window", "max_window_layers", "layer_types")
"""Without effect while ``use_sliding_window`` is false; `layer_types` is checked by itself."""


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """config.json -> shape; refuses biases, sliding windows and fields that it does not know."""
    refuse_sliding_layers(raw)
    return read_config(
        raw, "qwen3", model_type=MODEL_TYPE, defaults=DEFAULTS, fixed=FIXED, ignored=IGNORED,
        add_qkv_bias=False, qk_layernorm=True,
    )  # fmt: skip


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Shape -> config.json; refuses a model with biases or without q, k norms."""
    _check(config)
    return {
        **write_config(config, architecture=ARCHITECTURE, model_type=MODEL_TYPE),
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def rules(config: ModelConfig) -> Sequence[Rule]:
    """Parameter table of that shape."""
    _check(config)
    return decoder_rules(config)


def _check(config: ModelConfig) -> None:
    require(config, add_qkv_bias=False, qk_layernorm=True)


QWEN3 = ModelFamily(
    name="qwen3",
    architecture=TRANSFORMER,
    architectures=(ARCHITECTURE,),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    rules=rules,
    tied_copies=TIED_COPIES,
    ignored_tensors=IGNORED_TENSORS,
    gguf_architecture="qwen3",
)
FAMILIES.register(QWEN3.name)(QWEN3)
