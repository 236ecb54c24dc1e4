"""The Mistral family (7B 0.2 and 0.3, Nemo, Small): Llama's layers, heads of any width.

Attention is over the whole context, so a sliding window is accepted only where it is as wide as
that (Mistral-7B-v0.1 has one of 4,096 in a context of 32,768). llama.cpp writes these models as
``llama``, so their GGUF files are read by that family, which computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.dialect import Dialect
from megatron_miniplm.models.family import FAMILIES, ModelConfig

DEFAULT_WINDOW = 4096
"""What transformers takes where config.json is silent about ``sliding_window``."""


def refuse_narrow_window(raw: Mapping[str, Any], config: ModelConfig) -> None:
    """Refuse a sliding window that is smaller than the context."""
    window = raw.get("sliding_window", DEFAULT_WINDOW)
    wide = isinstance(window, int) and window >= config.max_position_embeddings
    if window is not None and not wide:
        raise ConfigError(
            f"config.json: sliding_window = {window!r} is not supported with "
            f"max_position_embeddings = {config.max_position_embeddings}; it must be null or not "
            "smaller. If all your instances are shorter than the window, set it to null"
        )


MISTRAL = Dialect(
    name="mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    always={"add_qkv_bias": False, "qk_layernorm": False},
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
    ignored=("sliding_window", "layer_types"),
    written={"sliding_window": None},
    check_fields=refuse_narrow_window,
)
FAMILIES.register(MISTRAL.name)(MISTRAL.family())
