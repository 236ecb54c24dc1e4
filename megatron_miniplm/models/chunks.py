"""This rank's part of a model: one decoder, or several where pipeline stages are interleaved.

With interleaving (Megatron's virtual pipeline), every rank holds several runs of layers, chunk 0 of
all ranks before chunk 1 of all ranks, so that the pipeline fills in a fraction of the time. Names
of parameters are global, so the number of chunks is a matter of layout like TP and PP: weights and
checkpoints fit any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_miniplm.core.errors import CheckpointError
from megatron_miniplm.models.layers import Decoder


class ModelChunks(torch.nn.ModuleList):
    """The decoders of this rank, in the order of their layers."""

    @property
    def config(self) -> TransformerConfig:
        """megatron.core's configuration, one for all chunks."""
        return self[0].config

    @property
    def decoders(self) -> list[Decoder]:
        """The chunks."""
        return list(self)  # type: ignore[arg-type]

    @property
    def stages(self) -> tuple[int, int | None]:
        """(pipeline ranks, chunks of each or None), as megatron.core's schedules ask for them."""
        config = self.config
        return config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size

    def sharded_state_dict(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters of this rank with their global name and place, by chunk."""
        # core writes into what it is given
        state = {
            str(at): chunk.sharded_state_dict(metadata=dict(metadata))
            for at, chunk in enumerate(self.decoders)
        }
        if self.config.fp8 is not None:
            return state
        # Scaling factors of FP8, which Transformer Engine's layers have without FP8, too.
        return {at: {k: v for k, v in part.items() if not _of_fp8(k)} for at, part in state.items()}

    def load_sharded(self, state: Mapping[str, Any]) -> None:
        """Set the parameters from a loaded `sharded_state_dict`."""
        for at, chunk in enumerate(self.decoders):
            found = chunk.load_state_dict(state[str(at)], strict=False)
            wrong = [
                key for key in (*found.missing_keys, *found.unexpected_keys) if not _of_fp8(key)
            ]
            if wrong:
                raise CheckpointError(f"parameters of checkpoint and model differ: {wrong[0]}")


def _of_fp8(key: str) -> bool:
    return key.endswith("_extra_state")
