"""The files of a subset: one view index (or copied tokens) a shard, and the column of root ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_miniplm._C import copy_chosen_tokens, write_masked_index
from megatron_miniplm.core.errors import DataError
from megatron_miniplm.core.manifest import hash_file
from megatron_miniplm.data.corpus import Corpus, Shard
from megatron_miniplm.data.indexed import dtype_code
from megatron_miniplm.data.links import Link, link_tokens
from megatron_miniplm.data.mapped import drop_pages, mapping_of
from megatron_miniplm.data.rows import RowMask
from megatron_miniplm.data.staging import Staging, with_suffix


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """One shard of a subset, to be written by whichever thread or rank."""

    source: Shard
    mask: RowMask
    suffix: str
    """What its files are called after the prefix, such as ``-00000-of-00004``."""

    def write(
        self, staging: Staging, *, link: Link, materialize: bool, threads: int
    ) -> dict[str, Any]:
        """Write both files and return the shard's entry in the manifest."""
        idx, tokens = staging.file(self.suffix + ".idx"), staging.file(self.suffix + ".bin")
        count, num_tokens = self._write_index(idx, contiguous=materialize, threads=threads)
        facts = self.source.facts
        bin_facts = {"bin_bytes": facts["bin_bytes"], "bin_hash": facts["bin_hash"]}
        if materialize:
            bin_facts = self._copy_tokens(tokens, num_tokens, threads)
        else:
            source = with_suffix(self.source.prefix, ".bin")
            link_tokens(source, tokens, staging.prefix.parent, link)
        return {
            "name": staging.prefix.name + self.suffix,
            "num_instances": count,
            "num_tokens": num_tokens,
            **bin_facts,
            "idx_hash": hash_file(idx),
            "root_shard": facts.get("root_shard", facts["name"]),
        }

    def _write_index(self, path: Path, *, contiguous: bool, threads: int) -> tuple[int, int]:
        with path.open("wb") as file:
            try:
                return write_masked_index(
                    file.fileno(),
                    **self._view(),
                    dtype_code=dtype_code(self.source.index.dtype),
                    contiguous=contiguous,
                    threads=threads,
                )
            except ValueError as error:
                raise DataError(
                    f"{self.source.prefix}.idx changed while it was read: {error}"
                ) from error

    def _copy_tokens(self, path: Path, num_tokens: int, threads: int) -> dict[str, Any]:
        source = with_suffix(self.source.prefix, ".bin")
        expected = num_tokens * self.source.index.dtype.itemsize
        with source.open("rb") as parent, path.open("wb") as file:
            copied = copy_chosen_tokens(
                parent.fileno(), file.fileno(), **self._view(), threads=threads
            )
        size = path.stat().st_size
        if not copied == size == expected:
            raise DataError(
                f"{path} has {size} bytes ({copied} copied), but {num_tokens} tokens take "
                f"{expected}: the parent changed meanwhile, or the file system is broken"
            )
        return {"bin_bytes": size, "bin_hash": hash_file(path)}

    def _view(self) -> dict[str, Any]:
        index = self.source.index
        return {
            "lengths": index.lengths,
            "pointers": index.pointers,
            "mask": self.mask.bits,
            "bytes_per_token": index.dtype.itemsize,
            "bin_bytes": self.source.facts["bin_bytes"],
            "drop_behind": mapping_of(index.raw) is not None,
        }


def shard_jobs(parent: Corpus, masks: Sequence[RowMask]) -> list[ShardJob]:
    """A job for every shard of `parent` with a chosen row."""
    used = [at for at, mask in enumerate(masks) if mask.bits.any()]
    return [
        ShardJob(
            source=parent.opened_shards[at],
            mask=masks[at],
            suffix=f"-{number:05d}-of-{len(used):05d}",
        )
        for number, at in enumerate(used)
    ]


def chosen_ids(parent: Corpus, masks: Sequence[RowMask]) -> Iterator[np.ndarray]:
    """int64 root ids of the chosen rows, ascending, block by block."""
    for start, mask in zip(parent.shard_starts, masks, strict=False):
        for rows in mask.blocks():
            rows += start
            if parent.id_column is None:
                yield rows
            else:
                yield parent.id_column[rows]
                drop_pages(parent.id_column)


def write_ids(path: Path, parent: Corpus, masks: Sequence[RowMask]) -> None:
    """Write ``PREFIX.ids.npy`` in bounded memory."""
    count = sum(mask.count() for mask in masks)
    header = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in chosen_ids(parent, masks):
            file.write(np.ascontiguousarray(block, "<i8").data)
