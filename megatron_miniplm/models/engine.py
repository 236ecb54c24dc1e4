"""What layers are built of: megatron.core's own modules, or Transformer Engine's, also in FP8.

Both have the same parameters under the same global names, so weights and checkpoints fit either.
Transformer Engine needs a GPU; nothing of it has run yet where this was written (tests/gpu has the
comparison).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_miniplm.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Implementation of the layers, and FP8."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Modules that layers are built of; auto: Transformer Engine's where it is installed and there
    is a GPU, else megatron.core's own."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Matrix products of the layers in FP8 (hybrid: gradients in e5m2); needs --bf16 and
    Transformer Engine."""
    fp8_recipe: Literal["delayed", "tensorwise", "mxfp8", "blockwise"] = "delayed"
    """How FP8 values are scaled; mxfp8 and blockwise depend on the GPU."""

    def __post_init__(self) -> None:
        if self.transformer_impl == "transformer_engine" and not has_transformer_engine():
            raise ConfigError(
                "--transformer-impl transformer_engine needs a GPU and Transformer Engine: "
                "pip install 'megatron-miniplm[te]', or leave the flag out"
            )
        if self.fp8_format is None and self.fp8_recipe != "delayed":
            raise ConfigError(f"--fp8-recipe {self.fp8_recipe} has no effect without --fp8-format")
        if self.fp8_format is not None and not self.uses_transformer_engine:
            raise ConfigError(
                f"--fp8-format {self.fp8_format} needs Transformer Engine, on a GPU, but layers "
                f"are built of megatron.core's own modules (--transformer-impl "
                f"{self.transformer_impl})"
            )

    @property
    def uses_transformer_engine(self) -> bool:
        """What `transformer_impl` comes to here."""
        if self.transformer_impl == "auto":
            return has_transformer_engine()
        return self.transformer_impl == "transformer_engine"

    def settings(self, dtype: torch.dtype) -> Mapping[str, Any]:
        """The same in megatron.core's configuration; refuses FP8 beside another dtype than bf16."""
        impl = "transformer_engine" if self.uses_transformer_engine else "local"
        if self.fp8_format is None:
            return {"transformer_impl": impl}
        if dtype != torch.bfloat16:
            raise ConfigError(f"--fp8-format {self.fp8_format} needs --bf16, not {dtype}")
        return {"transformer_impl": impl, "fp8": self.fp8_format, "fp8_recipe": self.fp8_recipe}


@functools.cache
def has_transformer_engine() -> bool:
    """Whether there is a GPU, and megatron.core found a Transformer Engine that it can use."""
    if not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None:
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


DEFAULT_ENGINE = EngineConfig()
