"""Transformer Engine and FP8 are used where they are, and refused by name where they are not."""

from __future__ import annotations

import pytest
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.engine import EngineConfig, has_transformer_engine


@pytest.mark.skipif(has_transformer_engine(), reason="Transformer Engine is here")
class TestWithoutTransformerEngine:
    def test_layers_are_megatron_cores_own(self) -> None:
        assert EngineConfig().settings(torch.bfloat16) == {"transformer_impl": "local"}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"transformer_impl": "transformer_engine"}, "needs a GPU and Transformer Engine"),
            ({"fp8_format": "hybrid"}, "--fp8-format hybrid needs Transformer Engine"),
        ],
    )
    def test_what_needs_it_is_refused(self, settings: dict, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            EngineConfig(**settings)


def test_a_recipe_without_fp8_is_refused() -> None:
    with pytest.raises(ConfigError, match="--fp8-recipe mxfp8 has no effect without --fp8-format"):
        EngineConfig(fp8_recipe="mxfp8")
