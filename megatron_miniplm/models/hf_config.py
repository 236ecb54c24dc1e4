"""What every family asks of a config.json: no field is ignored unless it is known to be harmless.

A field that is silently ignored is a model that silently differs, so whatever is neither translated
by the family, nor fixed to the one value that is computed here, nor known not to matter is refused
by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from megatron_miniplm.core.errors import ConfigError

FIXED: Mapping[str, Sequence[Any]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, None),
    "hidden_dropout": (0.0, None),
    "resid_pdrop": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "auto_map": (None, {}),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
}
"""Fields that change the function computed, with the only values that this program honours."""

IGNORED = frozenset({
    "name_or_path", "attn_implementation", "transformers_version", "torch_dtype", "dtype",
    "use_cache", "use_bfloat16", "torchscript", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "unk_token_id", "decoder_start_token_id", "is_llama_config",
    "transformers.js_config", "pretraining_tp", "output_attentions", "output_hidden_states",
    "return_dict", "return_dict_in_generate", "chunk_size_feed_forward", "problem_type",
    "id2label", "label2id", "task_specific_params", "tokenizer_class", "prefix",
    "finetuning_task", "gradient_checkpointing", "tf_legacy_loss", "tie_encoder_decoder",
    "cross_attention_hidden_size", "max_length", "min_length", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
})  # fmt: skip
"""Fields about storage, generation, training or other tasks: no value of theirs changes logits."""

_PRIVATE = "_"
"""What names of transformers' own bookkeeping begin with (``_name_or_path``, ``_commit_hash``)."""


def check_fields(
    raw: Mapping[str, Any],
    family: str,
    *,
    model_type: str,
    fixed: Mapping[str, Sequence[Any]],
    known: Collection[str],
) -> None:
    """Refuse, by name and value, every field of config.json that cannot be honoured.

    `fixed` are the family's own additions to `FIXED`; `known` what it translates or ignores.
    """
    if raw.get("model_type", model_type) != model_type:
        raise ConfigError(f"config.json: model_type is {raw['model_type']!r}, not {model_type!r}")
    fixed = {**FIXED, **fixed}
    known = {"architectures", "model_type", *known, *fixed}
    for name, value in raw.items():
        if name in fixed and value not in fixed[name]:
            allowed = " or ".join(repr(item) for item in fixed[name] if item is not None)
            raise ConfigError(
                f"config.json: {name} = {value!r} is not supported by the {family} family"
                + (f"; it must be {allowed}" if allowed else "; it must be absent or null")
            )
        if name not in known and name not in IGNORED and not name.startswith(_PRIVATE):
            raise ConfigError(
                f"config.json: unknown field {name} = {value!r}; if it does not change what the "
                f"model computes, add it to the ignored fields of the {family} family"
            )


def check_value(name: str, value: Any) -> None:
    """Refuse values that no model can have, before they become a traceback elsewhere."""
    if isinstance(value, bool):
        usable = name == "untie_embeddings_and_output_weights"
    elif name in ("norm_epsilon", "init_method_std", "rotary_base", "rope_scaling_factor"):
        usable = isinstance(value, (int, float)) and 0 < value < float("inf")
    else:
        usable = isinstance(value, int) and value > 0
    if not usable:
        raise ConfigError(f"config.json: {value!r} is not a usable value for {name}")
