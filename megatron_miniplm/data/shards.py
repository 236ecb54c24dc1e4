"""Shards while they are written: instances into ``.bin`` and ``.idx`` drafts of one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from megatron_miniplm._C import start_writeback
from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.data.indexed import contiguous_index, token_dtype

MAX_DOMAINS = 1 << 16
_WRITEBACK_BYTES = 1 << 24


class Drafts(NamedTuple):
    """Complete shards under draft names."""

    shards: list[tuple[Path, dict[str, Any]]]
    """Path without suffix, and the facts that a corpus manifest has of it, name apart."""
    domains: np.ndarray
    """uint16[N]: the domain of each instance."""


class ShardWriter:
    """Appends instances to shards in one folder: ``shardNNNNN.bin`` with ``.idx``.

    The names are those of a draft: how many shards there are is known at the end only. Data is
    sent to the disk on the way, so that little of it is left to wait for.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int,
        seq_length: int,
        instances_per_shard: int = 1_000_000,
    ) -> None:
        if instances_per_shard < 1 or seq_length < 1:
            raise ConfigError(
                f"instances per shard ({instances_per_shard}) and sequence length ({seq_length}) "
                f"must be at least 1"
            )
        self.folder, self.vocab_size, self.seq_length = folder, vocab_size, seq_length
        self.instances_per_shard = instances_per_shard
        self.dtype = token_dtype(vocab_size)
        self._shards: list[_Shard] = []
        self._domains = bytearray()  # uint16 each: arrays of one element would take 60 times that

    def add(self, tokens: np.ndarray, lengths: np.ndarray, domain: int | np.ndarray) -> None:
        """Append instances.

        `tokens` is int[sum(lengths)], `lengths` int[n] in tokens, `domain` one number for all or
        int[n]. Refuses ids outside the vocabulary and instances of fewer than 2 or more than
        ``seq_length + 1`` tokens.
        """
        tokens, lengths = np.asarray(tokens), np.asarray(lengths)
        domains = np.broadcast_to(domain, lengths.shape)
        self._check(tokens, lengths, domains)
        self._domains += domains.astype(np.uint16).tobytes()
        start = 0
        while start < len(lengths):
            shard = self._open_shard()
            taken = lengths[start : start + self.instances_per_shard - shard.num_instances]
            size = int(taken.sum(dtype=np.int64))
            shard.append(tokens[:size].astype(self.dtype, copy=False), taken)
            tokens, start = tokens[size:], start + len(taken)

    def close(self) -> None:
        """Close the files, as they are."""
        for shard in self._shards:
            shard.file.close()

    def finish(self) -> Drafts:
        """Complete the shards."""
        self.close()
        complete = [(shard.path.with_suffix(""), self._complete(shard)) for shard in self._shards]
        return Drafts(complete, np.frombuffer(bytes(self._domains), np.uint16))

    def _complete(self, shard: _Shard) -> dict[str, Any]:
        lengths = np.frombuffer(shard.lengths, np.int32)
        index = contiguous_index(lengths, self.dtype)
        shard.path.with_suffix(".idx").write_bytes(index)
        num_tokens = int(lengths.sum(dtype=np.int64))
        return {
            "num_instances": len(lengths),
            "num_tokens": num_tokens,
            "bin_bytes": num_tokens * self.dtype.itemsize,
            "bin_hash": shard.digest.hexdigest(),
            "idx_hash": xxhash.xxh3_128(index).hexdigest(),
        }

    def _check(self, tokens: np.ndarray, lengths: np.ndarray, domains: np.ndarray) -> None:
        for domain in (domains.min(), domains.max()) if len(domains) else ():
            if not 0 <= domain < MAX_DOMAINS:
                raise DataError(f"domain {domain} is out of range: at most {MAX_DOMAINS} domains")
        total = int(lengths.sum(dtype=np.int64))
        if total != len(tokens):
            raise DataError(f"lengths add up to {total} tokens, but {len(tokens)} were given")
        if not len(lengths):
            return
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < 2 or longest > self.seq_length + 1:
            raise DataError(
                f"instances of {shortest} to {longest} tokens: each must have 2 to "
                f"{self.seq_length + 1} (sequence length + 1)"
            )
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= self.vocab_size:
            raise DataError(
                f"token ids from {lowest} to {highest}, but the vocabulary has "
                f"{self.vocab_size} entries"
            )

    def _open_shard(self) -> _Shard:
        """The shard that has room."""
        if not self._shards or self._shards[-1].num_instances == self.instances_per_shard:
            if self._shards:
                self._shards[-1].file.close()
            self._shards.append(_Shard(self.folder / f"shard{len(self._shards):05d}.bin"))
        return self._shards[-1]


class _Shard:
    """One ``.bin`` while it is written, hashed on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("wb")
        self.digest = xxhash.xxh3_128()
        self.lengths = bytearray()  # int32 each
        self.num_instances = 0
        self._written = self._sent = 0  # bytes, to the file and from there to the disk

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        data = np.ascontiguousarray(tokens).data.cast("B")
        self.file.write(data)
        self.digest.update(data)
        self.lengths += lengths.astype(np.int32).tobytes()
        self.num_instances += len(lengths)
        self._written += len(data)
        if self._written - self._sent >= _WRITEBACK_BYTES:
            self.file.flush()
            start_writeback(self.file.fileno(), self._sent, self._written - self._sent)
            self._sent = self._written
