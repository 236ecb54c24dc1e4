"""Functions that ranks of the pool run by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.parallel.topology import ParallelConfig, initialize, shutdown


def plain_nll(corpus: str, load: str, rows: np.ndarray) -> list[tuple[float, int]]:
    """(sum of NLL, tokens) of each row: one row at a time, whole logits, mask written out."""
    topology = initialize(ParallelConfig())
    try:
        opened = Corpus.open(corpus)
        model = open_weights(Path(load)).build(opened, topology, torch.float32)
        results = []
        for row in rows:
            ids = torch.from_numpy(opened.tokens(int(row)).astype(np.int64))
            with torch.no_grad():
                logits = model(ids[None, :-1], torch.arange(len(ids) - 1)[None], None)[0]
            logp = logits[:, : opened.vocab_size].double().log_softmax(-1)
            keep = ids[:-1] != opened.eod_id
            nll = -logp[torch.arange(len(ids) - 1), ids[1:]]
            results.append((float(nll[keep].sum()), int(keep.sum())))
        return results
    finally:
        shutdown()
