"""Cases from scores to a chosen subset: selection, indices, copies, and corpora that exist."""

from __future__ import annotations

import shutil
from pathlib import Path

import bench_peers as peers
import numpy as np
from bench_core import Bench, Contestant, require_equal
from bench_preprocess import remove
from bench_text import make_tokenizer

from megatron_miniplm._C import write_masked_index
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.indexed import dtype_code
from megatron_miniplm.data.rows import RowMask
from megatron_miniplm.data.subset import view_index_reference, write_subset
from megatron_miniplm.data.tokenizers import load_tokenizer
from megatron_miniplm.data.writer import CorpusWriter

MB = 1e6


def make_corpus(
    bench: Bench, count: int, shortest: int, longest: int, tokenizer_folder: Path | None = None
) -> Corpus:
    """A corpus of `count` random instances of `shortest` to `longest` tokens, int32.

    Their ids are those of a tokenizer, by default of that of most cases.
    """
    generator = np.random.default_rng(1)
    tokenizer = load_tokenizer(tokenizer_folder or make_tokenizer(bench)[1])
    with CorpusWriter(
        bench.scratch / "corpus", tokenizer=tokenizer, seq_length=longest - 1, config={},
        instances_per_shard=max(count, 1),
    ) as writer:  # fmt: skip
        block = max(1, 20_000_000 // longest)
        for start in range(0, count, block):
            lengths = generator.integers(
                shortest, longest + 1, min(block, count - start), dtype=np.int32
            )
            tokens = generator.integers(1, tokenizer.vocab_size, lengths.sum(), dtype=np.int32)
            writer.add(tokens, lengths, 0)
        writer.finish(["random"], {})
    return Corpus.open(bench.scratch / "corpus")


def choose(count: int, kept: int) -> np.ndarray:
    """int64[kept] ascending rows out of `count`, at random."""
    keys = np.random.default_rng(2).random(count, np.float32)
    return peers.numpy_top_k(keys, kept)


def view_index(bench: Bench) -> None:
    """Writing the index of a subset: the bytes alone, and the whole finished artifact."""
    count = bench.sizes.pick(20_000, 20_000_000)
    corpus = make_corpus(bench, count, 2, 3)
    rows = choose(count, count // 2)
    shard = corpus.opened_shards[0]
    lengths, pointers = np.array(shard.index.lengths), np.array(shard.index.pointers)
    mask = RowMask.of_rows(rows, count).bits
    expected = view_index_reference(lengths, pointers, rows, corpus.dtype)
    with_ids = expected + rows.tobytes()

    def native() -> Path:
        path = bench.scratch / "native.idx"
        with path.open("wb") as file:
            write_masked_index(
                file.fileno(), lengths=lengths, pointers=pointers, mask=mask,
                dtype_code=dtype_code(corpus.dtype), bytes_per_token=corpus.dtype.itemsize,
                bin_bytes=shard.facts["bin_bytes"],
            )  # fmt: skip
        peers.fsync(path)
        return path

    def with_numpy() -> Path:
        path = bench.scratch / "numpy.idx"
        path.write_bytes(view_index_reference(lengths, pointers, rows, corpus.dtype))
        peers.fsync(path)
        return path

    timings = bench.race(
        Contestant(name="write_masked_index, fsynced", run=native),
        Contestant(name="numpy writer, fsynced", run=with_numpy),
        Contestant(
            name="write_subset: ids, index, hashes, manifest, fsynced",
            run=lambda: _subset(corpus, rows, bench.scratch / "subset"),
            prepare=[lambda: remove(bench.scratch / "subset")],
        ),
        Contestant(
            name="sequential fsynced write of the same bytes",
            run=lambda: peers.write_bytes(expected, bench.scratch / "raw"),
        ),
        Contestant(
            name="sequential fsynced write of index and ids",
            run=lambda: peers.write_bytes(with_ids, bench.scratch / "raw"),
        ),
        work=f"{len(rows):,} of {count:,} instances, {len(expected) / MB:.1f} MB",
    )
    ours, in_numpy, whole, limit, limit_whole = timings.values()
    for each in (ours, in_numpy):
        require_equal(each.name, each.result.read_bytes() == expected, "its bytes differ")
    chosen = Corpus.open(whole.result)
    require_equal(whole.name, np.array_equal(chosen.ids, rows), "its ids differ")
    millions = len(rows) / 1e6
    bench.rate(
        "view index", "M instances/s", millions, ours=ours, peers=[in_numpy], limit=limit,
        error_ours=0.0, errors={in_numpy.name: 0.0},
    )  # fmt: skip
    bench.rate("whole subset", "M instances/s", millions, ours=whole, limit=limit_whole)
    bench.row("token bytes copied", "bytes", ours=own_token_bytes(bench.scratch / "subset"))


def _subset(corpus: Corpus, rows: np.ndarray, prefix: Path, *, materialize: bool = False) -> Path:
    facts = {"selector": "benchmark"}
    write_subset(corpus, rows, prefix, config={}, selection=facts, materialize=materialize)
    return prefix


def own_token_bytes(prefix: Path) -> int:
    """Bytes in ``.bin`` files of its own, links not followed."""
    found = prefix.parent.glob(f"{prefix.name}-*.bin")
    return sum(path.stat().st_size for path in found if not path.is_symlink())


def all_bytes(prefix: Path) -> int:
    """Bytes of an artifact's own files, links not followed."""
    found = prefix.parent.glob(f"{prefix.name}[-.]*")
    return sum(path.stat().st_size for path in found if path.is_file() and not path.is_symlink())


def miniplm_loop(bench: Bench) -> None:
    """Half of a corpus as a subset, against copying every kept instance in a Python loop."""
    kept = bench.sizes.pick(300, 200_000)
    corpus = make_corpus(bench, 2 * kept, 1025, 1025)
    rows = choose(2 * kept, kept)
    ours_prefix, copy_prefix = bench.scratch / "subset", bench.scratch / "copied"
    timings = bench.race(
        Contestant(
            name="write_subset, fsynced",
            run=lambda: _subset(corpus, rows, ours_prefix),
            prepare=[lambda: remove(ours_prefix)],
        ),
        Contestant(
            name="MiniPLM construct_pretrain_data.py loop, fsynced (re-stated)",
            run=lambda: peers.copy_loop(corpus.shards[0], rows, copy_prefix),
            prepare=[peers.import_megatron, lambda: remove(copy_prefix)],
            most_rounds=2,
        ),
        work=f"{kept:,} of {2 * kept:,} instances of 1,025 int32 tokens",
    )
    ours, loop = timings.values()
    chosen = Corpus.open(ours_prefix)
    copied = np.memmap(copy_prefix.with_name("copied.bin"), corpus.dtype).reshape(kept, 1025)
    for row in range(0, kept, max(1, kept // 1000)):
        same = np.array_equal(chosen.tokens(row), copied[row])
        require_equal(ours.name, same, f"instance {row} differs from the copied one")
    bench.rate(
        "subset made", "instances/s", kept, ours=ours, peers=[loop], error_ours=0.0,
        errors={loop.name: 0.0},
    )  # fmt: skip
    bench.row(
        "bytes written an instance", "bytes", ours=all_bytes(ours_prefix) / kept,
        peer=(loop.name, all_bytes(copy_prefix) / kept), lower_is_better=True,
    )  # fmt: skip


def materialize(bench: Bench) -> None:
    """Half of a corpus as tokens of its own, against ``cp`` of a file of the same size."""
    count = bench.sizes.pick(600, 800_000)
    corpus = make_corpus(bench, count, 100, 1025)
    rows = choose(count, count // 2)
    prefix, copy = bench.scratch / "subset", bench.scratch / "copy.bin"
    result = bench.scratch / "result.bin"
    _subset(corpus, rows, prefix, materialize=True)
    shutil.copyfile(prefix.with_name("subset-00000-of-00001.bin"), result)
    size = result.stat().st_size / MB
    # Both sources are in the page cache, both results on the disk.
    timings = bench.race(
        Contestant(
            name="write_subset, materialized: hashes, index, ids, manifest, fsynced",
            run=lambda: _subset(corpus, rows, prefix, materialize=True),
            prepare=[lambda: remove(prefix)],
        ),
        Contestant(
            name="cp of the same bytes, fsynced",
            run=lambda: peers.copy_file(result, copy),
            prepare=[lambda: copy.unlink(missing_ok=True)],
        ),
        work=f"{len(rows):,} of {count:,} instances, {size:,.0f} MB of tokens",
    )
    ours, limit = timings.values()
    chosen = Corpus.open(prefix)
    for row in range(0, len(rows), max(1, len(rows) // 1000)):
        same = np.array_equal(chosen.tokens(row), corpus.tokens(int(rows[row])))
        require_equal(ours.name, same, f"instance {row} differs from the corpus's")
    bench.rate("tokens copied", "MB/s", size, ours=ours, limit=limit, error_ours=0.0)
