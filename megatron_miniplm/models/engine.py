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
        # Nothing here looks at the machine: flags are also parsed where no model is built.
        if self.fp8_format is None and self.fp8_recipe != "delayed":
            raise ConfigError(f"--fp8-recipe {self.fp8_recipe} has no effect without --fp8-format")
        if self.fp8_format is not None and self.transformer_impl == "local":
            raise ConfigError(
                f"--fp8-format {self.fp8_format} needs Transformer Engine, but layers are built of "
                "megatron.core's own modules (--transformer-impl local): leave one out"
            )

    def refuse_misfits(self, dtype: torch.dtype, *, there: bool) -> None:
        """Refuse FP8 beside another dtype than bf16, and what is not `there`: a GPU with TE."""
        fp8 = f"--fp8-format {self.fp8_format}"
        if self.fp8_format is not None and dtype != torch.bfloat16:
            raise ConfigError(f"{fp8} needs --bf16, not {dtype}")
        asked = self.fp8_format is not None or self.transformer_impl == "transformer_engine"
        if asked and not there:
            flag = f"--transformer-impl {self.transformer_impl}" if self.fp8_format is None else fp8
            raise ConfigError(
                f"{flag} needs a GPU and Transformer Engine: pip install 'megatron-miniplm[te]', "
                "or leave the flag out"
            )

    def settings(self, dtype: torch.dtype) -> Mapping[str, Any]:
        """The same in megatron.core's configuration, on this machine; refuses misfits."""
        there = has_transformer_engine(has_gpus=torch.cuda.is_available())
        self.refuse_misfits(dtype, there=there)
        local = self.transformer_impl == "local" or not there
        impl = {"transformer_impl": "local" if local else "transformer_engine"}
        if self.fp8_format is None:
            return impl
        return {**impl, "fp8": self.fp8_format, "fp8_recipe": self.fp8_recipe}


def has_transformer_engine(*, has_gpus: bool) -> bool:
    """Whether there is a GPU, and megatron.core found a Transformer Engine that it can use."""
    return has_gpus and _is_installed()


@functools.cache
def _is_installed() -> bool:
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


DEFAULT_ENGINE = EngineConfig()
