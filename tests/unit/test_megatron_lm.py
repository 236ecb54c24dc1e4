"""What Megatron-LM's saved arguments say about a model, and what is refused rather than ignored."""

from __future__ import annotations

import argparse
import enum
from typing import Any

import pytest

from megatron_miniplm.core.errors import CheckpointError, ConfigError
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.megatron_lm import shape_of

LLAMA = {
    "num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
    "group_query_attention": True, "num_query_groups": 2, "kv_channels": 8,
    "max_position_embeddings": 64, "rotary_base": 50000, "norm_epsilon": 1e-5,
    "untie_embeddings_and_output_weights": True, "add_bias_linear": False, "swiglu": True,
    "normalization": "RMSNorm", "position_embedding_type": "rope",
}  # fmt: skip
Backend = enum.Enum("Backend", ["auto", "flash"])
# What Megatron-LM 0.19 saves without being asked, where megatron.core has another default; and what
# runs usually set.
USUAL = {
    "use_cpu_initialization": None, "gradient_accumulation_fusion": True, "overlap_p2p_comm": True,
    "attention_softmax_in_fp32": False, "masked_softmax_fusion": True, "bias_dropout_fusion": True,
    "apply_rope_fusion": True, "cp_comm_type": ["p2p"], "cuda_graph_modules": [],
    "offload_modules": [], "bf16": True, "tensor_model_parallel_size": 8, "sequence_parallel": True,
    "recompute_granularity": "selective", "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "fp8": "hybrid", "init_method_std": 0.008, "attention_backend": Backend.flash,
    "mamba_state_dim": 128, "moe_router_topk": 4, "num_experts": None, "window_size": None,
    "fp32_residual_connection": True, "no_rope_freq": None, "softmax_type": "vanilla",
    "num_layers_at_start_in_bf16": 2, "transformer_impl": "local", "mtp_num_layers": None,
    "qk_l2_norm": False, "cross_entropy_fusion_impl": "te", "glu_linear_offset": None,
}  # fmt: skip


def shape(**change: Any) -> ModelConfig:
    given = {name: value for name, value in (LLAMA | change).items() if value is not ABSENT}
    return shape_of(argparse.Namespace(**given), 512, "iter_1")


ABSENT = object()


def test_arguments_about_precision_layout_and_training_change_nothing():
    assert shape(**USUAL) == shape()
    assert shape().model_family == "llama"
    assert shape(add_qkv_bias=True).model_family == "qwen"
    assert shape(qk_layernorm=True).model_family == "qwen3"


@pytest.mark.parametrize(
    "change",
    [
        {"no_rope_freq": 4}, {"softmax_type": "learnable"}, {"softmax_scale": 0.5},
        {"glu_linear_offset": 1.0}, {"activation_func_clamp_value": 7.0},
        {"window_size": (128, 0)}, {"window_attn_skip_freq": 4},
        {"apply_residual_connection_post_layernorm": True}, {"rotary_interleaved": True},
        {"layernorm_zero_centered_gamma": True}, {"qk_l2_norm": True}, {"mtp_num_layers": 1},
        {"attention_output_gate": True}, {"linear_attention_freq": 4}, {"num_experts": 8},
        {"multi_latent_attention": True}, {"rotary_percent": 0.5}, {"swiglu": False},
        {"normalization": "LayerNorm"}, {"spec": ["some.module", "layer"]},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_an_argument_that_changes_the_function_is_refused_by_name_and_value(change):
    ((name, value),) = change.items()
    with pytest.raises(ConfigError, match=f"trained with {name} = ") as error:
        shape(**change)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("name", ["rotary_base", "norm_epsilon", "num_layers", "swiglu"])
def test_an_argument_that_gives_the_shape_has_no_default(name):
    with pytest.raises(CheckpointError, match=f"its arguments lack {name}"):
        shape(**{name: ABSENT})


def test_the_epsilon_is_found_under_either_of_its_names():
    assert shape(norm_epsilon=ABSENT, layernorm_epsilon=3e-5).norm_epsilon == 3e-5
