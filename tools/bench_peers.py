"""The peers, re-stated: the plainest faithful form of what others do, and plain reads and writes.

Each is the loop of the original without its options; where there was a choice, the faster one was
taken (the Megatron form calls `tokenizers` itself, not `transformers`).

``python bench_peers.py INPUT TOKENIZER EOD PREFIX WORKERS`` is the Megatron pipeline in a process
of its own, because its pool forks; it prints the seconds after its imports.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tokenizers

_BLOCK = 1 << 23
_state: dict[str, Any] = {}  # what a forked worker of the pool tokenizes with


def megatron_pipeline(
    path: Path, tokenizer: Path, eod: int, prefix: Path, *, workers: int
) -> float:
    """Megatron-LM's preprocess_data.py: a pool, a document at a time, one serial stock writer.

    Returns its seconds without imports; ``prefix.bin`` and ``prefix.idx`` are fsynced.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    start = time.perf_counter()
    size = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(size))
    context = multiprocessing.get_context("fork")
    with (
        path.open(encoding="utf-8") as lines,
        context.Pool(workers, _start_worker, (str(tokenizer / "tokenizer.json"), eod)) as pool,
    ):
        for ids, _ in pool.imap(_encode_line, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    fsync(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
    return time.perf_counter() - start


def import_megatron() -> None:
    """Do the slow imports of the stock writer before anything is timed."""
    importlib.import_module("megatron.core.datasets.indexed_dataset")


def _start_worker(tokenizer: str, eod: int) -> None:
    _state["tokenizer"], _state["eod"] = tokenizers.Tokenizer.from_file(tokenizer), eod


def _encode_line(line: str) -> tuple[list[int], int]:
    ids = _state["tokenizer"].encode(json.loads(line)["text"], add_special_tokens=False).ids
    return [*ids, _state["eod"]], len(line)


def megatron_in_child(
    path: Path, tokenizer: Path, eod: int, prefix: Path, *, workers: int
) -> float:
    """`megatron_pipeline` in a fresh process."""
    words = [sys.executable, __file__, *map(str, (path, tokenizer, eod, prefix, workers))]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def batched_pipeline(path: Path, tokenizer: Path, eod: int, prefix: Path) -> None:
    """Hugging Face batches of 1,000 documents on all cores, into the stock writer; fsynced."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    engine = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    dtype = DType.optimal_dtype(engine.get_vocab_size())
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    with path.open("rb") as lines:
        while batch := list(islice(lines, 1000)):
            texts = [orjson.loads(line)["text"] for line in batch]
            for item in engine.encode_batch_fast(texts, add_special_tokens=False):
                builder.add_document(np.array([*item.ids, eod], dtype), [len(item.ids) + 1])
    builder.finalize(f"{prefix}.idx")
    fsync(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))


def flat_texts(engine: Any, batches: Iterable[Sequence[str]]) -> int:
    """`fastokens` alone on texts in memory; returns the number of ids. Its own refusals are kept.

    A batch with a document that it refuses is encoded again without that document.
    """
    total = 0
    for batch in batches:
        total += len(_flat(engine, batch)) // 4
    return total


def _flat(engine: Any, batch: Sequence[str]) -> bytes:
    try:
        return bytes(engine.encode_batch_flat(batch)[0])
    except ValueError:
        if len(batch) == 1:
            return b""
        half = len(batch) // 2
        return _flat(engine, batch[:half]) + _flat(engine, batch[half:])


def flat_loop(engine: Any, path: Path, output: Path) -> None:
    """The plainest fast loop: orjson, flat encoding, write, fsync. No separator, no packing."""
    with path.open("rb") as lines, output.open("wb") as file:
        for texts in text_batches(orjson.loads(line)["text"] for line in lines):
            file.write(_flat(engine, texts))
        file.flush()
        os.fsync(file.fileno())


def text_batches(texts: Iterable[str], size: int = 8_000_000) -> Iterator[list[str]]:
    """Lists of texts of about `size` characters."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def copy_loop(source: Path, kept: np.ndarray, prefix: Path) -> None:
    """MiniPLM's construct_pretrain_data.py: every kept instance copied in a Python loop; fsynced.

    The released reader and builder are those of Megatron, with other names.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    dataset = IndexedDataset(str(source))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dataset.index.dtype)
    for row in kept.tolist():
        tokens = dataset[row]
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    fsync(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))


def numpy_top_k(keys: np.ndarray, k: int) -> np.ndarray:
    """The best numpy form of an exact choice: partition, then flatnonzero; ties to lower rows."""
    threshold = np.partition(keys, len(keys) - k)[len(keys) - k]
    above = np.flatnonzero(keys > threshold)
    tied = np.flatnonzero(keys == threshold)[: k - len(above)]
    return np.sort(np.concatenate([above, tied])) if len(tied) else above


def read_once(paths: Iterable[Path]) -> int:
    """Read files front to back into one buffer; returns the bytes."""
    buffer, total = bytearray(_BLOCK), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def write_bytes(data: memoryview | bytes, path: Path) -> None:
    """Write bytes from memory front to back, fsynced."""
    view = memoryview(data).cast("B")
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(view), _BLOCK):
            file.write(view[start : start + _BLOCK])
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """``cp``, fsynced."""
    subprocess.run(["cp", "--reflink=never", source, target], check=True)
    fsync(target)


def fsync(*paths: Path) -> None:
    """Make files durable."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def evict(paths: Iterable[Path]) -> None:
    """Drop files from the page cache, so that the next reader finds them on the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    text, folder, separator, prefix_word, pool_size = sys.argv[1:]
    seconds = megatron_pipeline(
        Path(text), Path(folder), int(separator), Path(prefix_word), workers=int(pool_size)
    )
    print(seconds)
