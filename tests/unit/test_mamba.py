"""The Mamba family: initial weights, the paper's preset, and what its config.json may say."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.build import InitialWeights
from megatron_miniplm.models.family import ModelConfig, get_family
from megatron_miniplm.models.flops import count_parameters, forward_flops_per_token

FAMILY = get_family("mamba")
PRESET = FAMILY.presets["mamba-130m"]


def test_the_preset_has_the_parameters_of_the_released_student() -> None:
    assert count_parameters(PRESET) == 140_458_752  # 561.8 MB in fp32
    assert (PRESET.time_step_rank, PRESET.padded_vocab_size) == (48, 65024)


def test_most_of_the_cost_is_two_operations_a_parameter() -> None:
    assert forward_flops_per_token(PRESET, 1024) == pytest.approx(2 * 140_458_752, rel=0.03)
    assert forward_flops_per_token(PRESET, 64) == forward_flops_per_token(PRESET, 8192)


def test_initial_values_are_those_of_the_state_space_theory() -> None:
    draw = InitialWeights(PRESET, seed=1)
    layers = "decoder.layers.mixer."
    decay = draw(f"{layers}A_log", 3, (1536, 16)).exp()
    torch.testing.assert_close(decay, torch.arange(1, 17).float().expand(1536, 16))
    assert torch.equal(draw(f"{layers}D", 3, (1536,)), torch.ones(1536))
    step = torch.nn.functional.softplus(draw(f"{layers}dt_proj.bias", 3, (1536,)).double())
    assert step.min() == pytest.approx(0.001, rel=0.1)
    assert step.max() == pytest.approx(0.1, rel=0.1)
    assert step.log().mean() == pytest.approx((math.log(0.001) + math.log(0.1)) / 2, abs=0.1)
    for name, shape, bound in (
        ("dt_proj.weight", (1536, 48), 48**-0.5), ("conv1d.weight", (1536, 1, 4), 0.5),
        ("out_proj.weight", (768, 1536), 1536**-0.5),
    ):  # fmt: skip
        drawn = draw(layers + name, 3, shape)
        assert 0.99 * bound < drawn.abs().max() <= bound, name
    assert draw(f"{layers}in_proj.weight", 3, (3072, 768)).std() == pytest.approx(0.1, rel=0.01)
    assert not draw(f"{layers}conv1d.bias", 3, (1536,)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_bias": True}, "use_bias = True is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"intermediate_size": 7}, "intermediate_size = 7 is not expand x hidden_size = 1536"),
        ({"state_size": 0}, "0 is not a usable value for mamba_state_dim"),
        ({"window": 3}, "unknown field window = 3"),
    ],
)
def test_config_that_would_be_another_model_is_refused(change: dict, message: str) -> None:
    raw = FAMILY.config_to_hf(PRESET)
    with pytest.raises(ConfigError, match=message):
        FAMILY.config_from_hf(raw | change)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_attention_heads": 4}, "it has no attention; use --num-attention-heads 1"),
        ({"ffn_hidden_size": 100}, "must be a multiple of --hidden-size 96"),
        ({"add_qkv_bias": True}, "use --no-add-qkv-bias"),
        ({"rotary_base": 5.0}, "--rotary-base 5.0 has no effect on --model-family mamba"),
        ({"model_family": "llama", "mamba_state_dim": 8}, "has no effect on --model-family llama"),
    ],
)
def test_flags_that_mean_nothing_to_it_are_refused(flags: dict, message: str) -> None:
    shape = {"hidden_size": 96, "ffn_hidden_size": 192, "num_attention_heads": 1}
    usual = {"model_family": "mamba", "add_qkv_bias": False, **shape}
    config = ModelConfig(**{**usual, **flags})
    with pytest.raises(ConfigError, match=message):
        get_family(config.model_family).rules(config)
