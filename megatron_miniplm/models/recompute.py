"""Layers that keep only their input for the backward pass, and compute the rest again.

megatron.core's own recomputation saves random states of CUDA; these models draw no random numbers,
so torch's checkpoint of a layer is all that is needed, on any device and for any kind of layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch.utils.checkpoint import checkpoint

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.chunks import ModelChunks


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Memory of activations against a second forward pass (about a third more work)."""

    recompute_granularity: Literal["full"] | None = None
    """full: of whole layers; default: nothing is recomputed. Megatron's `selective` has nothing to
    win here: attention keeps no matrix of scores."""
    recompute_method: Literal["uniform", "block"] | None = None
    """uniform: every layer; block: the first --recompute-num-layers of each pipeline stage."""
    recompute_num_layers: int | None = None
    """With `block`: how many layers of each pipeline stage (of each chunk, if interleaved)."""

    def __post_init__(self) -> None:
        if self.recompute_granularity is None:
            if self.recompute_method or self.recompute_num_layers is not None:
                raise ConfigError(
                    "--recompute-method and --recompute-num-layers have no effect without "
                    "--recompute-granularity full"
                )
            return
        if self.recompute_method is None:
            raise ConfigError("--recompute-granularity full needs --recompute-method")
        wanted = self.recompute_num_layers
        if self.recompute_method == "uniform" and wanted is not None:
            raise ConfigError(
                f"--recompute-num-layers {wanted} with --recompute-method uniform is not "
                "supported: every layer keeps its own input; leave it out"
            )
        if self.recompute_method == "block" and (wanted is None or wanted < 1):
            raise ConfigError(
                f"--recompute-method block needs --recompute-num-layers of at least 1, not {wanted}"
            )


def recompute_layers(model: ModelChunks, config: RecomputeConfig) -> None:
    """Make the layers that the configuration names recompute (before the model is wrapped)."""
    if config.recompute_granularity is None:
        return
    for chunk in model.decoders:
        # None, with `uniform`, is all of them.
        for layer in chunk.decoder.layers[: config.recompute_num_layers]:
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
