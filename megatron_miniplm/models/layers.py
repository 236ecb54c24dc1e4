"""What models of every architecture are made of beside their layers.

An RMSNorm that knows sequence parallelism, and a GPT whose last stage hands its hidden states to
the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megatron_miniplm.models.family import Reader
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.value_head import ValueHead
from megatron_miniplm.parallel.vocab import VocabShard


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the mark that makes Megatron reduce its gradient over TP under SP."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def block_spec(
    layer: Any, config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """As many of these layers as this stage (or chunk of it) has, and the norm after the last."""
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )


def run_hooks_of_calls(layer: torch.nn.Module) -> None:
    """Make a layer ready for use of its weights without calling it.

    megatron.core waits in such hooks for weights that are still being gathered
    (--overlap-param-gather): without them, a layer that is never called computes with old weights.
    """
    for hook in list(layer._forward_pre_hooks.values()):
        hook(layer, ())


class Decoder(GPTModel):
    """GPTModel whose last stage calls ``process(Head)`` instead of building logits.

    megatron.core 0.18+ has ``output_processor`` for this; overriding `_postprocess`, which core
    calls with keywords only, serves every supported version.
    """

    process: Callable[[Head], Any] | None = None
    make_head: Callable[[torch.Tensor, torch.Tensor, bool], Head]
    make_reader: Callable[[Decoder, int, int], Reader] | None
    """The architecture's (`family.Architecture`)."""
    shard: VocabShard
    """Of the output matrix, on every stage."""
    value_head: ValueHead | None
    """On the last stage of a model that gives a number for each instance."""
    reduction_waits: bool = False
    """Whether gradients are reduced as they become ready, so that every weight must get one."""

    def forward(
        self, *args: Any, process: Callable[[Head], Any] | None = None, **kwargs: Any
    ) -> Any:
        """Hidden states for the next stage, or on the last stage what `process` returns."""
        self.process = process
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.process = None

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not self.post_process or self.process is None:
            return super()._postprocess(
                hidden_states, input_ids, position_ids, labels, *args, **kwargs
            )
        run_hooks_of_calls(self.output_layer)
        return self.process(self.head(hidden_states))

    def head(self, hidden_sbh: torch.Tensor) -> Head:
        """The last stage's, of these final hidden states."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        announce = self.reduction_waits and not (tied and self.pre_process)
        head = self.make_head(hidden_sbh, weight, announce)
        return replace(head, value_head=self.value_head)
