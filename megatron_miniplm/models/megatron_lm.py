"""Checkpoints that Megatron-LM wrote (``torch_dist``, a `GPTModel`): read as weights, for teachers.

Their tensors have the names of our own checkpoints, since both are megatron.core's; the shape comes
from the arguments that Megatron-LM saves with them. Without Transformer Engine, the two norms of a
layer may be stored under names of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_miniplm.core.errors import CheckpointError, ConfigError
from megatron_miniplm.core.manifest import hash_parts
from megatron_miniplm.models.checkpoint import LATEST
from megatron_miniplm.models.family import ModelConfig, all_families, get_family
from megatron_miniplm.models.global_tensors import GlobalTensors
from megatron_miniplm.models.mapping import Box, Shape
from megatron_miniplm.models.pretrained import ForeignSource, parameters_of

EMBEDDING = "embedding.word_embeddings.weight"
UNFUSED = {
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight":
        "decoder.layers.input_layernorm.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
}  # fmt: skip
TRAINING_STATE = ("optimizer.", "chained_")
"""How the names begin of tensors that are no weights."""

SHAPE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
    "max_position_embeddings", "rotary_base", "untie_embeddings_and_output_weights",
)  # fmt: skip
"""Arguments that are fields of `ModelConfig`, and that every Megatron-LM saves."""
NEWER = ("add_qkv_bias", "qk_layernorm", "use_rope_scaling", "rope_scaling_factor")
"""Likewise, of later versions: without them, the model has no such thing."""
EPSILON = ("norm_epsilon", "layernorm_epsilon")
"""Names that the norms' epsilon had."""

FIXED: Mapping[str, Sequence[Any]] = {
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope",),
}
"""What these families always are, and Megatron-LM only if asked."""
OFF: Mapping[str, Sequence[Any]] = {
    "rotary_percent": (1.0,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "apply_layernorm_1p": (False, None),
    "num_experts": (None, 0),
    "spec": (None,),
    "heterogeneous_layers_config_path": (None,),
}
"""Arguments that change the function computed, and are no fields of megatron.core's configuration
by that name, with the only values that this program honours; absent, they are off."""

HARMLESS = re.compile("|".join((
    "fp8.*", "fp4.*", ".*(kitchen|quant_recipe).*", ".*(_|^)bf16(_|$).*", ".*in_fp32", "fp32_.*",
    "apply_query_key_layer_scaling",  # divides by what the softmax multiplies with
    ".*init_method.*", "init_model_.*", ".*_dropout", "qk_clip.*",  # how weights came about
    "recompute_.*", ".*offload.*", "distribute_saved_activations", "activation_func_fp8_.*",
    ".*_fusion", "fused_.*", "use_fused_.*", "use_te_.*", "use_transformer_engine_.*",
    "transformer_impl", "attention_backend", "flash_.*", "persist_layer_norm",
    "memory_efficient_layer_norm", "batch_invariant_mode", "disable_.*", "mlp_chunks_.*",
    ".*cuda_graph.*", "inference_.*", "use_inference_.*", "symmetric_ar_type", "nccl_.*",
    "num_layers_(in|at)_.*", "account_for_.*", "pipeline_.*", "tp_.*", "cp_.*",
    "high_priority_.*", "clone_scatter_.*", ".*_dist_checkpoint",
    "log_.*", "config_logger_dir", "test_mode", "calculate_per_token_loss",
    "moe_.*", ".*grouped_gemm.*", "mtp_(?!num_layers).*", "dsa_.*", "linear_(?!attention_freq).*",
    ".*mamba_.*",  # details of what is off, or refused by other names
)))  # fmt: skip
"""Fields of megatron.core's configuration that change precision, training, speed or layout, beside
all those of `ModelParallelConfig`: a model with other values of theirs computes the same."""


def megatron_lm_checkpoint(path: Path) -> Path | None:
    """The newest iteration of a Megatron-LM run under `path`, or `path` if it is one; else None."""
    folder = Path(path)
    tracker = folder / LATEST
    if tracker.is_file():
        said = tracker.read_text().strip()
        folder /= f"iter_{int(said):07d}" if said.isdigit() else said
    ours = (folder / "manifest.json").exists()
    return folder if (folder / "metadata.json").is_file() and not ours else None


class MegatronLmCheckpoint(ForeignSource):
    """One iteration; its weights by global tensor (see `GlobalTensors`).

    Opening it refuses a model with tensors that its shape does not account for, and the reverse.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.token_ids = path, {}
        self._tensors = GlobalTensors(path)
        self.config = shape_of(_arguments(path), self._vocabulary(), str(path))
        self._check()

    def files(self) -> list[Path]:
        """See `ForeignSource.files`: all there are."""
        return sorted(path for path in self.path.iterdir() if path.is_file())

    def identify(self, hashes: Sequence[str]) -> str:
        """See `ForeignSource.identify`."""
        named = zip(self.files(), hashes, strict=True)
        return hash_parts(*(f"{file.name}:{hash_}" for file, hash_ in named))

    def shape(self, key: str, layer: int | None) -> Shape | None:
        """See `GlobalSource.shape`."""
        return self._tensors.shape(self._stored(key, layer), layer)

    def read(self, key: str, layer: int | None, box: Box, out: Tensor) -> None:
        """See `GlobalSource.read`."""
        self._tensors.read(self._stored(key, layer), layer, box, out)

    def _stored(self, key: str, layer: int | None) -> str:
        """The name that a parameter has here."""
        if key in UNFUSED and self._tensors.shape(key, layer) is None:
            return UNFUSED[key]
        return key

    def _vocabulary(self) -> int:
        shape = self._tensors.shape(EMBEDDING, None)
        if shape is None:
            raise CheckpointError(
                f"{self.path} has no {EMBEDDING}: it is not the checkpoint of a GPTModel"
            )
        return shape[0]

    def _check(self) -> None:
        family = get_family(self.config.model_family)
        known = set()
        for key, layer, shape in parameters_of(family, self.config):
            found = self.shape(key, layer)
            stored = self._stored(key, layer)
            layers = None if layer is None else self._tensors.layers(stored)
            if layers not in (None, self.config.num_layers):
                raise CheckpointError(
                    f"{self.path}: {stored} has {layers} layers, but its arguments ask for "
                    f"{self.config.num_layers}"
                )
            if found != shape:
                raise CheckpointError(
                    f"{self.path}: {key} (layer {layer}) has shape {found and list(found)}, but "
                    f"its arguments ask for {list(shape)}"
                )
            known |= {stored, stored.replace("decoder.layers.", f"decoder.layers.{layer}.")}
        weights = [key for key in self._tensors.names() if not key.startswith(TRAINING_STATE)]
        unknown = [key for key in weights if key not in known]
        if unknown:
            raise CheckpointError(
                f"{self.path}: a {family.name} model of its arguments has no {unknown[0]}"
            )


def _arguments(path: Path) -> Any:
    """Megatron-LM's saved arguments; unpickles, so the checkpoint must be trusted."""
    try:
        common = dist_checkpointing.load({}, str(path))
    except Exception as error:
        raise CheckpointError(f"{path} is not a usable checkpoint: {error}") from error
    if "args" not in common:
        raise CheckpointError(
            f"{path} has neither our manifest nor Megatron-LM's arguments, so the shape of its "
            "model is unknown"
        )
    return common["args"]


def shape_of(args: Any, vocab_size: int, source: str) -> ModelConfig:
    """The shape that Megatron-LM's arguments describe, in the first family that can say it.

    Refuses, by name and value, all that would make it another function.
    """
    epsilon = next((name for name in EPSILON if hasattr(args, name)), EPSILON[0])
    missing = [name for name in (*SHAPE, *FIXED, epsilon) if not hasattr(args, name)]
    if missing:
        raise CheckpointError(
            f"{source}: its arguments lack {', '.join(missing)}, so its model is unknown"
        )
    for name, allowed in {**FIXED, **OFF}.items():
        _require(name, getattr(args, name, allowed[0]), allowed, source)
    for name, default in _core_defaults().items():
        _require(name, getattr(args, name, default), (default,), source)
    values = {name: getattr(args, name) for name in (*SHAPE, *NEWER) if hasattr(args, name)}
    values.setdefault("add_qkv_bias", False)
    if getattr(args, "group_query_attention", False):
        values["num_query_groups"] = args.num_query_groups
    # The stored rows are Megatron's padding already.
    values |= {"vocab_size": vocab_size, "make_vocab_size_divisible_by": 1}
    shape = ModelConfig(norm_epsilon=getattr(args, epsilon), **values)
    for family in all_families():
        if family.architecture.position_embedding != "rope":
            continue  # a GPTModel has attention
        try:
            family.rules(shape)
        except ConfigError:
            continue
        return replace(shape, model_family=family.name)
    raise ConfigError(f"{source}: no model family has a model of its arguments: {shape}")


def _core_defaults() -> dict[str, Any]:
    """The fields of megatron.core's configuration that must have their default value."""
    known = {"num_query_groups", "gated_linear_unit", "activation_func"}  # the last two: swiglu
    known |= {*SHAPE, *NEWER, *EPSILON, *FIXED, *OFF}
    known |= {item.name for item in fields(ModelParallelConfig)}
    return {
        item.name: item.default
        for item in fields(TransformerConfig)
        if item.name not in known and not HARMLESS.fullmatch(item.name)
    }


def _require(name: str, value: Any, allowed: Sequence[Any], source: str) -> None:
    found = getattr(value, "name", value)  # of an enumeration
    if found in allowed or (not found and not any(allowed)):
        return
    raise ConfigError(
        f"{source}: it was trained with {name} = {value!r}, which is not supported; it must be "
        f"{allowed[0]!r}"
    )
