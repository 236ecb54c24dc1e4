"""What the Llama-shaped families share: reading config.json, parameter table, what is refused.

A family hands its defaults and its own fixed fields to `read_config`; everything that is neither
translated, nor fixed, nor known to be irrelevant is refused by name, because a field that is
silently ignored is a model that silently differs. Both spellings of the rotary settings are read:
transformers 4 (``rope_theta`` beside ``rope_scaling``) and 5 (both within ``rope_parameters``);
`write_config` writes the former, which both read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.family import ModelConfig, refuse_unused
from megatron_miniplm.models.hf_config import check_fields, check_value
from megatron_miniplm.models.mapping import Direct, Gated, Qkv, Rule, Vocab

SHAPE_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_method_std",
    "tie_word_embeddings": "untie_embeddings_and_output_weights",
}
"""config.json -> `ModelConfig` (the last one negated)."""

DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
"""What transformers assumes, for every family here, where config.json is silent."""

ROPE_THETA_DEFAULT = 10_000.0

LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The values that megatron-core's RotaryEmbedding has built in."""

TIED_COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
IGNORED_TENSORS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
"""Rotary frequencies, which old versions of transformers stored; they follow from the config."""


def read_config(
    raw: Mapping[str, Any],
    family: str,
    *,
    model_type: str,
    defaults: Mapping[str, Any],
    fixed: Mapping[str, Sequence[Any]],
    ignored: Sequence[str] = (),
    **settings: Any,
) -> ModelConfig:
    """config.json -> shape; refuses, by name and value, every field that it cannot honour.

    `defaults`, `fixed` and `ignored` are the family's own additions to the shared tables, and
    `settings` what is always so in this family (e.g. ``add_qkv_bias=True``).
    """
    rope = {"rope_theta", "rope_scaling", "rope_parameters"}
    check_fields(
        raw, family, model_type=model_type, fixed=fixed,
        known={"head_dim", *SHAPE_FIELDS, *rope, *ignored},
    )  # fmt: skip
    values = _shape_values(raw, {**DEFAULTS, **defaults})
    return ModelConfig(model_family=family, **values, **read_rope(raw), **settings)


def _shape_values(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The table SHAPE_FIELDS applied, with group count and head width in canonical form."""
    missing = [name for name in SHAPE_FIELDS if name not in raw and name not in defaults]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}")
    values = {ours: raw.get(name, defaults.get(name)) for name, ours in SHAPE_FIELDS.items()}
    if not isinstance(tied := values["untie_embeddings_and_output_weights"], bool):
        raise ConfigError(f"config.json: tie_word_embeddings = {tied!r} is not true or false")
    values["untie_embeddings_and_output_weights"] = not tied
    if values["num_query_groups"] is None:
        values["num_query_groups"] = values["num_attention_heads"]
    if (head_dim := raw.get("head_dim", defaults.get("head_dim"))) is not None:
        values["kv_channels"] = head_dim
    for name, value in values.items():
        check_value(name, value)
    if values.get("kv_channels", 0) * values["num_attention_heads"] == values["hidden_size"]:
        del values["kv_channels"]
    return values


def read_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings in either spelling; refuses kinds and constants that we cannot reproduce."""
    parameters, scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise ConfigError("config.json: rope_parameters and rope_scaling must be objects or null")
    scaling = {**parameters, **scaling}
    for name, value in parameters.items():
        if scaling[name] != value:
            raise ConfigError(
                f"config.json: rope_parameters has {name} = {value!r} but rope_scaling has "
                f"{scaling[name]!r}; remove the wrong one"
            )
    theta = raw.get("rope_theta")
    inner = scaling.pop("rope_theta", None)
    if theta is not None and inner is not None and theta != inner:
        raise ConfigError(
            f"config.json: rope_theta is {theta!r} but rope_parameters has {inner!r}; "
            "remove the wrong one"
        )
    theta = inner if theta is None else theta
    theta = ROPE_THETA_DEFAULT if theta is None else theta
    check_value("rotary_base", theta)
    return {"rotary_base": float(theta), **_read_scaling(scaling)}


def _read_scaling(scaling: dict[str, Any]) -> dict[str, Any]:
    kinds = {scaling.pop("rope_type", None), scaling.pop("type", None)} - {None}
    if len(kinds) > 1 or kinds - {"default", "llama3"}:
        raise ConfigError(
            f"config.json: rope_scaling of type {' / '.join(map(repr, sorted(kinds)))} is not "
            "supported; only null, 'default' and 'llama3' are"
        )
    if scaling.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ConfigError("config.json: partial_rotary_factor other than 1.0 is not supported")
    if kinds == {"llama3"}:
        factor = scaling.pop("factor", None)
        check_value("rope_scaling_factor", factor)
        for name, expected in LLAMA3_SCALING.items():
            value = scaling.pop(name, None)
            if value != expected:
                raise ConfigError(
                    f"config.json: rope_scaling has {name} = {value!r}; megatron-core's rotary "
                    f"embedding has {expected!r} built in, so this model cannot be reproduced"
                )
    if scaling:
        name, value = next(iter(scaling.items()))
        raise ConfigError(f"config.json: unknown rotary setting {name} = {value!r}")
    if kinds == {"llama3"}:
        return {"use_rope_scaling": True, "rope_scaling_factor": float(factor)}
    return {}


def refuse_sliding_layers(raw: Mapping[str, Any]) -> None:
    """Refuse a config.json whose ``layer_types`` has anything but full attention."""
    sliding = set(raw.get("layer_types") or ()) - {"full_attention"}
    if sliding:
        raise ConfigError(f"config.json: layer_types has {sorted(sliding)}, not supported")


def require(config: ModelConfig, **wanted: bool) -> None:
    """Refuse a shape with flags that its family's config.json cannot say."""
    for name, value in wanted.items():
        if getattr(config, name) != value:
            flag = name.replace("_", "-")
            given, right = (f"--{flag}", f"--no-{flag}")[:: -1 if value else 1]
            raise ConfigError(
                f"{given} with --model-family {config.model_family}: its models are always "
                f"{'with' if value else 'without'}; use {right}, or another family"
            )


def write_config(config: ModelConfig, *, architecture: str, model_type: str) -> dict[str, Any]:
    """Shape -> config.json, in the spelling that transformers 4 and 5 both read."""
    if config.vocab_size is None:
        raise ConfigError("the vocabulary size is not known yet: pass --vocab-size")
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    fields |= {name: getattr(config, ours) for name, ours in SHAPE_FIELDS.items()}
    fields["num_key_value_heads"] = config.query_groups
    fields["tie_word_embeddings"] = not config.untie_embeddings_and_output_weights
    fields["head_dim"] = config.head_dim
    fields["rope_theta"] = config.rotary_base
    fields["rope_scaling"] = None
    if config.use_rope_scaling:
        fields["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling_factor,
            **LLAMA3_SCALING,
        }
    return fields


def decoder_rules(config: ModelConfig) -> list[Rule]:
    """Parameter table of the Llama-shaped decoders; biases and q, k norms where there are any."""
    unused = ("mamba_state_dim", "mamba_conv_kernel", "mamba_time_step_rank")
    refuse_unused(config, unused, f"on --model-family {config.model_family}")
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    attention, layers = "model.layers.{layer}.self_attn.", "decoder.layers."
    projections = [f"{attention}{name}_proj" for name in "qkv"]

    def qkv(kind: str, columns: tuple[int, ...]) -> Rule:
        return Qkv(
            hf=[f"{name}.{kind}" for name in projections],
            megatron=f"{layers}self_attention.linear_qkv.{kind}",
            heads=config.num_attention_heads,
            groups=config.query_groups,
            head_dim=config.head_dim,
            columns=columns,
        )

    def direct(hf: str, megatron: str, *shape: int) -> Rule:
        return Direct(hf=[f"model.{hf}"], megatron=f"decoder.{megatron}", shape=shape)

    def qk_norm(part: str) -> Rule:
        attention = f"layers.self_attention.{part}_layernorm.weight"
        return direct(f"layers.{{layer}}.self_attn.{part}_norm.weight", attention, config.head_dim)

    def vocab(hf: str, megatron: str) -> Rule:
        padded = config.padded_vocab_size
        rows = config.vocab_size or padded
        return Vocab(
            hf=[hf], megatron=megatron, hidden_size=hidden, vocab_size=rows,
            padded_vocab_size=padded,
        )  # fmt: skip

    mlp = "model.layers.{layer}.mlp."
    rules = [
        vocab("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
        # The two norms of a layer are saved under the linear layer that follows them, with or
        # without Transformer Engine's fusion of the two.
        direct(
            "layers.{layer}.input_layernorm.weight",
            "layers.self_attention.linear_qkv.layer_norm_weight", hidden,
        ),
        qkv("weight", (hidden,)),
        *([qkv("bias", ())] if config.add_qkv_bias else []),
        *([qk_norm("q"), qk_norm("k")] if config.qk_layernorm else []),
        direct(
            "layers.{layer}.self_attn.o_proj.weight", "layers.self_attention.linear_proj.weight",
            hidden, config.num_attention_heads * config.head_dim,
        ),
        direct(
            "layers.{layer}.post_attention_layernorm.weight",
            "layers.mlp.linear_fc1.layer_norm_weight", hidden,
        ),
        Gated(
            hf=[f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"],
            megatron=f"{layers}mlp.linear_fc1.weight", shape=(ffn, hidden),
        ),
        direct("layers.{layer}.mlp.down_proj.weight", "layers.mlp.linear_fc2.weight", hidden, ffn),
        direct("norm.weight", "final_layernorm.weight", hidden),
    ]  # fmt: skip
    if config.untie_embeddings_and_output_weights:
        rules.append(vocab("lm_head.weight", "output_layer.weight"))
    return rules
