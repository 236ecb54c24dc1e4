"""Opens a corpus or a subset: an ordered, immutable list of instances with checked bytes.

A row counts the instances of this artifact; an instance id is the row in the root corpus, the one
that `preprocess` wrote. A subset has its own ``.idx`` and links to the root's ``.bin``, so both
are read by the same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.core.manifest import (
    Manifest,
    Parent,
    hash_file,
    read_manifest,
)
from megatron_miniplm.data.indexed import Index, check_pointers, read_index
from megatron_miniplm.data.mapped import blocks, hash_streams, load_column
from megatron_miniplm.data.staging import with_suffix
from megatron_miniplm.data.token_file import TokenFile
from megatron_miniplm.data.tokenizers import Tokenizer, load_saved
from megatron_miniplm.data.writer import root_fingerprint


def subset_fingerprint(root: str, count: int, ids: Iterable[np.ndarray]) -> str:
    """Fingerprint of a subset: the root's and the `count` chosen ids (int64, ascending, blocks).

    It says which instances, not how they are stored: a materialised subset has that of its view.
    """
    return hash_streams(root, (8 * count, (block.astype("<i8", copy=False) for block in ids)))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One stock Megatron pair of files."""

    prefix: Path
    """Absolute path without ``.bin`` and ``.idx``: what Megatron calls a data path."""
    index: Index
    tokens: np.ndarray
    """uint8, the mapped ``.bin``; for a subset the root's, through the link."""
    file: TokenFile
    """The same, for whoever reads single instances."""
    facts: dict[str, Any]
    """Its entry in the manifest."""
    num_tokens: int
    """Of all its instances, as the index says."""


class Corpus:
    """An opened corpus or subset; make one with `Corpus.open`.

    Attributes: ``prefix``, ``manifest``, ``kind`` ("corpus" or "subset"), ``fingerprint``,
    ``root_fingerprint``, ``num_instances``, ``num_tokens``, ``seq_length``, ``vocab_size``,
    ``eod_id``, ``domain_names``, ``dtype``, ``lengths`` (int32[N], tokens), ``ids`` (int64[N],
    root ids), ``domains`` (uint16[N]), ``shards`` (absolute stock prefixes).
    """

    def __init__(self, prefix: Path, manifest: Manifest, shards: Sequence[Shard]) -> None:
        content = manifest.content
        self.prefix, self.manifest, self._shards = prefix, manifest, tuple(shards)
        self.kind = cast(Literal["corpus", "subset"], manifest.kind)
        self.fingerprint = manifest.fingerprint
        self.num_instances, self.num_tokens = content["num_instances"], content["num_tokens"]
        self.seq_length, self.vocab_size = content["seq_length"], content["vocab_size"]
        self.eod_id, self.domain_names = content["eod_id"], tuple(content["domain_names"])
        self.dtype = np.dtype(content["dtype"])
        counts = [len(shard.index.lengths) for shard in shards]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self.root_fingerprint = (
            self.fingerprint if self.kind == "corpus" else manifest.parents["root"].fingerprint
        )

    @classmethod
    def open(cls, prefix: str | Path) -> Corpus:
        """Open PREFIX; refuses files that are missing, of another size, or changed since.

        Checked: manifest, every ``.idx`` by hash and pointer by pointer, every ``.bin`` by size,
        the ids and the fingerprint. (`verify.verify` hashes the ``.bin`` files as well.)
        """
        prefix = Path(prefix).absolute()
        manifest = read_manifest(with_suffix(prefix, ".json"), "corpus", "subset")
        with ThreadPoolExecutor() as pool:  # reading and hashing both leave the interpreter free
            entries = manifest.content["shards"]
            shards = list(pool.map(lambda facts: _open_shard(prefix, facts), entries))
        corpus = cls(prefix, manifest, shards)
        corpus._check()
        return corpus

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the prefix: a worker process maps the files itself."""
        return Corpus.open, (self.prefix,)

    def __len__(self) -> int:
        return self.num_instances

    @property
    def shards(self) -> list[Path]:
        """Absolute stock prefixes, one a shard."""
        return [shard.prefix for shard in self._shards]

    @property
    def opened_shards(self) -> tuple[Shard, ...]:
        """The shards with their mapped files."""
        return self._shards

    @property
    def shard_starts(self) -> np.ndarray:
        """int64[S + 1]: shard s holds rows ``starts[s]`` to ``starts[s + 1]``."""
        return self._starts

    @property
    def manifest_path(self) -> Path:
        """Where the manifest lies."""
        return with_suffix(self.prefix, ".json")

    def locate(self, row: int) -> tuple[Shard, int]:
        """The shard that holds a row, and the row's place in it."""
        if not 0 <= row < self.num_instances:
            raise IndexError(f"row {row} of {self.prefix}, which has {self.num_instances}")
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._shards[number], row - int(self._starts[number])

    def tokens(self, row: int) -> np.ndarray:
        """One instance, [length] in the corpus's dtype, read-only.

        Refuses a file that changed since it was opened, and ids outside the vocabulary.
        """
        shard, local = self.locate(row)
        begin, length = int(shard.index.pointers[local]), int(shard.index.lengths[local])
        try:
            data = shard.file.read(begin, length * self.dtype.itemsize)
        except DataError as error:
            raise DataError(f"row {row} of {self.prefix}: {error}") from error
        tokens = np.frombuffer(data, self.dtype)
        if length and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise DataError(
                f"row {row} of {self.prefix} has token ids from {tokens.min()} to {tokens.max()}, "
                f"but its tokenizer has {self.vocab_size}: {shard.file.path} is corrupt; look at "
                "it with `inspect --verify`"
            )
        return tokens

    def first_label(self, row: int) -> int:
        """See `instances.Instances.first_label`: all of an instance counts."""
        return 1

    def gather(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Copies of several instances, in the order of `rows`."""
        return [self.tokens(int(row)) for row in rows]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32[N], tokens; of several shards, one array is made when it is first asked for."""
        if len(self._shards) == 1:
            return self._shards[0].index.lengths
        return np.concatenate([shard.index.lengths for shard in self._shards])

    @cached_property
    def ids(self) -> np.ndarray:
        """int64[N], ascending: the row that each instance has in the root corpus.

        Mapped for a subset. A root's is made when it is first asked for; what streams over rows
        asks `id_column`.
        """
        if self.kind == "corpus":
            return np.arange(self.num_instances, dtype=np.int64)
        return self._mapped_ids

    @property
    def id_column(self) -> np.ndarray | None:
        """int64[N], mapped; None for a root corpus, where the id of row r is r."""
        return None if self.kind == "corpus" else self._mapped_ids

    @cached_property
    def _mapped_ids(self) -> np.ndarray:
        return load_column(with_suffix(self.prefix, ".ids.npy"), self.num_instances, np.int64)

    @cached_property
    def domains(self) -> np.ndarray:
        """uint16[N]; a subset takes its own from the root's column."""
        return self.domains_of(slice(0, self.num_instances))

    def domains_of(self, rows: slice) -> np.ndarray:
        """uint16[n], the domains of some rows: mapped for a root, gathered for a subset."""
        column = self._domain_column
        return column[rows] if self.kind == "corpus" else column[self._mapped_ids[rows]]

    @cached_property
    def _domain_column(self) -> np.ndarray:
        """uint16[M], mapped: one number for every instance of the root."""
        if self.kind == "subset":
            return self.root()._domain_column
        return self._column(".domain.npy", np.uint16, "domain_hash")

    def prompt_length(self, row: int) -> int:
        """Leading tokens of an instance that were given to the model that generated the rest.

        Refuses a corpus that was not generated.
        """
        if self._prompt_column is None:
            raise LineageError(
                f"{self.prefix} was not generated, so it has no prompts: make one with `generate`"
            )
        return int(self._prompt_column[row if self.kind == "corpus" else self._mapped_ids[row]])

    @property
    def is_generated(self) -> bool:
        """Whether its instances are prompts and what a model continued them with."""
        return self._prompt_column is not None

    @cached_property
    def _prompt_column(self) -> np.ndarray | None:
        """int32[M], mapped: one number for every instance of the root."""
        if self.kind == "subset":
            return self.root()._prompt_column
        if "prompt_len_hash" not in self.manifest.content:
            return None
        return self._column(".prompt_len.npy", np.int32, "prompt_len_hash")

    def _column(self, suffix: str, kind: npt.DTypeLike, hash_name: str) -> np.ndarray:
        """A root's column, mapped; refuses one that changed."""
        path = with_suffix(self.prefix, suffix)
        column = load_column(path, self.num_instances, kind)
        if hash_file(path) != self.manifest.content[hash_name]:
            raise DataError(f"{path} changed since the corpus was written: restore it")
        return column

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids; refuses another one in its place."""
        facts = self.manifest.content["tokenizer"]
        tokenizer = load_saved(self.manifest_path.parent / facts["path"])
        if tokenizer.fingerprint != facts["fingerprint"]:
            raise LineageError(
                f"the tokenizer at {tokenizer.source} has fingerprint {tokenizer.fingerprint}, but "
                f"{self.prefix} was made with {facts['fingerprint']}: restore that one"
            )
        return tokenizer

    def parent(self) -> Corpus | None:
        """What this subset was chosen from; None for a root corpus."""
        return self._open_parent("parent") if self.kind == "subset" else None

    def root(self) -> Corpus:
        """The corpus in whose rows ids count; a root is its own."""
        return self._open_parent("root") if self.kind == "subset" else self

    def refuse_to_be_replaced(self, prefix: Path) -> None:
        """Refuse to make a corpus of this one at `prefix` where that deletes what it is made of."""
        found: Corpus | None = self
        while found is not None:
            if found.prefix.resolve() == prefix.resolve():
                raise ConfigError(f"the result cannot take the place of its own input {prefix}")
            found = found.parent()

    def as_parent(self, manifest_path: Path) -> Parent:
        """This corpus as an input named in the manifest at `manifest_path`."""
        return Parent.of(self.fingerprint, self.prefix, named_in=manifest_path)

    def _open_parent(self, role: str) -> Corpus:
        path = self.manifest.parent_path(self.manifest_path, role)
        corpus = Corpus.open(path)
        expected = self.manifest.parents[role].fingerprint
        if corpus.fingerprint != expected:
            raise LineageError(
                f"the {role} of {self.prefix} was {expected}, but {path} is now "
                f"{corpus.fingerprint}: restore it, or make the subset again"
            )
        return corpus

    def _check(self) -> None:
        content = self.manifest.content
        for name, found in (
            ("num_instances", int(self._starts[-1])),
            ("num_tokens", sum(shard.num_tokens for shard in self._shards)),
        ):
            if found != content[name]:
                raise DataError(
                    f"{self.manifest_path}: {name} is {content[name]}, but the shards hold {found}"
                )
        made = (
            root_fingerprint(content)
            if self.kind == "corpus"
            else subset_fingerprint(
                self.root_fingerprint, self.num_instances, blocks(self._mapped_ids)
            )
        )
        if made != self.fingerprint:
            raise DataError(
                f"{self.manifest_path} has fingerprint {self.fingerprint}, but its content gives "
                f"{made}: the manifest or the ids were changed; restore them"
            )
        self._refuse_rewritten_root()

    def _refuse_rewritten_root(self) -> None:
        """A rewritten root may put other tokens under the same links; a missing one may not."""
        if self.kind == "corpus":
            return
        path = with_suffix(self.manifest.parent_path(self.manifest_path, "root"), ".json")
        if path.exists() and read_manifest(path).fingerprint != self.root_fingerprint:
            raise LineageError(
                f"{self.prefix} was chosen from root corpus {self.root_fingerprint}, but "
                f"{path} was rewritten since: restore the root, or make the subset again"
            )


def _open_shard(prefix: Path, facts: dict[str, Any]) -> Shard:
    stock = prefix.with_name(facts["name"])
    idx, bin_path = with_suffix(stock, ".idx"), with_suffix(stock, ".bin")
    index = read_index(idx)
    if hash_file(idx) != facts["idx_hash"]:
        raise DataError(f"{idx} changed since it was written (its hash differs): restore it")
    if not bin_path.exists():
        where = f"; it links to {bin_path.readlink()}" if bin_path.is_symlink() else ""
        raise DataError(f"{bin_path} does not exist{where}: restore the root corpus")
    size = bin_path.stat().st_size
    if size != facts["bin_bytes"]:
        raise DataError(
            f"{bin_path} has {size} bytes, but had {facts['bin_bytes']} when it was written: "
            f"it is truncated or was replaced; restore it"
        )
    num_tokens = check_pointers(index, bin_bytes=size, path=idx)
    tokens = np.memmap(bin_path, np.uint8, mode="r")
    return Shard(
        prefix=stock, index=index, tokens=tokens, file=TokenFile(bin_path), facts=facts,
        num_tokens=num_tokens,
    )  # fmt: skip
