"""Functions that ranks of the pool run by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.models.build import build_model, fill_by_name
from megatron_miniplm.models.convert import HfFolder, HfSource
from megatron_miniplm.models.forward import forward_only
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


def hf_logits(folder: str, ids: torch.Tensor, flags: dict[str, int]) -> torch.Tensor | None:
    """[b, s, V] logits of a Hugging Face folder in a layout, gathered; None off the last stage."""
    topology = initialize(ParallelConfig(**flags))
    try:
        source = HfFolder(folder)
        config = source.config
        assert config.vocab_size is not None
        model = build_model(
            config, topology, valid_vocab=config.vocab_size, dtype=torch.float32
        ).eval()
        fill_by_name(model, HfSource(source, torch.float32))
        batch = Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(len(ids)))
        parts = forward_only(model, [batch], lambda head, _: head.logits())
        if not parts:
            return None
        mine = parts[0].contiguous()
        shards = [torch.empty_like(mine) for _ in range(topology.tp_size)]
        dist.all_gather(shards, mine, group=topology.tp_group)
        return torch.cat(shards, -1).transpose(0, 1)[..., : config.vocab_size]
    finally:
        shutdown()
