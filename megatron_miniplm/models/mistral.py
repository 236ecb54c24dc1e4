"""The Mistral family (7B 0.2 and 0.3, Nemo, Small): Llama's layers, heads of any width.

Attention is over the whole context, so a sliding window is accepted only where it is as wide as
that (Mistral-7B-v0.1 has one of 4,096 in a context of 32,768). llama.cpp writes these models as
``llama``, so their GGUF files are read by that family, which computes the same.
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
    refuse_sliding_layers,
    require,
    write_config,
)
from megatron_miniplm.models.family import FAMILIES, ModelConfig, ModelFamily
from megatron_miniplm.models.mapping import Rule
from megatron_miniplm.models.transformer import TRANSFORMER

ARCHITECTURE, MODEL_TYPE = "MistralForCausalLM", "mistral"

DEFAULTS: Mapping[str, Any] = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
DEFAULT_WINDOW = 4096
"""What transformers takes where config.json is silent about ``sliding_window``."""


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """config.json -> shape; refuses narrow sliding windows and fields that it does not know."""
    refuse_sliding_layers(raw)
    config = read_config(
        raw, "mistral", model_type=MODEL_TYPE, defaults=DEFAULTS, fixed={},
        ignored=("sliding_window", "layer_types"), add_qkv_bias=False,
    )  # fmt: skip
    window = raw.get("sliding_window", DEFAULT_WINDOW)
    wide = isinstance(window, int) and window >= config.max_position_embeddings
    if window is not None and not wide:
        raise ConfigError(
            f"config.json: sliding_window = {window!r} is not supported with "
            f"max_position_embeddings = {config.max_position_embeddings}; it must be null or not "
            "smaller. If all your instances are shorter than the window, set it to null"
        )
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Shape -> config.json; refuses biases and q, k norms."""
    _check(config)
    return {
        **write_config(config, architecture=ARCHITECTURE, model_type=MODEL_TYPE),
        "sliding_window": None,
    }


def rules(config: ModelConfig) -> Sequence[Rule]:
    """Parameter table of that shape."""
    _check(config)
    return decoder_rules(config)


def _check(config: ModelConfig) -> None:
    require(config, add_qkv_bias=False, qk_layernorm=False)


MISTRAL = ModelFamily(
    name="mistral",
    architecture=TRANSFORMER,
    architectures=(ARCHITECTURE,),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    rules=rules,
    tied_copies=TIED_COPIES,
    ignored_tensors=IGNORED_TENSORS,
)
FAMILIES.register(MISTRAL.name)(MISTRAL)
