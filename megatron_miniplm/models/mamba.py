"""The Mamba-1 family (arXiv:2312.00752), a student without attention.

The preset is MiniPLM's cross-family student (arXiv 2410.17215): 130M, with the 65,024 tokens
of Falcon's tokenizer 140,458,752 parameters. Of the flags, --ffn-hidden-size is the inner width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.decoder import require
from megatron_miniplm.models.family import FAMILIES, ModelConfig, ModelFamily, refuse_unused
from megatron_miniplm.models.hf_config import check_fields, check_value
from megatron_miniplm.models.mamba_layer import MAMBA
from megatron_miniplm.models.mapping import Direct, Rule, Vocab

ARCHITECTURE, MODEL_TYPE = "MambaForCausalLM", "mamba"

FIXED: Mapping[str, Sequence[Any]] = {
    "use_bias": (False,),
    "use_conv_bias": (True,),
    "tie_word_embeddings": (True,),
    "rescale_prenorm_residual": (False, True),  # of initial weights only
}
DEFAULTS: Mapping[str, Any] = {
    "state_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.1,
    "time_step_rank": "auto",
}
IGNORED = (
    "residual_in_fp32", "use_mambapy", "use_associative_scan", "time_step_scale", "time_step_min",
    "time_step_max", "time_step_init_scheme", "time_step_floor", "intermediate_size", "d_inner",
    "d_model", "n_layer", "ssm_cfg", "rms_norm", "fused_add_norm", "pad_vocab_size_multiple",
    "num_layers", "layer_types",
)  # fmt: skip
"""Of initial weights and of other implementations; residuals are in the type that is computed in
(fp32 wherever parity with fp32 is asked for); `intermediate_size` is checked by itself."""
LONGEST = 1 << 20
"""Context that the family is declared for: nothing in it depends on the position."""


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """config.json -> shape; refuses biases of the projections, untied heads, unknown fields."""
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers")
    known = {*sizes, *DEFAULTS, *IGNORED}
    check_fields(raw, "mamba", model_type=MODEL_TYPE, fixed=FIXED, known=known)
    if missing := [name for name in sizes if name not in raw]:
        raise ConfigError(f"config.json lacks {', '.join(missing)}")
    values = {**DEFAULTS, **raw}
    check_value("hidden_size", values["hidden_size"])
    rank, usual = values["time_step_rank"], -(-values["hidden_size"] // 16)
    settings = {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "mamba_state_dim": values["state_size"],
        "mamba_conv_kernel": values["conv_kernel"],
        "norm_epsilon": values["layer_norm_epsilon"],
        "init_method_std": values["initializer_range"],
        **({} if rank in ("auto", usual) else {"mamba_time_step_rank": rank}),
    }
    for name, value in settings.items():
        check_value(name, value)
    check_value("expand", values["expand"])
    inner = values["expand"] * values["hidden_size"]
    if raw.get("intermediate_size", inner) != inner:
        raise ConfigError(
            f"config.json: intermediate_size = {raw['intermediate_size']!r} is not expand x "
            f"hidden_size = {inner}"
        )
    return ModelConfig(**settings, ffn_hidden_size=inner, **_ALWAYS)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Shape -> config.json; refuses shapes with what Mamba lacks."""
    _check(config)
    if config.vocab_size is None:
        raise ConfigError("the vocabulary size is not known yet: pass --vocab-size")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "state_size": config.mamba_state_dim,
        "conv_kernel": config.mamba_conv_kernel,
        "expand": config.ffn_hidden_size // config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "time_step_rank": config.time_step_rank,
        "layer_norm_epsilon": config.norm_epsilon,
        "initializer_range": config.init_method_std,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "rescale_prenorm_residual": False,
        "tie_word_embeddings": True,
    }


def rules(config: ModelConfig) -> Sequence[Rule]:
    """Parameter table of that shape."""
    _check(config)
    hidden, inner = config.hidden_size, config.ffn_hidden_size
    rank, states = config.time_step_rank, config.mamba_state_dim
    shapes = {
        "in_proj.weight": (2 * inner, hidden),
        "conv1d.weight": (inner, 1, config.mamba_conv_kernel),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * states, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "A_log": (inner, states),
        "D": (inner,),
        "out_proj.weight": (hidden, inner),
    }
    table = {
        "backbone.norm_f.weight": ("decoder.final_layernorm.weight", (hidden,)),
        "backbone.layers.{layer}.norm.weight": ("decoder.layers.norm.weight", (hidden,)),
        **{
            f"backbone.layers.{{layer}}.mixer.{name}": (f"decoder.layers.mixer.{name}", shape)
            for name, shape in shapes.items()
        },
    }
    embedding = Vocab(
        hf=["backbone.embeddings.weight"],
        megatron="embedding.word_embeddings.weight",
        hidden_size=hidden,
        vocab_size=config.vocab_size or config.padded_vocab_size,
        padded_vocab_size=config.padded_vocab_size,
    )
    others = [Direct(hf=[hf], megatron=key, shape=shape) for hf, (key, shape) in table.items()]
    return [embedding, *others]


_ALWAYS: Mapping[str, Any] = {
    "model_family": "mamba", "num_attention_heads": 1, "add_qkv_bias": False,
    "max_position_embeddings": LONGEST, "untie_embeddings_and_output_weights": False,
}  # fmt: skip


def _check(config: ModelConfig) -> None:
    require(config, add_qkv_bias=False, qk_layernorm=False, use_rope_scaling=False)
    require(config, untie_embeddings_and_output_weights=False)
    refuse_unused(config, ("rotary_base", "kv_channels"), "on --model-family mamba")
    if config.num_attention_heads != 1:
        raise ConfigError(
            f"--num-attention-heads {config.num_attention_heads} with --model-family mamba: it has "
            "no attention; use --num-attention-heads 1"
        )
    if config.ffn_hidden_size % config.hidden_size:
        raise ConfigError(
            f"--ffn-hidden-size {config.ffn_hidden_size}, Mamba's inner width, must be a multiple "
            f"of --hidden-size {config.hidden_size}"
        )


MAMBA_130M = ModelConfig(
    model="mamba-130m", hidden_size=768, ffn_hidden_size=1536, num_layers=24, vocab_size=65024,
    mamba_state_dim=16, mamba_conv_kernel=4, norm_epsilon=1e-5,
    init_method_std=0.1, **_ALWAYS,
)  # fmt: skip

FAMILY = ModelFamily(
    name="mamba",
    architecture=MAMBA,
    architectures=(ARCHITECTURE,),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    rules=rules,
    tied_copies={"lm_head.weight": "backbone.embeddings.weight"},
    presets={MAMBA_130M.model: MAMBA_130M},
)
FAMILIES.register(FAMILY.name)(FAMILY)
