"""Transformer Engine and FP8 are used where they are, and refused by name where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.engine import EngineConfig, has_transformer_engine
from tests.runs import TINY, pretrain_flags


@pytest.mark.skipif(
    has_transformer_engine(has_gpus=torch.cuda.is_available()), reason="Transformer Engine is here"
)
class TestWithoutTransformerEngine:
    def test_layers_are_megatron_cores_own(self) -> None:
        assert EngineConfig().settings(torch.bfloat16) == {"transformer_impl": "local"}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"transformer_impl": "transformer_engine"}, "needs a GPU and Transformer Engine"),
            ({"fp8_format": "hybrid"}, "--fp8-format hybrid needs a GPU and Transformer Engine"),
        ],
    )
    def test_what_needs_it_is_refused_where_a_model_is_built(
        self, settings: dict, message: str
    ) -> None:
        asked = EngineConfig(**settings)
        with pytest.raises(ConfigError, match=message):
            asked.settings(torch.bfloat16)

    def test_a_rehearsal_refuses_it_for_this_machine_and_not_for_gpus_elsewhere(
        self, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fp8 = ["--bf16", "--fp8-format", "hybrid", "--dry-run"]
        words = [*pretrain_flags(corpus, tmp_path / "run", *TINY), *fp8]
        assert main(words) == 2
        assert "needs a GPU and Transformer Engine" in capsys.readouterr().err
        assert main([*words, "--dry-run-world-size", "2"]) == 0


def test_fp8_without_what_it_needs_beside_it_is_refused_anywhere() -> None:
    with pytest.raises(ConfigError, match="--transformer-impl local"):
        EngineConfig(fp8_format="e4m3", transformer_impl="local")
    with pytest.raises(ConfigError, match=r"--fp8-format e4m3 needs --bf16, not torch\.float32"):
        EngineConfig(fp8_format="e4m3").refuse_misfits(torch.float32, there=True)


def test_a_recipe_without_fp8_is_refused() -> None:
    with pytest.raises(ConfigError, match="--fp8-recipe mxfp8 has no effect without --fp8-format"):
        EngineConfig(fp8_recipe="mxfp8")
