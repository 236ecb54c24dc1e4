"""What ranks do in tests of generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_miniplm.models.build import build_model
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.generate import Generated, Prompts, generate
from megatron_miniplm.models.global_tensors import fill_from
from megatron_miniplm.models.hf_folder import HfFolder
from megatron_miniplm.models.sampling import Sampler, SamplingConfig
from megatron_miniplm.parallel.topology import ParallelConfig, initialize, shutdown


@contextmanager
def models_of(
    folders: Sequence[str], dtype: torch.dtype = torch.float32, **flags: int
) -> Iterator[list[ModelChunks]]:
    """Models of Hugging Face folders in a layout."""
    topology = initialize(ParallelConfig(**flags))
    try:
        found = []
        for folder in folders:
            source = HfFolder(folder)
            vocab = source.config.vocab_size or 0
            model = build_model(source.config, topology, valid_vocab=vocab, dtype=dtype)
            fill_from(model, source)
            found.append(model.eval())
        yield found
        found.clear()
    finally:
        shutdown()


def continued(
    folders: Sequence[str],
    prompts: Sequence[np.ndarray],
    *,
    ids: Sequence[int],
    limits: Sequence[int],
    sampling: dict[str, Any],
    batch: int,
    stop_id: int | None = None,
    mixture: float = 0.0,
    flags: dict[str, int] | None = None,
    seeds: Sequence[int] = (),
) -> tuple[list[list[int]], list[Generated]]:
    """(sequences, what came with them) of all prompts, in batches of that size, in a layout.

    `seeds`: of each rank's draws, where they are not to be the same.
    """
    sequences, parts = [], []
    with models_of(folders, **(flags or {})) as models:
        own = {"seed": seeds[dist.get_rank()]} if seeds else {}
        sampler = Sampler(SamplingConfig(**sampling | own), mixture=mixture)
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            asked = Prompts(list(prompts[part]), np.array(ids[part]), np.array(limits[part]))
            found = generate(models, asked, sampler, stop_id=stop_id)
            sequences += [
                row[:length].tolist()
                for row, length in zip(found.tokens_bs, found.lengths_b, strict=True)
            ]
            parts.append(found)
    return sequences, parts
