"""GGUF files of tiny models, laid out as llama.cpp's converter does it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from megatron_miniplm.models.gguf import LAYER_NAMES, NAMES
from megatron_miniplm.models.hf_folder import HfFolder

QuantType = gguf.GGMLQuantizationType


def write_gguf(
    folder: HfFolder, path: Path, tokenizer: Path | None = None, *, quantise: bool = False, **change
) -> Path:
    """`folder` as a GGUF file; matrices in Q8_0 if asked (rows must be multiples of 32).

    `change` sets metadata (dots as two underscores; None removes).
    """
    config, name = folder.config, folder.family.gguf_architecture
    writer = gguf.GGUFWriter(path, name)
    fields: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.query_groups,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "rope.freq_base": config.rotary_base,
        "vocab_size": config.vocab_size,
    } | {key.replace("__", "."): value for key, value in change.items()}
    for key, value in fields.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        if isinstance(value, str):
            add = writer.add_string
        if value is not None:
            add(f"{name}.{key}", value)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer)
    layer_names = {hf: own for own, hf in LAYER_NAMES.items()}
    outer_names = {hf: own for own, hf in NAMES.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.query_groups}
    for hf, tensor in folder.items():
        values = tensor.float().numpy()
        own = outer_names.get(hf)
        if own is None:
            _, _, layer, *inner, kind = hf.split(".")
            part = layer_names[".".join(inner)]
            own = f"blk.{layer}.{part}.{kind}"
            if folder.family.gguf_pairs_rows and part in heads:
                values = permuted(values, heads[part])
        if quantise and values.ndim == 2:
            data = gguf.quantize(values, QuantType.Q8_0)
            writer.add_tensor(own, data, raw_dtype=QuantType.Q8_0)
        else:
            writer.add_tensor(own, np.ascontiguousarray(values))
    if config.use_rope_scaling:
        divisors = rope_divisors(config.rotary_base, config.head_dim, config.rope_scaling_factor)
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's ``LlamaModel.permute``."""
    shape = weights.shape
    return (
        weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    )


def rope_divisors(theta: float, head_dim: int, factor: float) -> Sequence[float]:
    """llama.cpp's ``generate_extra_tensors`` for Llama 3's scaling."""
    low, high, context = 1.0, 4.0, 8192
    divisors = []
    for at in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (at / head_dim)
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    """A byte-level BPE, its one special token marked as control."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(tokens.index("<|endoftext|>"))
