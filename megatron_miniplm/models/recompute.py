"""Layers, or parts of them, that keep only their input and compute the rest again in the backward.

megatron.core's own recomputation saves random states of CUDA; these models draw no random numbers,
so torch's checkpoint is all that is needed, on any device and for any kind of layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.chunks import ModelChunks

_PATHS = {"core_attn": "self_attention.core_attention", "mlp": "mlp"}


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Memory of activations against doing a part of the forward pass twice."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """full: whole layers (about a third more work); selective: the --recompute-modules of every
    layer; default: nothing is recomputed."""
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = ()
    """With `selective`, default core_attn: attention without its projections (it keeps no matrix of
    scores in the first place, so that this saves little), or the whole MLP, which keeps most."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With `full`. uniform: every layer; block: the first --recompute-num-layers of each pipeline
    stage."""
    recompute_num_layers: int | None = None
    """With `block`: how many layers of each pipeline stage (of each chunk, if interleaved)."""

    def __post_init__(self) -> None:
        full = self.recompute_granularity == "full"
        if not full and (self.recompute_method or self.recompute_num_layers is not None):
            raise ConfigError(
                "--recompute-method and --recompute-num-layers have no effect without "
                "--recompute-granularity full"
            )
        if self.recompute_modules and self.recompute_granularity != "selective":
            raise ConfigError(
                f"--recompute-modules {' '.join(self.recompute_modules)} has no effect without "
                "--recompute-granularity selective"
            )
        if full:
            self._check_layers()

    def _check_layers(self) -> None:
        wanted = self.recompute_num_layers
        if self.recompute_method is None:
            raise ConfigError("--recompute-granularity full needs --recompute-method")
        if self.recompute_method == "uniform" and wanted not in (None, 1):
            raise ConfigError(
                f"--recompute-num-layers {wanted} with --recompute-method uniform is not "
                "supported: every layer keeps its own input; leave it out"
            )
        if self.recompute_method == "block" and (wanted is None or wanted < 1):
            raise ConfigError(
                f"--recompute-method block needs --recompute-num-layers of at least 1, not {wanted}"
            )


def recompute_layers(model: ModelChunks, config: RecomputeConfig) -> None:
    """Make what the configuration names recompute (before the model is wrapped)."""
    for module in _recomputed(model, config):
        module.forward = partial(
            checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
        )


def _recomputed(model: ModelChunks, config: RecomputeConfig) -> Iterator[torch.nn.Module]:
    if config.recompute_granularity is None:
        return
    first = config.recompute_num_layers if config.recompute_method == "block" else None
    for chunk in model.decoders:
        for layer in chunk.decoder.layers[:first]:
            if config.recompute_granularity == "full":
                yield layer
                continue
            for name in config.recompute_modules or ("core_attn",):
                try:
                    yield layer.get_submodule(_PATHS[name])
                except AttributeError:
                    raise ConfigError(
                        f"--recompute-granularity selective: layers of this model have no {name}; "
                        "use --recompute-granularity full"
                    ) from None
