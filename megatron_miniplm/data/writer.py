"""Writes a corpus: packed instances into shards of stock Megatron files, the manifest last.

Beside the shards: ``PREFIX.domain.npy`` (uint16[N], one domain an instance), ``PREFIX.tokenizer/``
and ``PREFIX.json``; of generated instances also ``PREFIX.prompt_len.npy`` (int32[N], tokens of the
prompt). Nothing is visible under PREFIX until `CorpusWriter.finish`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.core.manifest import (
    NO_PARENTS,
    Manifest,
    Parent,
    hash_file,
    hash_parts,
    relative_path,
)
from megatron_miniplm.data.indexed import token_dtype
from megatron_miniplm.data.shards import MAX_DOMAINS as MAX_DOMAINS  # noqa: PLC0414  others know it from here
from megatron_miniplm.data.shards import Drafts, ShardWriter
from megatron_miniplm.data.staging import Staging, with_suffix
from megatron_miniplm.data.tokenizers import Tokenizer

_NOTHING_MORE: Mapping[str, Any] = MappingProxyType({})


def root_fingerprint(content: Mapping[str, Any]) -> str:
    """Fingerprint of a corpus, from its manifest's content.

    Tokenizer, shape, shards, domains, and the prompts' lengths where there are any.
    """
    hashes = [shard[name] for shard in content["shards"] for name in ("bin_hash", "idx_hash")]
    return hash_parts(
        content["tokenizer"]["fingerprint"],
        str(content["seq_length"]),
        str(content["eod_id"]),
        *hashes,
        content["domain_hash"],
        *([content["prompt_len_hash"]] if "prompt_len_hash" in content else []),
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
        parents: Mapping[str, Parent] = NO_PARENTS,
        instances_per_shard: int = 1_000_000,
        overwrite: bool = False,
    ) -> None:
        self.tokenizer, self.seq_length, self.config = tokenizer, seq_length, dict(config)
        self.parents = dict(parents)
        self._staging = Staging(Path(prefix), kind="corpus", overwrite=overwrite)
        self._shards = ShardWriter(
            self._staging.folder,
            vocab_size=tokenizer.vocab_size,
            seq_length=seq_length,
            instances_per_shard=instances_per_shard,
        )
        self.dtype = self._shards.dtype

    def __enter__(self) -> CorpusWriter:
        self._staging.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._shards.close()
        finally:  # a full disk refuses even that
            self._staging.__exit__(*error)

    def add(self, tokens: np.ndarray, lengths: np.ndarray, domain: int | np.ndarray) -> None:
        """Append instances; see `ShardWriter.add`."""
        self._shards.add(tokens, lengths, domain)

    def finish(
        self,
        domain_names: Sequence[str],
        statistics: Mapping[str, Any],
        *,
        prompt_lengths: np.ndarray | None = None,
    ) -> Path:
        """Complete the corpus and return its manifest's path; refuses an empty one."""
        return commit_corpus(
            self._staging,
            self._shards.finish(),
            tokenizer=self.tokenizer,
            seq_length=self.seq_length,
            config=self.config,
            parents=self.parents,
            domain_names=domain_names,
            statistics=statistics,
            prompt_lengths=prompt_lengths,
        )


def commit_corpus(  # noqa: PLR0913 - what a corpus is, keyword by keyword
    staging: Staging,
    drafts: Drafts,
    *,
    tokenizer: Tokenizer,
    seq_length: int,
    config: Mapping[str, Any],
    domain_names: Sequence[str],
    statistics: Mapping[str, Any],
    parents: Mapping[str, Parent] = NO_PARENTS,
    more: Mapping[str, Any] = _NOTHING_MORE,
    prompt_lengths: np.ndarray | None = None,
) -> Path:
    """Make complete shards a corpus and return its manifest's path; no token is copied.

    The drafts are on the file system of `staging`. `more` goes into the manifest's content: facts
    of its own, or a token type other than the tokenizer's. `prompt_lengths` (int[N], tokens) are
    those of generated instances. Refuses no instance and domains without
    a name.
    """
    prefix, domains = staging.prefix, drafts.domains
    if not len(domains):
        raise DataError(f"{prefix} would hold no instance: the input has too little text")
    if domains.max() >= len(domain_names):
        raise DataError(f"domain {domains.max()} has no name among {len(domain_names)}")
    named = [
        _take(staging, path, facts, f"-{number:05d}-of-{len(drafts.shards):05d}")
        for number, (path, facts) in enumerate(drafts.shards)
    ]
    domain_path = staging.file(".domain.npy")
    np.save(domain_path, domains)
    tokenizer.save(staging.file(".tokenizer"))
    saved = relative_path(with_suffix(prefix, ".tokenizer"), staging.manifest_path)
    content: dict[str, Any] = {
        "num_instances": len(domains),
        "num_tokens": sum(shard["num_tokens"] for shard in named),
        "seq_length": seq_length,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "path": saved},
        "domain_names": list(domain_names),
        "domain_hash": hash_file(domain_path),
        "shards": named,
        "statistics": dict(statistics),
        **more,
    }
    if prompt_lengths is not None:
        np.save(staging.file(".prompt_len.npy"), prompt_lengths.astype(np.int32))
        content["prompt_len_hash"] = hash_file(staging.file(".prompt_len.npy"))
    return staging.commit(
        Manifest(
            kind="corpus",
            fingerprint=root_fingerprint(content),
            parents=dict(parents),
            config=config,
            content=content,
        )
    )


def _take(staging: Staging, path: Path, facts: dict[str, Any], suffix: str) -> dict[str, Any]:
    """Give a draft shard its name in the staging folder; a draft from elsewhere keeps its own.

    So a join that is killed finds the parts again. Where the file system has no hard links, the
    file moves, and a part that lost one is made again.
    """
    for kind in (".bin", ".idx"):
        draft, target = path.with_name(path.name + kind), staging.file(suffix + kind)
        if draft.parent == staging.folder:
            draft.rename(target)
            continue
        try:
            os.link(draft, target)
        except OSError:
            draft.rename(target)
    return {**facts, "name": staging.prefix.name + suffix}
