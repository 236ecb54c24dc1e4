"""The suite ``scoring``: tokens a second of `score` beside transformers' own forward pass.

All read the same rows of one corpus in the same micro-batches, with the same weights in fp32 on the
same device, in turns; making the batches is part of what is timed. Ours goes through the head a
chunk of tokens at a time. The peers have the logits of a whole micro-batch, as transformers returns
them, and take of these torch's cross entropy, or log-softmax of every column and then the labels',
as lm-evaluation-harness does. All add the tokens of an instance up in fp64.

No sum may be further than `TOLERANCE` from what log-softmax in fp64 makes of transformers' logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_core import Bench, Contestant, Suite, require_equal
from bench_models import TheirModel, model_case
from bench_rows import make_corpus
from bench_text import make_bpe

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import Batch, make_batch
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.objectives.lm import score_rows
from megatron_miniplm.parallel import platform

_ROWS = 4
TOLERANCE = 1e-5
"""Nats a token: fp32 layers whose sums are of another order, over a whole instance."""
_Nll = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits[b, s, V], labels[b, s]) -> nats[b, s]."""


@dataclass(frozen=True)
class _Work:
    """What is scored, at its normal size: so many instances of so many tokens."""

    instances: int
    shortest: int
    longest: int


def _race(asked: _Work, bench: Bench, model: ModelChunks, theirs: TheirModel) -> None:
    size = bench.sizes.pick
    corpus = make_corpus(
        bench, size(8, asked.instances), size(20, asked.shortest), size(41, asked.longest),
        make_bpe(bench.scratch / "tokenizer", 2000),  # ids that every model has
    )  # fmt: skip
    rows = np.arange(len(corpus))

    def ours() -> np.ndarray:
        scored = score_rows(model, corpus, rows, micro_batch_size=_ROWS)
        assert scored is not None
        return scored[0]

    def by(nll: _Nll) -> np.ndarray:
        return theirs.call(lambda: _sums(theirs.model, corpus, nll))

    timings = bench.race(
        Contestant(name="megatron_miniplm", run=ours),
        Contestant(name="transformers, cross entropy", run=lambda: by(_cross_entropy)),
        Contestant(name="transformers, log-softmax of all columns", run=lambda: by(_log_softmax)),
        work=f"{len(rows)} instances of {corpus.lengths.min():,} to {corpus.lengths.max():,} "
        f"tokens, {_ROWS} a micro-batch, fp32",
    )
    exact, labels = by(_exact), corpus.lengths - 1
    errors = {
        name: float((np.abs(timing.result - exact) / labels).max())
        for name, timing in timings.items()
    }
    for name, error in errors.items():
        require_equal(name, error < TOLERANCE, f"a sum is {error:.1e} nats a token off")
    mine, *peers = timings.values()
    bench.rate(
        "tokens scored", "tokens/s", int(labels.sum()), ours=mine, peers=peers,
        error_ours=errors[mine.name], errors=errors,
    )  # fmt: skip


@torch.inference_mode()
def _sums(model: Any, corpus: Corpus, nll: _Nll) -> np.ndarray:
    """float64[N]: the sum of each instance, nats."""
    found = np.empty(len(corpus))
    for batch in _batches(corpus):
        # Padding is on the right, and attention is causal: without a mask it is at its fastest.
        logits_bsV = model(batch.tokens_bs, use_cache=False).logits
        losses_bs = nll(logits_bsV, batch.labels_bs).double() * batch.mask_bs
        found[batch.rows_b.cpu().numpy()] = losses_bs.sum(1).cpu().numpy()
    return found


def _batches(corpus: Corpus) -> Iterator[Batch]:
    """Rows of like length, as `forward_rows` cuts them, padded no further than the longest."""
    order = np.argsort(corpus.lengths, kind="stable")
    for start in range(0, len(order), _ROWS):
        rows = order[start : start + _ROWS]
        length = int(corpus.lengths[rows].max()) - 1
        yield make_batch(corpus, rows, length=length).to(platform.device())


def _cross_entropy(logits_bsV: torch.Tensor, labels_bs: torch.Tensor) -> torch.Tensor:
    flat = F.cross_entropy(logits_bsV.flatten(0, 1), labels_bs.flatten(), reduction="none")
    return flat.view_as(labels_bs)


def _log_softmax(logits_bsV: torch.Tensor, labels_bs: torch.Tensor) -> torch.Tensor:
    return -F.log_softmax(logits_bsV, dim=-1).gather(-1, labels_bs[..., None])[..., 0]


def _exact(logits_bsV: torch.Tensor, labels_bs: torch.Tensor) -> torch.Tensor:
    """In fp64, a row at a time: it is twice the size."""
    pairs = zip(logits_bsV, labels_bs, strict=True)
    return torch.stack([_log_softmax(logits.double(), labels) for logits, labels in pairs])


SUITE = Suite(
    "scoring",
    {
        "packed": model_case(partial(_race, _Work(instances=8, shortest=1025, longest=1025))),
        "mixed-lengths": model_case(partial(_race, _Work(instances=16, shortest=65, longest=1025))),
    },
)
