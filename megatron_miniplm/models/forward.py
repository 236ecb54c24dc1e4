"""Forward passes without gradients, through the same pipeline schedule as training.

Scoring, validation and teachers share it: each micro-batch's `Head` is handed to a function on the
last stage; the other stages get an empty list. What is said of rows of a corpus (`forward_rows`)
does not depend on the rank that says it: micro-batches are cut by rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import PADDING_ROW, Batch, make_batch
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.layers import Decoder
from megatron_miniplm.parallel import platform

T = TypeVar("T")
_LENGTH_MULTIPLE = 64


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


def forward_rows(
    model: ModelChunks,
    corpus: Corpus,
    rows: np.ndarray,
    process: Callable[[Head, Batch], Sequence[T]],
    *,
    micro_batch_size: int,
) -> list[T] | None:
    """What `process` says of each of `rows`, in their order; None off the last stage.

    Micro-batches are of rows of like length, in the order of (length, row); `process` says
    something of every row of one, also of those that hold no instance (`PADDING_ROW`).
    """
    order = np.lexsort((rows, corpus.lengths[rows]))
    said: list[T] = []
    for batches in _equal_shapes(corpus, rows[order], micro_batch_size):
        for part in forward_only(model, batches, process):
            said += part
    if not said:
        return None
    in_order = np.argsort(order)
    return [said[at] for at in in_order]


def _equal_shapes(corpus: Corpus, rows: np.ndarray, micro_batch_size: int) -> Iterator[list[Batch]]:
    """Micro-batches of rows sorted by length, in runs of one padded length."""
    padding = -len(rows) % micro_batch_size
    table = np.append(rows, np.full(padding, PADDING_ROW)).reshape(-1, micro_batch_size)
    run: list[Batch] = []
    for part in table:
        longest = int(corpus.lengths[part[part != PADDING_ROW]].max()) - 1
        length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        if run and run[0].tokens_bs.shape[1] != length:
            yield run
            run = []
        run.append(make_batch(corpus, part, length=length).to(platform.device()))
    if run:
        yield run


def run_decoder(model: Any, batch: Batch, process: Callable[[Head], Any]) -> Any:
    """One micro-batch through this stage; `model` may be wrapped (DDP, Float16Module)."""
    return model(batch.tokens_bs, batch.positions_bs, None, process=process)


def _step(
    process: Callable[[Head, Batch], Any], batches: Iterator[Batch], model: Decoder
) -> tuple[Any, Callable[..., Any]]:
    batch = next(batches)
    output = run_decoder(model, batch, lambda head: process(head, batch))
    return output, lambda out, non_loss_data=True: out
