"""The packing oracle of the tests, as benchmarks use it."""

from __future__ import annotations

import numpy as np

from megatron_miniplm.data.packing import EndTable, Packer
from megatron_miniplm.data.tokenizers import Tokenizer


def pack_with_oracle(
    tokenizer: Tokenizer, documents: list[tuple[str, np.ndarray]], *, seq_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens end to end and lengths of the instances of (domain, ids with separator) documents."""
    packer = Packer(
        EndTable.build(tokenizer.token_bytes(), tokenizer.eod_id), seq_length=seq_length
    )
    numbers: dict[str, int] = {}
    packed = []
    for domain, ids in documents:
        packed.append(packer.add(numbers.setdefault(domain, len(numbers)), ids))
    return (
        np.concatenate([each.tokens for each in packed]),
        np.concatenate([each.lengths for each in packed]),
    )
