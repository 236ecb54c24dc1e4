"""Writes a subset: chosen rows of a corpus, as view indices over the root's tokens.

A shard of the subset is an ``.idx`` of its own (20 bytes an instance and 42) whose pointers lead
into the root's ``.bin``, and a link to that ``.bin`` under the name that Megatron looks for.
``PREFIX.ids.npy`` (int64, ascending) holds the root ids. No token is copied.

Stock readers must take a subset instance by instance, as GPTDataset does: a slice ``dataset[a:b]``
reads one contiguous run, and merge_datasets recomputes the pointers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from megatron_miniplm._C import write_view_index
from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import Manifest, Parent, hash_file, read_manifest, relative_path
from megatron_miniplm.data.corpus import Corpus, Shard, subset_fingerprint
from megatron_miniplm.data.indexed import HEADER, MAGIC, VERSION, dtype_code
from megatron_miniplm.data.staging import Staging, with_suffix

Link = Literal["relative", "hard", "absolute"]
_NO_PARENTS: Mapping[str, Parent] = MappingProxyType({})


def view_index_reference(
    lengths: np.ndarray, pointers: np.ndarray, rows: np.ndarray, dtype: np.dtype
) -> bytes:
    """The definition of ``_C.write_view_index`` in numpy: bytes of the ``.idx`` of `rows`.

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


def write_subset(
    parent: Corpus,
    rows: np.ndarray,
    prefix: Path,
    *,
    config: Mapping[str, Any],
    selection: Mapping[str, Any],
    extra_parents: Mapping[str, Parent] = _NO_PARENTS,
    link: Link = "relative",
    overwrite: bool = False,
) -> Path:
    """Make the subset of `parent` with `rows` (int64[K], ascending) and return its manifest's path.

    `selection` goes into the manifest as it is. A finished subset of the same rows and `config` is
    left as it is; any other finished artifact is refused, unless `overwrite`. Refuses no rows at
    all, rows that repeat or are out of range, and the prefix of the parent or the root.
    """
    prefix, rows = Path(prefix), np.ascontiguousarray(rows, np.int64)
    _check_rows(rows, parent)
    _refuse_own_input(prefix, parent)
    ids = parent.ids[rows]
    fingerprint = subset_fingerprint(parent.root_fingerprint, ids)
    config = json.loads(json.dumps(dict(config), default=str))
    if not overwrite and _is_finished(prefix, fingerprint, config):
        get_logger().info("%s is finished already, with these very settings", prefix)
        return with_suffix(prefix, ".json")
    with Staging(prefix, kind="subset", overwrite=overwrite) as staging:
        np.save(staging.file(".ids.npy"), ids)
        shards = _write_shards(parent, rows, staging, link)
        manifest = Manifest(
            kind="subset",
            fingerprint=fingerprint,
            parents=_parents(parent, staging.manifest_path) | dict(extra_parents),
            config=config,
            content=_content(parent, shards, staging.manifest_path) | {"selection": selection},
        )
        return staging.commit(manifest)


def _check_rows(rows: np.ndarray, parent: Corpus) -> None:
    if not len(rows):
        raise ConfigError(f"no instance of {parent.prefix} is chosen: a subset needs at least one")
    if rows[0] < 0 or rows[-1] >= len(parent) or (np.diff(rows) <= 0).any():
        raise DataError(
            f"rows {rows[0]} to {rows[-1]} of {parent.prefix} ({len(parent)} instances) must "
            f"ascend strictly and be in range"
        )


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
    parent: Corpus, rows: np.ndarray, staging: Staging, link: Link
) -> list[dict[str, Any]]:
    """Write the ``.idx`` and the link of every parent shard with a chosen row."""
    bounds = np.searchsorted(rows, parent.shard_starts)
    used = np.flatnonzero(np.diff(bounds))
    shards = []
    for number, at in enumerate(used):
        suffix = f"-{number:05d}-of-{len(used):05d}"
        shard = parent.opened_shards[at]
        local = rows[bounds[at] : bounds[at + 1]] - parent.shard_starts[at]
        idx = staging.file(suffix + ".idx")
        num_tokens = _write_index(shard, local, idx)
        _link_tokens(shard, staging.file(suffix + ".bin"), staging.prefix.parent, link)
        shards.append(
            {
                "name": staging.prefix.name + suffix,
                "num_instances": len(local),
                "num_tokens": num_tokens,
                "bin_bytes": shard.facts["bin_bytes"],
                "bin_hash": shard.facts["bin_hash"],
                "idx_hash": hash_file(idx),
                "root_shard": shard.facts.get("root_shard", shard.facts["name"]),
            }
        )
    return shards


def _write_index(shard: Shard, rows: np.ndarray, path: Path) -> int:
    index = shard.index
    with path.open("wb") as file:
        try:
            return write_view_index(
                file.fileno(),
                lengths=index.lengths,
                pointers=index.pointers,
                rows=rows,
                dtype_code=dtype_code(index.dtype),
                bytes_per_token=index.dtype.itemsize,
                bin_bytes=shard.facts["bin_bytes"],
            )
        except ValueError as error:
            raise DataError(f"{shard.prefix}.idx changed while it was read: {error}") from error


def _link_tokens(shard: Shard, path: Path, folder: Path, link: Link) -> None:
    """Link the root's ``.bin`` at `path`, which will move to `folder`."""
    source = os.path.realpath(with_suffix(shard.prefix, ".bin"))
    if link == "hard":
        try:
            os.link(source, path)
        except OSError as error:
            raise ConfigError(
                f"no hard link from {folder} to {source}: {error.strerror}; hard links stay on "
                f"one file system, use --link relative"
            ) from error
    elif link == "absolute":
        path.symlink_to(source)
    else:
        # Links are resolved from where they physically lie, not from the path that led there.
        path.symlink_to(os.path.relpath(source, os.path.realpath(folder)))


def _parents(parent: Corpus, manifest_path: Path) -> dict[str, Parent]:
    """The parent and the root; both by where they lie as seen from the subset."""
    if parent.kind == "corpus":
        root = parent.as_parent(manifest_path)
    else:
        path = parent.manifest.parent_path(parent.manifest_path, "root")
        root = Parent(fingerprint=parent.root_fingerprint, path=relative_path(path, manifest_path))
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
