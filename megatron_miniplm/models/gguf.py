"""Reading GGUF files, dequantised tensor by tensor (the package `gguf`, extra ``[hf]``).

A GGUF file is the same model in other words: its metadata becomes a config.json, which the family
reads and refuses as always, and its tensors get their Hugging Face names. Two things are undone:

* llama.cpp rotates neighbouring rows of a head, Hugging Face rows D/2 apart, so its converter
  reorders the rows of q and k of Llama-like models;
* Llama 3's frequency scaling is stored as one divisor a frequency (``rope_freqs.weight``).

The vocabulary is that of the embedding's rows; an ``output.weight`` makes the model untied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_miniplm.core.errors import CheckpointError, ConfigError
from megatron_miniplm.models.decoder import LLAMA3_SCALING, ROPE_THETA_DEFAULT
from megatron_miniplm.models.family import ModelFamily, all_families
from megatron_miniplm.models.hf_config import check_value
from megatron_miniplm.models.mapping import Box
from megatron_miniplm.models.pretrained import Pretrained
from megatron_miniplm.models.tensor_files import Stored

SHAPE_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
"""Metadata, after the name of the architecture -> config.json."""

CHECKED_KEYS = ("attention.value_length", "rope.dimension_count", "vocab_size", "rope.scaling.type")
IGNORED_KEYS = r"GGUF\..*|general\..*|tokenizer\..*|quantize\..*"
TOKEN_KEYS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}

MATRIX = 2
EMBEDDING = "token_embd.weight"
NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""``blk.N.NAME.weight`` -> ``model.layers.N.NAME.weight``."""
ROPE_FREQS = "rope_freqs.weight"


def is_gguf_file(path: Path) -> bool:
    """Whether `path` is a file of that format (by its first bytes)."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


class GgufFile(Pretrained):
    """A checked GGUF file; see `Pretrained`."""

    described_in = "metadata"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        reader = _open(self.path)
        self.fields = reader.fields
        stored = {tensor.name: tensor for tensor in reader.tensors}
        try:
            self.family = _family_of(self.metadata("general.architecture"))
            self.config = self.family.config_from_hf(self._config_json(stored))
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from error
        self.token_ids = {
            name: self.metadata(key) for name, key in TOKEN_KEYS.items() if key in self.fields
        }
        self.tensors = {
            _hf_name(name): self._stored(name, tensor)
            for name, tensor in stored.items()
            if name != ROPE_FREQS
        }
        self._check()

    def files(self) -> list[Path]:
        """See `ForeignSource.files`."""
        return [self.path]

    def metadata(self, name: str) -> Any:
        """Contents of a metadata field, None without one; a float32 as its shortest decimal."""
        field = self.fields.get(name)
        value = None if field is None else field.contents()
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _config_json(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata in the words of config.json; refuses keys that it does not know."""
        prefix = f"{self.family.gguf_architecture}."
        own = {
            name.removeprefix(prefix): self.metadata(name)
            for name in self.fields
            if not re.fullmatch(IGNORED_KEYS, name)
        }
        if own.pop("split.count", 1) not in (0, 1):
            raise ConfigError(
                "it is one of several parts (split.count): join them with llama.cpp's "
                "`gguf-split --merge`"
            )
        own = {name: value for name, value in own.items() if not name.startswith("split.")}
        unknown = set(own) - set(SHAPE_KEYS) - set(CHECKED_KEYS)
        if unknown:
            name = min(unknown)
            raise ConfigError(f"unknown metadata {name} = {own[name]!r}")
        raw = {hf: own[name] for name, hf in SHAPE_KEYS.items() if name in own}
        for name in ("num_attention_heads", "hidden_size"):
            check_value(name, raw.get(name))
        if EMBEDDING not in stored or len(stored[EMBEDDING].shape) != MATRIX:
            raise ConfigError(f"it has no matrix {EMBEDDING}")
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        raw.setdefault("num_key_value_heads", heads)
        raw.setdefault("head_dim", hidden // heads)
        raw.setdefault("sliding_window", None)
        raw["architectures"] = list(self.family.architectures)
        raw["vocab_size"] = int(stored[EMBEDDING].shape[1])
        raw["tie_word_embeddings"] = "output.weight" not in stored
        self._refuse_other_shapes(own, raw)
        if ROPE_FREQS in stored:
            divisors = np.asarray(stored[ROPE_FREQS].data, np.float64)
            raw["rope_scaling"] = _llama3_scaling(
                divisors, raw.get("rope_theta", ROPE_THETA_DEFAULT), raw["head_dim"]
            )
        return raw

    def _refuse_other_shapes(self, own: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
        """Metadata that must say what follows from the rest."""
        expected = {
            "attention.value_length": raw["head_dim"],
            "rope.dimension_count": raw["head_dim"],
            "vocab_size": raw["vocab_size"],
            "rope.scaling.type": "none",
        }
        for name, value in expected.items():
            if own.get(name, value) != value:
                raise ConfigError(f"{name} = {own[name]!r} is not supported; it must be {value!r}")

    def _stored(self, name: str, tensor: Any) -> Stored:
        heads = {"attn_q": self.config.num_attention_heads, "attn_k": self.config.query_groups}
        part = name.split(".")[-2] if name.count(".") > 1 else ""
        order = None
        if self.family.gguf_pairs_rows and part in heads:
            order = _rows_in_halves(heads[part], self.config.head_dim)
        return Stored(
            shape=tuple(int(size) for size in reversed(tensor.shape)),
            kind=tensor.tensor_type.name,
            readable=_can_dequantise(tensor),
            open=partial(_Dequantised, tensor, order),
        )


@dataclass(frozen=True)
class _Dequantised:
    """Parts of a tensor, dequantised when asked for; a row is some whole blocks of numbers."""

    tensor: Any
    order: np.ndarray | None

    def __getitem__(self, box: Box) -> Tensor:
        from gguf import dequantize

        rows, *columns = box
        index = rows if self.order is None else self.order[rows]
        data, kind = self.tensor.data, self.tensor.tensor_type
        if columns:
            values = dequantize(data[index], kind)
        else:
            values = dequantize(data, kind).reshape(-1)[index]
        return torch.from_numpy(np.array(values, np.float32))[:, *columns]


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError(
            f"{path} is a GGUF file: reading it takes the package gguf "
            "(pip install 'megatron-miniplm[hf]')"
        ) from error
    try:
        return GGUFReader(path)
    except Exception as error:  # the reader has no errors of its own
        raise CheckpointError(
            f"{path} is truncated or not a GGUF file ({error}); copy or download it again"
        ) from error


def _family_of(name: Any) -> ModelFamily:
    known = {one.gguf_architecture: one for one in all_families() if one.gguf_architecture}
    if name not in known:
        raise ConfigError(
            f"general.architecture is {name!r}; supported: {', '.join(sorted(known))}"
        )
    return known[name]


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; an unknown one keeps its own, and is refused by it."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in LAYER_NAMES:
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}"
    return NAMES.get(name, name)


def _rows_in_halves(heads: int, head_dim: int) -> np.ndarray:
    """int64[heads * D]: for each row of Hugging Face's tensor, the row of GGUF's."""
    pairs = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def _can_dequantise(tensor: Any) -> bool:
    from gguf import dequantize

    rows = tensor.data[:1] if tensor.data.ndim > 1 else tensor.data
    try:
        dequantize(rows, tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def _llama3_scaling(divisors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """``rope_scaling`` that gives these divisors of the frequencies; refuses others."""
    if (divisors == 1).all():
        return None
    factor = float(str(np.float32(divisors.max())))
    low, high, context = (
        LLAMA3_SCALING[name]
        for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    turns = context * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ConfigError(f"{ROPE_FREQS} is not Llama 3's scaling by any factor: not supported")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_SCALING}
