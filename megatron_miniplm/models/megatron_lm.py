"""Checkpoints that Megatron-LM wrote (``torch_dist``, a `GPTModel`): read as weights, for teachers.

Their tensors have the names of our own checkpoints, since both are megatron.core's; the shape comes
from the arguments that Megatron-LM saves with them. Without Transformer Engine, the two norms of a
layer may be stored under names of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_miniplm.core.errors import CheckpointError, ConfigError
from megatron_miniplm.core.manifest import hash_file, hash_parts
from megatron_miniplm.models.checkpoint import LATEST
from megatron_miniplm.models.family import ModelConfig, get_family
from megatron_miniplm.models.global_tensors import GlobalSource, GlobalTensors
from megatron_miniplm.models.mapping import Box, Shape
from megatron_miniplm.models.pretrained import parameters_of

EMBEDDING = "embedding.word_embeddings.weight"
UNFUSED = {
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight":
        "decoder.layers.input_layernorm.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
}  # fmt: skip
TRAINING_STATE = ("optimizer.", "chained_")
"""How the names begin of tensors that are no weights."""

GPT_FAMILIES = ("llama", "mistral", "qwen", "qwen3")
"""Those that a GPTModel can be, in the order in which they are tried."""

NOT_ARGUMENTS = (
    "model", "model_family", "vocab_size", "num_query_groups", "swiglu",
    "mamba_state_dim", "mamba_conv_kernel", "mamba_time_step_rank",
)  # fmt: skip
FIXED: Mapping[str, Sequence[Any]] = {
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False, None),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "apply_layernorm_1p": (False, None),
    "num_experts": (None, 0),
    "multi_latent_attention": (False, None),
    "qk_l2_norm": (False, None),
    "window_size": (None,),
    "mtp_num_layers": (None, 0),
}
"""Arguments that change the function computed, with the only values that this program honours."""


def megatron_lm_checkpoint(path: Path) -> Path | None:
    """The newest iteration of a Megatron-LM run under `path`, or `path` if it is one; else None."""
    folder = Path(path)
    tracker = folder / LATEST
    if tracker.is_file():
        said = tracker.read_text().strip()
        folder /= f"iter_{int(said):07d}" if said.isdigit() else said
    ours = (folder / "manifest.json").exists()
    return folder if (folder / "metadata.json").is_file() and not ours else None


class MegatronLmCheckpoint(GlobalSource):
    """One iteration; its weights by global tensor (see `GlobalTensors`).

    Opening it refuses a model with tensors that its shape does not account for, and the reverse.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = GlobalTensors(path)
        self.config = _shape_of(_arguments(path), self._vocabulary(), str(path))
        self._check()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all files (reads them once)."""
        files = sorted(path for path in self.path.iterdir() if path.is_file())
        return hash_parts(*(f"{file.name}:{hash_file(file)}" for file in files))

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


def _shape_of(args: Any, vocab_size: int, source: str) -> ModelConfig:
    """The shape that Megatron-LM's arguments describe, in the first family that can say it."""
    for name, allowed in FIXED.items():
        value = getattr(args, name, allowed[0])
        if getattr(value, "name", value) not in allowed:
            raise ConfigError(
                f"{source}: it was trained with {name} = {value!r}, which is not supported; it "
                f"must be {allowed[0]!r}"
            )
    names = [item.name for item in fields(ModelConfig) if item.name not in NOT_ARGUMENTS]
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if getattr(args, "group_query_attention", False):
        values["num_query_groups"] = args.num_query_groups
    # The stored rows are Megatron's padding already.
    values |= {"vocab_size": vocab_size, "make_vocab_size_divisible_by": 1}
    values.setdefault("add_qkv_bias", False)
    shape = ModelConfig(**values)
    for name in GPT_FAMILIES:
        try:
            get_family(name).rules(shape)
        except ConfigError:
            continue
        return replace(shape, model_family=name)
    raise ConfigError(f"{source}: no model family has a model of its arguments: {shape}")
