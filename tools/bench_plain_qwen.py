"""A Qwen2 in plain torch, as one writes it by hand: what a framework's overhead is measured from.

The same arithmetic as `transformers`' and the package's model, in the fewest operations that torch
has for it (its own RMSNorm, attention kernel and cross entropy), with the names of a Hugging Face
state dict. Parameters of a layer that read the same input stay separate matrices, as in
`transformers`.

Shapes: b sequences of s positions, h hidden width, V logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped keys."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, self.head_dim = config["hidden_size"], config["head_dim"]
        query = config["num_attention_heads"] * self.head_dim
        key = config["num_key_value_heads"] * self.head_dim
        self.q_proj, self.k_proj = nn.Linear(width, query), nn.Linear(width, key)
        self.v_proj, self.o_proj = nn.Linear(width, key), nn.Linear(query, width, bias=False)

    def forward(self, x_bsh: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The mixed values, [b, s, h]."""
        query, key, value = (
            project(x_bsh).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(
            _rotated(query, cos, sin), _rotated(key, cos, sin), value, is_causal=True,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Gated SiLU."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x_bsh: torch.Tensor) -> torch.Tensor:
        """[b, s, h]."""
        return self.down_proj(F.silu(self.gate_proj(x_bsh)) * self.up_proj(x_bsh))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn, self.mlp = Attention(config), Mlp(config)
        self.input_layernorm = nn.RMSNorm(width, eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)

    def forward(self, x_bsh: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[b, s, h]."""
        x_bsh = x_bsh + self.self_attn(self.input_layernorm(x_bsh), cos, sin)
        return x_bsh + self.mlp(self.post_attention_layernorm(x_bsh))


class PlainQwen(nn.Module):
    """The decoder with tied embeddings."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.head_dim = config["head_dim"]
        self.theta = (config.get("rope_parameters") or config)["rope_theta"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, tokens_bs: torch.Tensor) -> torch.Tensor:
        """Logits [b, s, V]."""
        cos, sin = self._angles(tokens_bs.shape[1])
        x_bsh = self.embed_tokens(tokens_bs)
        for layer in self.layers:
            x_bsh = layer(x_bsh, cos, sin)
        return F.linear(self.norm(x_bsh), self.embed_tokens.weight)

    def _angles(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        half = torch.arange(0, self.head_dim, 2) / self.head_dim
        angles = torch.outer(torch.arange(length), self.theta**-half)
        both = torch.cat([angles, angles], -1)
        return both.cos(), both.sin()

    @classmethod
    def load(cls, folder: Path) -> PlainQwen:
        """Of a Hugging Face folder (one safetensors file, tied embeddings)."""
        config = json.loads((folder / "config.json").read_text())
        assert config["tie_word_embeddings"], "untied embeddings are not written down here"
        model = cls(config)
        weights = load_file(folder / "model.safetensors")
        named = {name.removeprefix("model."): value for name, value in weights.items()}
        model.load_state_dict({n: v for n, v in named.items() if n != "lm_head.weight"})
        return model


def _rotated(x_bnsd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x_bnsd.chunk(2, -1)
    return x_bnsd * cos + torch.cat([-second, first], -1) * sin
