"""What a model is (`ModelConfig`) and what a family knows about Hugging Face (`ModelFamily`).

A family is a table: which architectures it claims, how its configuration translates both ways,
which parameter rules (`mapping`) connect the two state dicts, and its named shapes. Adding a
family is adding one file that fills in this table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

from megatron_miniplm import models as room
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.registry import Registry
from megatron_miniplm.models.mapping import Rule


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder; --model NAME sets all of these, explicit flags win."""

    model: str = ""
    """Named shape, e.g. qwen1.5-200m; empty: the flags below say it all."""
    model_family: str = "qwen"
    """Family that defines the Hugging Face form of this model."""
    num_layers: int = 8
    """Transformer layers."""
    hidden_size: int = 512
    """Width of the residual stream."""
    ffn_hidden_size: int = 1408
    """Width of the gated MLP."""
    num_attention_heads: int = 8
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (GQA); default: as many as query heads."""
    kv_channels: int | None = None
    """Width of one head; default: hidden size / heads."""
    vocab_size: int | None = None
    """Logit columns before padding; default: the tokenizer's size."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this; never a function of TP."""
    max_position_embeddings: int = 32768
    """Longest context the model is declared for."""
    rotary_base: float = 1_000_000.0
    """RoPE theta."""
    use_rope_scaling: bool = False
    """Llama 3.1's frequency scaling (original context 8192)."""
    rope_scaling_factor: float = 8.0
    """Factor of --use-rope-scaling."""
    norm_epsilon: float = 1e-6
    """RMSNorm epsilon."""
    add_qkv_bias: bool = True
    """Bias on the q, k, v projections."""
    qk_layernorm: bool = False
    """RMSNorm of every query and key head, as in Qwen3."""
    mamba_state_dim: int = 16
    """Mamba: states of a channel; its channels are --ffn-hidden-size."""
    mamba_conv_kernel: int = 4
    """Mamba: tokens that the convolution sees."""
    mamba_time_step_rank: int | None = None
    """Mamba: width that step sizes are projected from; default: hidden size / 16, rounded up."""
    untie_embeddings_and_output_weights: bool = False
    """Separate output matrix."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights (no depth scaling, as in the paper)."""
    swiglu: bool = True
    """Gated SiLU MLP; the only one these families have."""
    normalization: Literal["RMSNorm"] = "RMSNorm"
    """Normalization; the only one these families have."""

    def __post_init__(self) -> None:
        if not self.use_rope_scaling:
            refuse_unused(self, ("rope_scaling_factor",), "without --use-rope-scaling")
        if not self.swiglu:
            raise ConfigError("--no-swiglu: every supported family has a gated SiLU MLP")
        if self.num_attention_heads % self.query_groups:
            raise ConfigError(
                f"--num-attention-heads {self.num_attention_heads} must be a multiple of "
                f"--num-query-groups {self.query_groups}"
            )
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"--hidden-size {self.hidden_size} must be a multiple of --num-attention-heads "
                f"{self.num_attention_heads}, or give --kv-channels"
            )

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def time_step_rank(self) -> int:
        """Width that Mamba's step sizes are projected from."""
        return self.mamba_time_step_rank or -(-self.hidden_size // 16)

    @property
    def padded_vocab_size(self) -> int:
        """Columns of the logits as stored: `vocab_size` rounded up to the fixed multiple."""
        if self.vocab_size is None:
            raise ConfigError("the vocabulary size is not known yet: pass --vocab-size")
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple


def refuse_unused(config: ModelConfig, names: Sequence[str], where: str) -> None:
    """Refuse flags that say something to nobody."""
    for name in names:
        value, usual = getattr(config, name), ModelConfig.__dataclass_fields__[name].default
        if value != usual:
            raise ConfigError(f"--{name.replace('_', '-')} {value} has no effect {where}")


class Reader(Protocol):
    """A model that remembers what it read, for generation."""

    def __call__(self, tokens_ns: torch.Tensor) -> torch.Tensor:
        """Read the next tokens of the first n rows; [n, V] logits of what follows, on every rank.

        The first call may have any s, every later one has s = 1.
        """
        ...

    def move(self, old: np.ndarray, new: np.ndarray) -> None:
        """Put what is remembered of rows `old` where rows `new` were."""
        ...


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a layer is, to those who build models, divide, count, start and generate with them."""

    layer: Callable[[ModelConfig, Any], Any]
    """(shape, megatron.core's configuration) -> megatron.core's specification of a layer."""
    settings: Callable[[ModelConfig, int], Mapping[str, Any]]
    """(shape, TP ranks) -> the fields of megatron.core's configuration that are its own."""
    position_embedding: Literal["rope", "none"]
    divided: Callable[[ModelConfig], Mapping[str, int]]
    """What tensor parallelism divides: name, as a message says it -> size."""
    multiplications: Callable[[ModelConfig, int], int]
    """(shape, tokens of a sequence) -> multiply-adds of one layer's forward pass, per token."""
    initial: Callable[[ModelConfig, str, tuple[int, ...], torch.Generator], torch.Tensor | None]
    """(shape, parameter, its shape, random numbers) -> initial values; None: as all others."""
    reader: Callable[[Any, int, int], Reader] | None = None
    """(decoder, rows, tokens of a row) -> what generates with it; None: it is refused."""


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """All that is known about one family; see `qwen` for the first one."""

    name: str
    architecture: Architecture
    """What its layers are."""
    architectures: Sequence[str]
    """Values of ``architectures`` in config.json that this family claims."""
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    """config.json -> shape; refuses, by name, fields whose value it cannot honour."""
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    """Shape -> config.json (without tokenizer ids)."""
    rules: Callable[[ModelConfig], Sequence[Rule]]
    """Parameter rules of a model of that shape."""
    presets: Mapping[str, ModelConfig] = field(default_factory=dict)
    """Named shapes of the papers."""
    tied_copies: Mapping[str, str] = field(default_factory=dict)
    """Tensor that some writers store beside its tied twin -> the twin; must be equal to it."""
    ignored_tensors: str = r"(?!)"
    """Pattern of tensor names that hold nothing learned (default: none)."""
    gguf_architecture: str = ""
    """``general.architecture`` of this family's GGUF files; empty: they are not read."""
    gguf_pairs_rows: bool = False
    """Whether GGUF has rows i and i + D/2 of each q and k head side by side (llama.cpp's RoPE)."""


FAMILIES: Registry[ModelFamily] = Registry("model family")


def all_families() -> list[ModelFamily]:
    """Every registered family, by name."""
    Registry.discover(room)
    return [FAMILIES[name] for name in FAMILIES.names()]


def get_family(name: str) -> ModelFamily:
    """The family of that name; an unknown name is refused with the known ones."""
    Registry.discover(room)
    return FAMILIES[name]


def family_of(raw: Mapping[str, Any]) -> ModelFamily:
    """The family that claims a config.json; refuses architectures that none claims."""
    known = {kind: family for family in all_families() for kind in family.architectures}
    claimed = raw.get("architectures") or []
    if len(claimed) != 1 or claimed[0] not in known:
        raise ConfigError(
            f"config.json: architectures is {claimed!r}; supported: {', '.join(sorted(known))}"
        )
    return known[claimed[0]]


def preset_settings(name: str) -> Mapping[str, Any]:
    """Flat settings that ``--model NAME`` stands for (every shape field that the preset sets)."""
    presets = {key: shape for family in all_families() for key, shape in family.presets.items()}
    if name not in presets:
        raise ConfigError(f"--model {name!r} is unknown; known: {', '.join(sorted(presets))}")
    settings = asdict(presets[name])
    return {key: value for key, value in settings.items() if key != "model" and value is not None}
