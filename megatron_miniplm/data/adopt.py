"""Tokenised documents that are there already -> corpus, without copying a token.

The instances of one stock prefix are runs of its ``.bin`` (`views`). So a shard of the corpus is an
``.idx`` whose pointers lead there, 20 bytes an instance, and a link to the ``.bin``. A prefix is
one shard and one domain. Prefixes may share a domain, but an instance never spans two of them: the
tail of each is dropped or flushed.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.log import Progress, get_logger, progress
from megatron_miniplm.core.manifest import hash_file, relative_path
from megatron_miniplm.data.documents import TokenizedDocuments
from megatron_miniplm.data.indexed import HEADER, MAGIC, VERSION, dtype_code
from megatron_miniplm.data.links import Link, link_tokens
from megatron_miniplm.data.shards import MAX_DOMAINS, Drafts
from megatron_miniplm.data.staging import Staging
from megatron_miniplm.data.tokenizers import Tokenizer
from megatron_miniplm.data.views import ViewConfig, ViewPacker, Views, view_table
from megatron_miniplm.data.writer import commit_corpus

_INDEX_BLOCK = 1 << 20


def adopt(
    inputs: Sequence[tuple[str, TokenizedDocuments]],
    prefix: Path,
    *,
    tokenizer: Tokenizer,
    view: ViewConfig,
    config: Mapping[str, Any],
    link: Link = "relative",
    overwrite: bool = False,
) -> Path:
    """Make the corpus of (domain, documents) pairs at `prefix`; returns its manifest's path.

    Refuses inputs of different token types, one given twice, one in the place of the output, what
    `ViewPacker.blocks` refuses, and inputs that fill no instance.
    """
    prefix = Path(prefix)
    _check_inputs([documents for _, documents in inputs], prefix)
    names = list(dict.fromkeys(name for name, _ in inputs))
    if len(names) > MAX_DOMAINS:
        raise ConfigError(f"{len(names)} domains are given, at most {MAX_DOMAINS} are possible")
    table = view_table(tokenizer, view)
    with Staging(prefix, kind="corpus", overwrite=overwrite) as staging:
        drafts = []
        megabytes = sum(documents.tokens.nbytes for _, documents in inputs) / 1e6
        with progress("adopt (MB of tokens)", megabytes, "MB") as bar:
            for number, (name, documents) in enumerate(inputs):
                packer = ViewPacker(documents, table, view)
                draft = _Draft(staging.folder / f"shard{number:05d}.idx", name, packer)
                draft.fill(bar)
                drafts.append(draft)
        places = [documents.prefix for _, documents in inputs]
        return commit_corpus(
            staging,
            _link_shards(drafts, names, staging, link),
            tokenizer=tokenizer,
            seq_length=view.seq_length,
            config=config,
            domain_names=names,
            statistics=_statistics(names, drafts),
            more={
                "dtype": inputs[0][1].tokens.dtype.name,
                "adopted": [relative_path(place, staging.manifest_path) for place in places],
            },
        )


def _check_inputs(inputs: Sequence[TokenizedDocuments], prefix: Path) -> None:
    types = {documents.tokens.dtype.name: documents.prefix for documents in inputs}
    if len(types) > 1:
        shown = " and ".join(f"{name} ({where})" for name, where in sorted(types.items()))
        raise ConfigError(f"the inputs hold {shown} tokens: adopt each type into its own corpus")
    own_shard = re.compile(re.escape(prefix.name) + r"-\d{5}-of-\d{5}\.bin")
    seen: set[Path] = set()
    for documents in inputs:
        where = documents.bin_path.resolve()
        if where in seen:
            raise ConfigError(f"--input has {where} twice: its documents would count twice")
        seen.add(where)
        for path in (where, documents.bin_path):
            if path.parent.resolve() == prefix.parent.resolve() and own_shard.fullmatch(path.name):
                raise ConfigError(
                    f"--input {documents.prefix} leads to {path}, in the place of a shard of "
                    f"--output-prefix {prefix}: choose another output prefix"
                )


class _Draft:
    """One shard to be: the view index of one prefix."""

    def __init__(self, idx: Path, name: str, packer: ViewPacker) -> None:
        self.idx, self.domain, self.packer = idx, name, packer
        self.documents = packer.documents
        self._digest = xxhash.xxh3_128()

    def fill(self, bar: Progress) -> None:
        """Write the index and hash the tokens, which are read once."""
        with _ViewIndex(self.idx, self.documents.tokens.dtype) as index:
            for tokens, views in self.packer.blocks():
                self._digest.update(tokens.data.cast("B"))
                index.add(views)
                bar.advance(tokens.nbytes / 1e6)
            index.finish()
        self.statistics = self.packer.statistics

    def facts(self) -> dict[str, Any]:
        """Its entry in the manifest, name apart."""
        return {
            "num_instances": self.statistics.instances,
            "num_tokens": self.statistics.packed_tokens,
            "bin_bytes": self.documents.tokens.nbytes,
            "bin_hash": self._digest.hexdigest(),
            "idx_hash": hash_file(self.idx),
        }


class _ViewIndex:
    """One view ``.idx`` while it grows: its sections are joined at `finish`, in bounded memory."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._dtype, self._count = dtype, 0
        self._file = path.open("wb")
        self._file.write(bytes(HEADER.size))
        self._draft = path.with_name(path.name + ".pointers")
        self._pointers = self._draft.open("w+b")

    def __enter__(self) -> _ViewIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._pointers.close()

    def add(self, views: Views) -> None:
        """Append instances."""
        self._file.write(views.lengths.astype("<i4").tobytes())
        self._pointers.write((views.starts * self._dtype.itemsize).astype("<i8").tobytes())
        self._count += len(views.starts)

    def finish(self) -> None:
        """Write pointers, document boundaries (one instance a document) and the header."""
        self._pointers.seek(0)
        shutil.copyfileobj(self._pointers, self._file, 1 << 22)
        self._draft.unlink()
        for begin in range(0, self._count + 1, _INDEX_BLOCK):
            stop = min(begin + _INDEX_BLOCK, self._count + 1)
            self._file.write(np.arange(begin, stop, dtype="<i8").tobytes())
        self._file.seek(0)
        code = dtype_code(self._dtype)
        self._file.write(HEADER.pack(MAGIC, VERSION, code, self._count, self._count + 1))


def _link_shards(
    drafts: Sequence[_Draft], names: Sequence[str], staging: Staging, link: Link
) -> Drafts:
    """The shards that hold an instance, their tokens linked; refuses to end with none."""
    used = [draft for draft in drafts if draft.statistics.instances]
    for draft in drafts:
        if draft not in used:
            total = draft.statistics.tokens
            get_logger().warning("%s fills no instance: %d tokens", draft.documents.prefix, total)
            draft.idx.unlink()
    if not used:
        raise DataError(
            f"{sum(draft.statistics.tokens for draft in drafts)} tokens fill no instance: give "
            f"more text, a smaller --seq-length, or keep incomplete instances with --flush-tails"
        )
    for draft in used:
        target = draft.idx.with_suffix(".bin")
        link_tokens(draft.documents.bin_path, target, staging.prefix.parent, link)
    domains = np.array([names.index(draft.domain) for draft in used], np.uint16)
    counts = [draft.statistics.instances for draft in used]
    shards = [(draft.idx.with_suffix(""), draft.facts()) for draft in used]
    return Drafts(shards, np.repeat(domains, counts))


def _statistics(names: Sequence[str], drafts: Sequence[_Draft]) -> dict[str, Any]:
    """The manifest's `statistics`, named as those of `preprocess` where both know the figure."""
    counts = [dataclasses.asdict(draft.statistics) for draft in drafts]
    domains = {
        name: _sum(own for draft, own in zip(drafts, counts, strict=True) if draft.domain == name)
        for name in names
    }
    packing = _sum(dataclasses.asdict(draft.packer.counters) for draft in drafts)
    return {**_sum(counts), "packing": packing, "domains": domains}


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return total
