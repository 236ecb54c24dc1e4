"""Cases of selection: K of N rows from the score files of two models, in shards.

``python bench_selection.py FOLDER K`` selects in a process of its own, so that its memory can be
measured: it writes one mask a shard and prints seconds and passes as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import bench_peers as peers
import numpy as np
from bench_core import Bench, Clocked, Contestant, require_equal
from bench_process import Figures, run_measured

from megatron_miniplm.selection.difference import difference
from megatron_miniplm.selection.key_source import KeySource, ScoreColumns, ShardColumns
from megatron_miniplm.selection.streaming import Selection, stream_top_k

_BLOCK_ROWS = 1 << 22
_SHARDS = 16
_PASSES = "two plain sequential passes over the same files"


@dataclass(frozen=True, kw_only=True)
class ScoreFiles:
    """Score columns on disk: ``TEACHER|REFERENCE-SHARD-COLUMN.npy``."""

    folder: Path
    num_shards: int

    @property
    def paths(self) -> list[Path]:
        """All files, in the order in which a pass reads them."""
        return [
            self._path(role, shard, column)
            for shard in range(self.num_shards)
            for role in ("teacher", "reference")
            for column in ("sum_nll", "num_tokens")
        ]

    def _path(self, role: str, shard: int, column: str) -> Path:
        return self.folder / f"{role}-{shard:02d}-{column}.npy"

    @classmethod
    def write(cls, folder: Path, rows: int, num_shards: int) -> ScoreFiles:
        """Random scores of two models that scored the same tokens; every byte is on the disk."""
        made = cls(folder=folder, num_shards=num_shards)
        folder.mkdir()
        generator = np.random.default_rng(1)
        bounds = np.linspace(0, rows, num_shards + 1).astype(np.int64)
        for shard, count in enumerate(np.diff(bounds)):
            tokens = generator.integers(64, 1025, count, dtype=np.int32)
            for role, mean in (("teacher", 2.4), ("reference", 3.1)):
                nll = generator.standard_normal(count, np.float32) * np.float32(0.25)
                nll += np.float32(mean)
                np.maximum(nll, 0, out=nll)
                nll *= tokens
                np.save(made._path(role, shard, "sum_nll"), nll)
                np.save(made._path(role, shard, "num_tokens"), tokens)
        peers.fsync(*made.paths)
        return made

    def load(self, role: str, shard: int) -> ScoreColumns:
        """One model's columns of one shard, mapped."""
        columns = {
            name: np.load(self._path(role, shard, name), mmap_mode="r")
            for name in ("sum_nll", "num_tokens")
        }
        return ScoreColumns(**columns)

    def keys(self, shard: int) -> Iterator[np.ndarray]:
        """float64 keys of a shard in numpy, a block of rows at a time."""
        teacher, reference = self.load("teacher", shard), self.load("reference", shard)
        for start in range(0, len(teacher.sum_nll), _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            yield reference.nll(part, per_token=True) - teacher.nll(part, per_token=True)


def select_streaming(files: ScoreFiles, k: int) -> Selection:
    """Ours: the K highest differences, from the files to one mask a shard."""
    shards, first = [], 0
    for number in range(files.num_shards):
        teacher, reference = files.load("teacher", number), files.load("reference", number)
        rows = len(teacher.sum_nll)
        shards.append(
            ShardColumns(num_rows=rows, first_row=first, teacher=teacher, reference=reference)
        )
        first += rows
    return stream_top_k(KeySource(shards=shards, selector=difference), np.array([k]))


def select_numpy(files: ScoreFiles, k: int) -> np.ndarray:
    """The best numpy form, from the files to int64 rows: keys, partition, flatnonzero."""
    parts = [block for shard in range(files.num_shards) for block in files.keys(shard)]
    return peers.numpy_top_k(np.concatenate(parts), k)


def rows_of(selection: Selection) -> np.ndarray:
    """int64 rows through all shards, ascending."""
    found, first = [], 0
    for mask in selection.masks:
        found.append(mask.rows() + first)
        first += mask.num_rows
    return np.concatenate(found)


def two_passes(paths: Sequence[Path]) -> int:
    """The limit: everything read front to back, twice."""
    return peers.read_once(paths) + peers.read_once(paths)


def select(bench: Bench) -> None:
    """Half of the rows, files in the page cache: masks, rows, numpy, and plain reading."""
    rows = bench.sizes.pick(200_000, 100_000_000)
    k = rows // 2
    files = ScoreFiles.write(bench.scratch / "scores", rows, 2 if bench.sizes.quick else _SHARDS)
    timings = bench.race(
        Contestant(name="stream_top_k to masks", run=lambda: select_streaming(files, k)),
        Contestant(name="stream_top_k to rows", run=lambda: rows_of(select_streaming(files, k))),
        Contestant(
            name="numpy: keys, partition, flatnonzero",
            run=lambda: select_numpy(files, k),
            most_rounds=3,
        ),
        Contestant(name=_PASSES, run=lambda: two_passes(files.paths)),
        work=f"{k:,} of {rows:,} rows, page cache warm",
    )
    masks, listed, in_numpy, limit = timings.values()
    for name, found in ((masks.name, rows_of(masks.result)), (listed.name, listed.result)):
        require_equal(name, np.array_equal(found, in_numpy.result), "differs from numpy's rows")
    for metric, ours in (("rows to masks", masks), ("rows to row numbers", listed)):
        bench.rate(
            metric, "M rows/s", rows / 1e6, ours=ours, peers=[in_numpy], limit=limit,
            error_ours=0.0, errors={in_numpy.name: 0.0},
        )  # fmt: skip


def select_billion(bench: Bench) -> None:
    """Half of 1,000,000,000 rows in a process of its own, files not in the page cache."""
    if not (bench.sizes.full or bench.sizes.quick):
        bench.skip("1,000,000,000 rows, 16 GB on disk (--full)")
        return
    rows = bench.sizes.pick(100_000, 1_000_000_000)
    k = rows // 2
    files = ScoreFiles.write(bench.scratch / "scores", rows, _SHARDS)
    evict = [lambda: peers.evict(files.paths)]
    timings = bench.race(
        Contestant(
            name="stream_top_k to masks, own process",
            run=lambda: _select_in_child(files, k),
            prepare=evict,
            most_rounds=2,
        ),
        Contestant(name=_PASSES, run=lambda: two_passes(files.paths), prepare=evict, most_rounds=2),
        work=f"{k:,} of {rows:,} rows in {_SHARDS} shards, page cache cold",
    )
    ours, limit = timings.values()
    _check_masks(files, k)
    figures: Figures = ours.result
    bench.rate("rows to masks", "M rows/s", rows / 1e6, ours=ours, limit=limit, error_ours=0.0)
    for metric, peak in (
        ("peak resident memory", figures.peak_resident),
        ("peak anonymous memory", figures.peak_anonymous),
    ):
        bench.row(metric, "MB", ours=peak / 1e6, lower_is_better=True)


def _select_in_child(files: ScoreFiles, k: int) -> Clocked:
    figures = run_measured([sys.executable, __file__, str(files.folder), str(k)])
    return Clocked(json.loads(figures.output)["seconds"], figures)


def _check_masks(files: ScoreFiles, k: int) -> None:
    """The chosen rows are the K highest, ties to lower rows: by one numpy pass over all keys."""
    masks = [np.load(files.folder / f"mask-{at:02d}.npy") for at in range(files.num_shards)]
    chosen_low, dropped_high, kept = np.inf, -np.inf, 0
    for shard, bits in enumerate(masks):
        start = 0
        for keys in files.keys(shard):
            part = bits[start // 8 : -(-(start + len(keys)) // 8)]
            chosen = np.unpackbits(part, count=len(keys), bitorder="little").view(bool)
            kept += int(chosen.sum())
            chosen_low = min(chosen_low, keys[chosen].min(initial=np.inf))
            dropped_high = max(dropped_high, keys[~chosen].max(initial=-np.inf))
            start += len(keys)
    require_equal("stream_top_k", kept == k, f"keeps {kept} of {k} rows")
    require_equal("stream_top_k", chosen_low >= dropped_high, "drops a higher key than it keeps")


def _child(folder: Path, k: int) -> None:
    shards = len(list(folder.glob("teacher-*-sum_nll.npy")))
    start = time.perf_counter()
    selection = select_streaming(ScoreFiles(folder=folder, num_shards=shards), k)
    seconds = time.perf_counter() - start
    for number, mask in enumerate(selection.masks):
        np.save(folder / f"mask-{number:02d}.npy", mask.bits)
    print(json.dumps({"seconds": seconds, "passes": selection.passes}))


if __name__ == "__main__":
    _child(Path(sys.argv[1]), int(sys.argv[2]))
