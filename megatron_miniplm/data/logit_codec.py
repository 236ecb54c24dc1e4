"""`SparseLogits` <-> bytes. SIGNATURES, to be filled within the hour (branch s1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_miniplm.data.record_store import Record
from megatron_miniplm.data.sparse_logits import SparseLogits


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How logits become bytes."""

    value_bits: int = 8
    """Bits of a log-prob: 4 to 16, or 32 for float32 as it is."""
    zstd: bool = False
    """Compress each record once more."""

    def as_config(self) -> dict[str, Any]:
        """For the store's config; `Encoding(**config["encoding"])` makes it again."""
        return {"value_bits": self.value_bits, "zstd": self.zstd}


def encode(logits: SparseLogits, encoding: Encoding, *, vocab_size: int) -> Record:
    raise NotImplementedError


def decode(payload: bytes | memoryview) -> SparseLogits:
    """The payload says how it is encoded. DataError: it is damaged."""
    raise NotImplementedError
