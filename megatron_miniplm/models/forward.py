"""Forward passes without gradients, through the same pipeline schedule as training.

Scoring, validation and (later) teachers share it: each micro-batch's `Head` is handed to a
function on the last stage; the other stages get an empty list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_miniplm.data.instances import Batch
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.layers import Decoder

T = TypeVar("T")


@torch.no_grad()
def forward_only(
    model: ModelChunks, batches: Sequence[Batch], process: Callable[[Head, Batch], T]
) -> list[T]:
    """`process(head, batch)` of every micro-batch, in order, on the last stage; else [].

    All batches have one shape [b, s]: pipeline stages exchange hidden states of that shape.
    """
    if not batches:
        return []
    batch_size, length = batches[0].tokens_bs.shape
    stages, interleaved = model.stages
    # The interleaved schedule goes in rounds of as many micro-batches as there are ranks.
    filled = [*batches, *[batches[-1]] * (-len(batches) % stages if interleaved else 0)]
    was_training = model.training
    model.eval()
    results = get_forward_backward_func(stages, interleaved)(
        forward_step_func=partial(_step, process),
        data_iterator=[iter(filled) for _ in model],
        model=list(model),
        num_microbatches=len(filled),
        seq_length=length,
        micro_batch_size=batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    model.train(was_training)
    return list(results[: len(batches)])


def run_decoder(model: Any, batch: Batch, process: Callable[[Head], Any]) -> Any:
    """One micro-batch through this stage; `model` may be wrapped (DDP, Float16Module)."""
    batch_size, length = batch.tokens_bs.shape
    positions = torch.arange(length, device=batch.tokens_bs.device).expand(batch_size, -1)
    return model(batch.tokens_bs, positions, None, process=process)


def _step(
    process: Callable[[Head, Batch], Any], batches: Iterator[Batch], model: Decoder
) -> tuple[Any, Callable[..., Any]]:
    batch = next(batches)
    output = run_decoder(model, batch, lambda head: process(head, batch))
    return output, lambda out, non_loss_data=True: out
