"""`SparseLogits` to bytes and back: ids exactly, log-probs as exactly as the bits allow.

Per position, ids are interpolative codes and log-probs are levels between the position's lowest and
highest, Rice-coded (``csrc/logit_codec.h``); the kept mass of every position is that of the float32
values. A payload is a header, the taus, and a body (compressed or not): columns of the positions,
then their entries. docs/logit_store.md has the layout and what each encoding costs and keeps.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import zstandard

from megatron_miniplm._C import decode_logits, encode_logits
from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.data.record_store import Record
from megatron_miniplm.data.sparse_logits import COLUMNS, SparseLogits

EXACT_BITS = 32
_HEADER = struct.Struct("<BBBBIIqq")
"""Version, bits of a log-prob, whether compressed, taus, vocabulary, positions, entries, bytes of
the body before compression."""
_VERSION = 2
_ZSTD_LEVEL = 3
_TAIL_STEPS = 2048
"""A mass is kept as 16 bits of its negative log, in steps of 1/2048 nat: 2e-4 of itself. A sure
teacher's is 1e-7 or less, and a fifth at a temperature of 2."""
_NO_TAIL = 65535
"""Code of a mass below 1.3e-14."""
_STORED: Mapping[str, type[np.generic]] = {
    "gold_log_prob": np.float32,
    "entropy": np.float16,
    "logit_std": np.float16,
    "tail_mass": np.uint16,
}


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How logits become bytes."""

    value_bits: int = 10
    """Levels of a log-prob are 2 to the power of this: 4 to 16. 32: every number in float32."""
    zstd: bool = False
    """Compress each record once more."""

    def __post_init__(self) -> None:
        if not 4 <= self.value_bits <= 16 and self.value_bits != EXACT_BITS:
            raise ConfigError(
                f"log-probs of {self.value_bits} bits: there are 4 to 16, or {EXACT_BITS} for "
                f"float32 as it is"
            )

    def as_config(self) -> dict[str, Any]:
        """For the config of a store; ``Encoding(**config)`` makes it again."""
        return asdict(self)


def encode(logits: SparseLogits, encoding: Encoding, *, vocab_size: int) -> Record:
    """The record of one instance. DataError: a number is not finite, or ids are out of order."""
    bits = encoding.value_bits
    body = b"".join(column.tobytes() for column in _narrowed(logits, exact=bits == EXACT_BITS))
    try:
        body += encode_logits(
            logits.counts, logits.ids, logits.log_probs, vocab=vocab_size, bits=bits
        )
    except ValueError as error:
        raise DataError(
            f"logits of {len(logits)} positions cannot be stored: {error}; look at the model, its "
            f"precision and its vocabulary of {vocab_size}"
        ) from error
    taus = np.array(list(logits.log_partitions), np.float64)
    head = _HEADER.pack(
        _VERSION, bits, encoding.zstd, len(taus), vocab_size, len(logits), logits.nnz, len(body)
    )
    stored = zstandard.compress(body, _ZSTD_LEVEL) if encoding.zstd else body
    return Record(
        payload=head + taus.tobytes() + stored,
        num_positions=len(logits),
        num_values=logits.nnz,
        sums={name: float(getattr(logits, name).sum(dtype=np.float64)) for name in COLUMNS},
    )


def decode(payload: bytes | memoryview) -> SparseLogits:
    """What was encoded. DataError: the bytes are not a payload; any bytes are safe."""
    try:
        return _decode(memoryview(payload))
    except (ValueError, MemoryError, struct.error, zstandard.ZstdError) as error:
        raise DataError(
            f"{len(payload)} bytes are not logits of some positions: {error}; they were written by "
            f"another program, or are damaged: cache the logits again"
        ) from error


def _decode(payload: memoryview) -> SparseLogits:
    version, bits, zstd, num_taus, vocab, positions, entries, size = _HEADER.unpack_from(payload)
    if version != _VERSION or zstd > 1:
        raise ValueError(f"version {version}, compression {zstd}; this program reads {_VERSION}, 1")
    taus = np.frombuffer(payload, np.float64, num_taus, _HEADER.size)
    body = payload[_HEADER.size + taus.nbytes :]
    if zstd:
        body = memoryview(_unpacked(body, size))
    if len(body) != size:
        raise ValueError(f"its body has {len(body)} bytes, not {size}")
    columns: dict[str, np.ndarray] = {}
    for name, dtype in _column_types(num_taus, exact=bits == EXACT_BITS):
        columns[name] = np.frombuffer(body, dtype, positions)
        body = body[columns[name].nbytes :]
    counts, ids, log_probs = decode_logits(
        body, positions=positions, entries=entries, vocab=vocab, bits=bits
    )
    if columns["tail_mass"].dtype == np.uint16:
        code = columns["tail_mass"]
        mass = np.exp(code.astype(np.float64) / -_TAIL_STEPS)
        columns["tail_mass"] = np.where(code == _NO_TAIL, 0, mass)
    for name, numbers in [("log-probs", log_probs), *columns.items()]:
        if not np.isfinite(numbers).all():
            raise ValueError(f"of its {name}, one is not finite")
    return SparseLogits(
        counts=counts,
        ids=ids,
        log_probs=log_probs,
        log_partitions={
            tau: columns[f"tau {number}"].copy() for number, tau in enumerate(taus.tolist())
        },
        **{name: columns[name].astype(np.float32) for name in COLUMNS},
    )


def _unpacked(body: memoryview, size: int) -> bytes:
    """The `size` bytes that one zstd frame holds; never makes more."""
    found = zstandard.frame_content_size(body)
    if found != size:
        raise ValueError(f"its compressed body holds {found} bytes, not {size}")
    return zstandard.ZstdDecompressor().decompress(
        body, max_output_size=size, allow_extra_data=False
    )


def _column_types(num_taus: int, *, exact: bool) -> Iterator[tuple[str, type[np.generic]]]:
    """Name and stored type of each column, in the order of the body."""
    for name in COLUMNS:
        yield name, np.float32 if exact else _STORED[name]
    for number in range(num_taus):
        yield f"tau {number}", np.float32


def _narrowed(logits: SparseLogits, *, exact: bool) -> Iterator[np.ndarray]:
    """The columns as they are stored."""
    types = _column_types(len(logits.log_partitions), exact=exact)
    for (name, column), (_, dtype) in zip(logits.columns(), types, strict=True):
        with np.errstate(over="ignore", divide="ignore"):
            narrow = (_tail_code(column) if dtype is np.uint16 else column).astype(dtype)
        broken = np.flatnonzero(~np.isfinite(column) | ~np.isfinite(narrow))
        if len(broken):
            raise DataError(
                f"{name} of position {broken[0]} is {column[broken[0]]}, and {len(broken) - 1} "
                f"more of {len(column)} are broken: look at the model and its precision"
            )
        yield narrow


def _tail_code(mass: np.ndarray) -> np.ndarray:
    """What `_TAIL_STEPS` says; of a mass that is not finite, anything."""
    code = np.nan_to_num(-np.log(mass.clip(0, 1), dtype=np.float64) * _TAIL_STEPS, posinf=_NO_TAIL)
    rounded: np.ndarray = np.round(code).clip(0, _NO_TAIL)
    return rounded
