"""Writes a subset: chosen rows of a corpus, as view indices over the root's tokens.

A shard of the subset is an ``.idx`` of its own (20 bytes an instance and 42) whose pointers lead
into the root's ``.bin``, and a link to that ``.bin`` under the name that Megatron looks for.
``PREFIX.ids.npy`` (int64, ascending) holds the root ids. No token is copied.

Stock readers must take a subset instance by instance, as GPTDataset does: a slice ``dataset[a:b]``
reads one contiguous run, and merge_datasets recomputes the pointers. Where that does not do
(slices, merging, object stores), a materialised subset has its own ``.bin`` with just its tokens
and is read in every stock way. What is chosen, and so the fingerprint, is the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import (
    NO_PARENTS,
    Manifest,
    Parent,
    read_manifest,
    relative_path,
)
from megatron_miniplm.data.corpus import Corpus, subset_fingerprint
from megatron_miniplm.data.indexed import HEADER, MAGIC, VERSION, dtype_code
from megatron_miniplm.data.links import Link
from megatron_miniplm.data.mapped import all_cores
from megatron_miniplm.data.rows import RowMask
from megatron_miniplm.data.staging import Staging, with_suffix, writing
from megatron_miniplm.data.subset_files import ShardJob, chosen_ids, shard_jobs, write_ids
from megatron_miniplm.parallel.ranks import ONE_RANK, Ranks


def view_index_reference(
    lengths: np.ndarray, pointers: np.ndarray, rows: np.ndarray, dtype: np.dtype
) -> bytes:
    """The definition of ``_C.write_masked_index`` in numpy: bytes of the ``.idx`` of `rows`.

    int32[N] tokens, int64[N] bytes and int64[K] rows; for tests, and to be read.
    """
    count = len(rows)
    return b"".join(
        (
            HEADER.pack(MAGIC, VERSION, dtype_code(dtype), count, count + 1),
            lengths[rows].astype("<i4").tobytes(),
            pointers[rows].astype("<i8").tobytes(),
            np.arange(count + 1, dtype="<i8").tobytes(),
        )
    )


def write_subset(  # noqa: PLR0913 - what a subset is, keyword by keyword
    parent: Corpus,
    rows: np.ndarray | Sequence[RowMask],
    prefix: Path,
    *,
    config: Mapping[str, Any],
    selection: Mapping[str, Any],
    extra_parents: Mapping[str, Parent] = NO_PARENTS,
    link: Link = "relative",
    materialize: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ONE_RANK,
) -> Path:
    """Make the subset of `parent` with `rows` and return its manifest's path.

    `rows` is int64[K], ascending, or one mask for each of the parent's shards. `selection` goes
    into the manifest as it is. With `materialize`, tokens are copied instead of linked; the
    fingerprint, which says what is chosen, is the same. With several `ranks`, all of them call this
    with the same arguments, each writes some of the shards, and rank 0 publishes.

    A finished subset of the same rows and `config` is left as it is; any other finished artifact is
    refused, unless `overwrite`. Refuses no rows at all, rows that repeat or are out of range, and
    the prefix of the parent or the root.
    """
    prefix = Path(prefix)
    masks = rows if not isinstance(rows, np.ndarray) else _masks_of(rows, parent)
    count = _check_masks(masks, parent)
    _refuse_own_input(prefix, parent)
    config = json.loads(json.dumps(dict(config), default=str))
    fingerprint = ranks.lead(
        lambda: subset_fingerprint(parent.root_fingerprint, count, chosen_ids(parent, masks))
    )
    staging = Staging(prefix, kind="subset", overwrite=overwrite)
    if not overwrite and ranks.lead(lambda: _is_finished(prefix, fingerprint, config)):
        get_logger().info("%s is finished already, with these very settings", prefix)
        ranks.lead(staging.sweep)
        return staging.manifest_path
    with writing(prefix), ExitStack() as stack:
        ranks.lead(lambda: stack.enter_context(staging) and None)
        shards = _write_shards(
            shard_jobs(parent, masks), staging, link=link, materialize=materialize, ranks=ranks
        )

        def publish() -> Path:
            write_ids(staging.file(".ids.npy"), parent, masks)
            content = _content(parent, shards, staging.manifest_path)
            manifest = Manifest(
                kind="subset",
                fingerprint=fingerprint,
                parents=_parents(parent, staging.manifest_path) | dict(extra_parents),
                config=config,
                content=content | {"materialized": materialize, "selection": selection},
            )
            return staging.commit(manifest)

        return ranks.lead(publish)


def _masks_of(rows: np.ndarray, parent: Corpus) -> list[RowMask]:
    """Rows of the whole corpus as one mask a shard."""
    rows = np.ascontiguousarray(rows, np.int64)
    if len(rows) and (rows[0] < 0 or rows[-1] >= len(parent) or (np.diff(rows) <= 0).any()):
        raise DataError(
            f"rows {rows[0]} to {rows[-1]} of {parent.prefix} ({len(parent)} instances) must "
            f"ascend strictly and be in range"
        )
    starts = parent.shard_starts
    bounds = np.searchsorted(rows, starts)
    return [
        RowMask.of_rows(rows[bounds[at] : bounds[at + 1]] - start, int(starts[at + 1] - start))
        for at, start in enumerate(starts[:-1])
    ]


def _check_masks(masks: Sequence[RowMask], parent: Corpus) -> int:
    """How many rows are chosen; refuses none, and masks of another corpus."""
    sizes = [mask.num_rows for mask in masks]
    if sizes != np.diff(parent.shard_starts).tolist():
        raise DataError(f"masks of {sizes} rows do not fit the shards of {parent.prefix}")
    count = sum(mask.count() for mask in masks)
    if not count:
        raise ConfigError(f"no instance of {parent.prefix} is chosen: a subset needs at least one")
    return count


def _refuse_own_input(prefix: Path, parent: Corpus) -> None:
    """With --overwrite, a subset at its own input's prefix would delete what it links to."""
    inputs = [parent.prefix]
    if parent.kind == "subset":
        inputs += [parent.manifest.parent_path(parent.manifest_path, r) for r in ("parent", "root")]
    if os.path.realpath(prefix) in map(os.path.realpath, inputs):
        raise ConfigError(f"the subset cannot take the place of its own input {prefix}")


def _is_finished(prefix: Path, fingerprint: str, config: Mapping[str, Any]) -> bool:
    path = with_suffix(prefix, ".json")
    if not path.exists():
        return False
    found = read_manifest(path)
    return found.fingerprint == fingerprint and found.config == config


def _write_shards(
    jobs: Sequence[ShardJob],
    staging: Staging,
    *,
    link: Link,
    materialize: bool,
    ranks: Ranks,
) -> list[dict[str, Any]]:
    """Entries of all shards for the manifest; every rank writes its share, with threads."""
    mine = [jobs[number] for number in ranks.share(len(jobs))]
    workers = max(1, min(all_cores(), len(mine)))
    threads = max(1, all_cores() // workers)

    def write(job: ShardJob) -> dict[str, Any]:
        return job.write(staging, link=link, materialize=materialize, threads=threads)

    def write_mine() -> list[dict[str, Any]]:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(write, mine))

    return [facts for part in ranks.each(write_mine) for facts in part]


def _parents(parent: Corpus, manifest_path: Path) -> dict[str, Parent]:
    """The parent and the root; both by where they lie as seen from the subset."""
    if parent.kind == "corpus":
        root = parent.as_parent(manifest_path)
    else:
        path = parent.manifest.parent_path(parent.manifest_path, "root")
        root = Parent.of(parent.root_fingerprint, path, named_in=manifest_path)
    return {"parent": parent.as_parent(manifest_path), "root": root}


def _content(parent: Corpus, shards: list[dict[str, Any]], manifest_path: Path) -> dict[str, Any]:
    kept = ("seq_length", "vocab_size", "eod_id", "dtype", "domain_names")
    tokenizer = parent.manifest.content["tokenizer"]
    folder = parent.manifest_path.parent / tokenizer["path"]
    return {
        "num_instances": sum(shard["num_instances"] for shard in shards),
        "num_tokens": sum(shard["num_tokens"] for shard in shards),
        **{name: parent.manifest.content[name] for name in kept},
        "tokenizer": {
            "fingerprint": tokenizer["fingerprint"],
            "path": relative_path(folder, manifest_path),
        },
        "shards": shards,
    }
