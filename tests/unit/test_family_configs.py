"""config.json both ways, what is refused by name, and the presets of the papers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_miniplm.core.config import parse_flags
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.family import (
    ModelConfig,
    all_families,
    family_of,
    get_family,
    preset_settings,
)
from megatron_miniplm.models.flops import count_parameters

ALL_PRESETS = [shape for family in all_families() for shape in family.presets.values()]

# Counts that the sizes and shapes of the released files give. Those of the students of Pre-training
# Distillation by the formula, by hand, with q, k, v biases:
# V d (1 or 2) + L (2 d q + 2 d k + q + 2 k + 3 d f + 2 d) + d.
COUNTS = {
    "qwen1.5-104m": 103_502_336,
    "qwen1.5-200m": 203_437_824,
    "qwen1.5-300m": 246_812_928,
    "qwen1.5-500m": 463_987_712,
    "qwen1.5-1.2b": 1_160_566_272,
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-4b": 3_950_369_280,
    "llama3.1-212m": 211_766_016,
    "mamba-130m": 140_458_752,
    "pd-330m": 334_536_704,
    "pd-670m": 669_072_384,
    "pd-1.9b": 1_866_627_072,
    "pd-3.8b": 3_750_026_240,
    "pd-6.8b": 6_820_343_808,
}

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 101, "rms_norm_eps": 1e-5,
}  # fmt: skip
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SHAPE} | {
    "num_key_value_heads": 2
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPE}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **SHAPE}
QWEN3 |= {"num_key_value_heads": 2}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **SHAPE}
MISTRAL |= {"num_key_value_heads": 2, "sliding_window": None}
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def read(raw: dict[str, Any]) -> ModelConfig:
    return family_of(raw).config_from_hf(raw)


def test_every_preset_has_the_published_number_of_parameters():
    assert {shape.model: count_parameters(shape) for shape in ALL_PRESETS} == COUNTS


def test_the_untied_300m_would_have_the_other_published_count():
    tied = get_family("qwen").presets["qwen1.5-300m"]
    untied = dataclasses.replace(tied, untie_embeddings_and_output_weights=True)
    assert count_parameters(untied) == 363_499_776


@pytest.mark.parametrize("shape", ALL_PRESETS, ids=lambda shape: shape.model)
def test_every_preset_survives_config_json(shape):
    raw = get_family(shape.model_family).config_to_hf(shape)
    assert dataclasses.replace(read(raw), model=shape.model) == shape


def test_head_width_and_groups_survive_config_json():
    shape = ModelConfig(
        num_attention_heads=6, num_query_groups=2, kv_channels=24, hidden_size=96, vocab_size=7
    )
    assert read(get_family("qwen").config_to_hf(shape)) == shape


# config.json of released models as their makers wrote it, and their published parameter counts.
RELEASED = {
    "Qwen1.5-0.5B": (463_987_712, {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 2816, "max_position_embeddings": 32768,
        "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 16,
        "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.37.0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    }),
    "Qwen2.5-0.5B": (494_032_768, {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    }),
    "SmolLM2-135M": (134_515_008, {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
        "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
        "vocab_size": 49152,
    }),
    "Llama-3.2-1B": (1_235_814_400, {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3,
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    }),
    "Llama-2-7b": (6_738_415_616, {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
    }),
    "Qwen1.5-1.8B": (1_836_828_672, {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 5504, "max_position_embeddings": 32768,
        "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 16,
        "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.37.0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    }),
    "Qwen2.5-7B": (7_615_616_512, {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584,
        "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 131072,
        "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064,
    }),
    "Qwen3-0.6B": (596_049_920, {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 151936,
    }),
    "Qwen3-8B": (8_190_735_360, {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
        "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 151936,
    }),
    "Meta-Llama-3-8B": (8_030_261_248, {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 8192,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0", "use_cache": True,
        "vocab_size": 128256,
    }),
    "SmolLM2-1.7B": (1_711_376_384, {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 8192,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 24, "num_key_value_heads": 32, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 130000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
        "use_cache": True, "vocab_size": 49152,
    }),
    "Mistral-7B-v0.3": (7_248_023_552, {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 32768,
    }),
    "Mistral-Nemo-Base-2407": (12_247_782_400, {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 128000,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 131072,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_are_read_with_their_published_size(name):
    count, raw = RELEASED[name]
    assert count_parameters(read(raw)) == count


def test_the_teacher_preset_is_the_released_teacher():
    preset = get_family("qwen").presets["qwen1.5-0.5b"]
    assert dataclasses.replace(read(RELEASED["Qwen1.5-0.5B"][1]), model=preset.model) == preset


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A command that builds a model."""

    shape: ModelConfig = field(default_factory=ModelConfig)
    """Model."""
    expand_flags: ClassVar[dict[str, Callable[[str], Any]]] = {"--model": preset_settings}


@pytest.mark.parametrize("name", COUNTS)
def test_model_flag_stands_for_the_whole_preset(name):
    presets = {shape.model: shape for shape in ALL_PRESETS}
    assert parse_flags(Flags, ["--model", name], prog="x").shape == presets[name]


def test_explicit_flags_win_over_the_preset_wherever_they_stand():
    words = ["--num-layers", "3", "--model", "qwen1.5-200m", "--vocab-size", "512"]
    shape = parse_flags(Flags, words, prog="x").shape
    assert (shape.num_layers, shape.vocab_size, shape.hidden_size) == (3, 512, 768)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"qwen1\.5-9000b.*llama3\.1-212m, mamba-130m, pd-1\.9b"):
        preset_settings("qwen1.5-9000b")


def test_both_spellings_of_rotary_settings_are_read_alike():
    old = read({**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3})
    new = read({**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    both = read(
        {
            **LLAMA,
            "rope_theta": 5e5,
            "rope_scaling": LLAMA3,
            "rope_parameters": {**LLAMA3, "rope_theta": 5e5},
        }
    )
    assert old == new == both
    assert (old.rotary_base, old.use_rope_scaling, old.rope_scaling_factor) == (5e5, True, 32.0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ],
)
def test_plain_rotary_settings_are_read_in_every_spelling(rope):
    shape = read({**QWEN, **rope})
    assert (shape.rotary_base, shape.use_rope_scaling) == (1e6, False)


def test_absent_fields_have_the_defaults_of_transformers():
    shape = read({name: value for name, value in LLAMA.items() if name != "rms_norm_eps"})
    assert (shape.norm_epsilon, shape.query_groups, shape.rotary_base) == (1e-6, 4, 10_000.0)
    assert shape.untie_embeddings_and_output_weights


def test_megatron_has_the_llama3_constants_that_are_accepted():
    """Refusing other constants is right only while megatron-core has these built in."""
    built_in = RotaryEmbedding(
        kv_channels=16, rotary_percent=1.0, rotary_base=500_000, rope_scaling=True,
        rope_scaling_factor=32.0, use_cpu_initialization=True,
    ).inv_freq  # fmt: skip
    expected = []
    for index in range(0, 16, 2):
        frequency = 500_000 ** (-index / 16)
        turns = LLAMA3["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        expected.append(blend * frequency + (1 - blend) * frequency / LLAMA3["factor"])
    torch.testing.assert_close(built_in, torch.tensor(expected), rtol=1e-5, atol=0)


REFUSED = [
    (QWEN, {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window = True"),
    (QWEN, {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    (QWEN, {"hidden_act": "gelu"}, "hidden_act = 'gelu'.*'silu'"),
    (QWEN, {"quantization_config": {"bits": 4}}, "quantization_config.*absent or null"),
    (QWEN, {"attention_dropout": 0.1}, r"attention_dropout = 0\.1"),
    (QWEN, {"surprise": 3}, "unknown field surprise = 3"),
    (QWEN, {"attention_bias": False}, "unknown field attention_bias"),
    (QWEN, {"model_type": "qwen3"}, "model_type is 'qwen3'"),
    (QWEN, {"hidden_size": "big"}, "'big' is not a usable value for hidden_size"),
    (QWEN, {"hidden_size": 0}, "0 is not a usable value for hidden_size"),
    (QWEN, {"num_attention_heads": "4", "head_dim": "8"}, "'4' is not a usable value"),
    (QWEN, {"tie_word_embeddings": 1}, "tie_word_embeddings = 1"),
    (QWEN, {"num_key_value_heads": 3}, "multiple of --num-query-groups 3"),
    (LLAMA, {"attention_bias": True}, "attention_bias = True"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias = True"),
    (LLAMA, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5"),
    (LLAMA, {"rope_interleaved": True}, "rope_interleaved = True"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'"),
    (LLAMA, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "type 'yarn'"),
    (
        LLAMA,
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 8.0}},
        r"high_freq_factor = 8\.0.*4\.0",
    ),
    (LLAMA, {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}}, "4096.*8192"),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor = None"),
    (LLAMA, {"rope_scaling": {**LLAMA3, "extra": 1}}, "unknown rotary setting extra = 1"),
    (LLAMA, {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is"),
    (LLAMA, {"architectures": ["GemmaForCausalLM"]}, "Gemma.*LlamaForCausalLM, Mamba"),
    (QWEN3, {"attention_bias": True}, "attention_bias = True"),
    (QWEN3, {"use_sliding_window": True}, "use_sliding_window = True"),
    (QWEN3, {"layer_types": ["sliding_attention"]}, "sliding_attention"),
    # Mistral-7B-v0.1 has this window in a context of 32,768; transformers' default is the same.
    (MISTRAL, {"sliding_window": 4096}, "sliding_window = 4096.*= 131072"),
    (MISTRAL, {"sliding_window": "wide"}, "sliding_window = 'wide'"),
    (MISTRAL, {"attention_bias": True}, "unknown field attention_bias"),
    (LLAMA, {"architectures": None}, "architectures is"),
]


@pytest.mark.parametrize(("base", "change", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(base, change, message):
    read(base)
    with pytest.raises(ConfigError, match=message):
        read({**base, **change})


def test_private_bookkeeping_of_transformers_is_ignored_whatever_its_name():
    private = {"_name_or_path": "x", "_model_name_or_path": "x", "_attn_implementation": "sdpa"}
    assert read({**LLAMA, **private, "_of_a_later_release": {"a": 1}}) == read(LLAMA)


def test_a_window_is_accepted_only_where_it_spans_the_context():
    silent = {name: value for name, value in MISTRAL.items() if name != "sliding_window"}
    for length, fits in ((4096, True), (4097, False)):
        raw = {**silent, "max_position_embeddings": length}
        if fits:
            assert read(raw) == read({**raw, "sliding_window": None})
        else:
            with pytest.raises(ConfigError, match="sliding_window = 4096"):
                read(raw)


def test_heads_of_qwen3_are_128_wide_where_the_config_is_silent():
    assert (read(QWEN3).head_dim, read(QWEN3).qk_layernorm) == (128, True)
    assert read({**QWEN3, "head_dim": 8}).head_dim == 8


def test_a_missing_shape_field_is_refused_by_name():
    raw = {name: value for name, value in QWEN.items() if name != "intermediate_size"}
    with pytest.raises(ConfigError, match="lacks intermediate_size"):
        read(raw)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("qwen", {"add_qkv_bias": False}, "--no-add-qkv-bias"),
        ("llama", {"add_qkv_bias": True}, "--add-qkv-bias"),
        ("llama", {"add_qkv_bias": False, "hidden_size": 100, "kv_channels": 8}, "multiple"),
        ("llama", {"add_qkv_bias": False, "qk_layernorm": True}, "--qk-layernorm"),
        ("mistral", {"add_qkv_bias": True}, "--add-qkv-bias"),
        ("qwen", {"qk_layernorm": True}, "--qk-layernorm.*use --no-qk-layernorm"),
        ("qwen3", {"add_qkv_bias": False}, "--no-qk-layernorm.*use --qk-layernorm"),
    ],
)
def test_a_shape_that_the_family_cannot_say_is_refused(family, settings, message):
    shape = ModelConfig(model_family=family, vocab_size=64, **settings)
    for translate in (get_family(family).config_to_hf, get_family(family).rules):
        with pytest.raises(ConfigError, match=message):
            translate(shape)


def test_a_shape_without_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="--vocab-size"):
        get_family("qwen").config_to_hf(ModelConfig())
