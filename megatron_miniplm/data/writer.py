"""Writes a corpus: packed instances into shards of stock Megatron files, the manifest last.

Beside the shards: ``PREFIX.domain.npy`` (uint16[N], one domain an instance), ``PREFIX.tokenizer/``
and ``PREFIX.json``. Nothing is visible under PREFIX until `CorpusWriter.finish`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import xxhash

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.manifest import (
    Manifest,
    Parent,
    hash_file,
    hash_parts,
    relative_path,
)
from megatron_miniplm.data.indexed import contiguous_index, token_dtype
from megatron_miniplm.data.staging import Staging, with_suffix
from megatron_miniplm.data.tokenizers import Tokenizer

MAX_DOMAINS = 1 << 16
_NO_PARENTS: Mapping[str, Parent] = MappingProxyType({})


def root_fingerprint(content: Mapping[str, Any]) -> str:
    """Fingerprint of a corpus, from its manifest's content: tokenizer, shape, shards, domains."""
    hashes = [shard[name] for shard in content["shards"] for name in ("bin_hash", "idx_hash")]
    return hash_parts(
        content["tokenizer"]["fingerprint"],
        str(content["seq_length"]),
        str(content["eod_id"]),
        *hashes,
        content["domain_hash"],
    )


class CorpusWriter:
    """Context manager that appends instances and, at `finish`, makes them a corpus.

    Leaving it without `finish`, or by an exception, leaves no file.
    """

    def __init__(
        self,
        prefix: Path,
        *,
        tokenizer: Tokenizer,
        seq_length: int,
        config: Mapping[str, Any],
        parents: Mapping[str, Parent] = _NO_PARENTS,
        instances_per_shard: int = 1_000_000,
        overwrite: bool = False,
    ) -> None:
        if instances_per_shard < 1 or seq_length < 1:
            raise ConfigError(
                f"instances per shard ({instances_per_shard}) and sequence length ({seq_length}) "
                f"must be at least 1"
            )
        self.tokenizer, self.seq_length, self.config = tokenizer, seq_length, dict(config)
        self.parents = dict(parents)
        self.instances_per_shard = instances_per_shard
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._staging = Staging(Path(prefix), kind="corpus", overwrite=overwrite)
        self._shards: list[_Shard] = []
        self._domains = bytearray()  # uint16 each: arrays of one element would take 60 times that

    def __enter__(self) -> CorpusWriter:
        self._staging.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for shard in self._shards:
            shard.file.close()
        self._staging.__exit__(kind, error, trace)

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

    def finish(self, domain_names: Sequence[str], statistics: Mapping[str, Any]) -> Path:
        """Complete the corpus and return its manifest's path; refuses an empty one."""
        prefix = self._staging.prefix
        if not self._domains:
            raise DataError(f"{prefix} would hold no instance: the input has too little text")
        domains = np.frombuffer(self._domains, np.uint16)
        if domains.max() >= len(domain_names):
            raise DataError(f"domain {domains.max()} has no name among {len(domain_names)}")
        shards = self._close_shards()
        domain_path = self._staging.file(".domain.npy")
        np.save(domain_path, domains)
        folder = self._staging.file(".tokenizer")
        self.tokenizer.save(folder)
        content: dict[str, Any] = {
            "num_instances": len(domains),
            "num_tokens": sum(shard["num_tokens"] for shard in shards),
            "seq_length": self.seq_length,
            "vocab_size": self.tokenizer.vocab_size,
            "eod_id": self.tokenizer.eod_id,
            "dtype": self.dtype.name,
            "tokenizer": {
                "fingerprint": self.tokenizer.fingerprint,
                "path": relative_path(
                    with_suffix(prefix, ".tokenizer"), self._staging.manifest_path
                ),
            },
            "domain_names": list(domain_names),
            "domain_hash": hash_file(domain_path),
            "shards": shards,
            "statistics": dict(statistics),
        }
        return self._staging.commit(
            Manifest(
                kind="corpus",
                fingerprint=root_fingerprint(content),
                parents=self.parents,
                config=self.config,
                content=content,
            )
        )

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
        if lowest < 0 or highest >= self.tokenizer.vocab_size:
            raise DataError(
                f"token ids from {lowest} to {highest}, but the vocabulary has "
                f"{self.tokenizer.vocab_size} entries"
            )

    def _open_shard(self) -> _Shard:
        """The shard that has room; its final name is only known when their number is."""
        if not self._shards or self._shards[-1].num_instances == self.instances_per_shard:
            if self._shards:
                self._shards[-1].file.close()
            self._shards.append(_Shard(self._staging.file(f".shard{len(self._shards)}")))
        return self._shards[-1]

    def _close_shards(self) -> list[dict[str, Any]]:
        facts = []
        for number, shard in enumerate(self._shards):
            suffix = f"-{number:05d}-of-{len(self._shards):05d}"
            shard.file.close()
            shard.path.rename(self._staging.file(suffix + ".bin"))
            lengths = np.frombuffer(shard.lengths, np.int32)
            index = contiguous_index(lengths, self.dtype)
            self._staging.file(suffix + ".idx").write_bytes(index)
            num_tokens = int(lengths.sum(dtype=np.int64))
            facts.append(
                {
                    "name": self._staging.prefix.name + suffix,
                    "num_instances": len(lengths),
                    "num_tokens": num_tokens,
                    "bin_bytes": num_tokens * self.dtype.itemsize,
                    "bin_hash": shard.digest.hexdigest(),
                    "idx_hash": xxhash.xxh3_128(index).hexdigest(),
                }
            )
        return facts


class _Shard:
    """One ``.bin`` while it is written, hashed on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("wb")
        self.digest = xxhash.xxh3_128()
        self.lengths = bytearray()  # int32 each
        self.num_instances = 0

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        data = np.ascontiguousarray(tokens).data.cast("B")
        self.file.write(data)
        self.digest.update(data)
        self.lengths += lengths.astype(np.int32).tobytes()
        self.num_instances += len(lengths)
