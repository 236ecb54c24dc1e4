"""The suite ``logits``: what a kept logit costs on disk, what is lost, and how fast it moves.

With ``--store``, of a real teacher's logits (``cache-logits --value-bits 32``); otherwise of random
ones whose ids follow Zipf's law. Errors are in the distillation loss with the residual bucket, the
mean over positions of its absolute difference from that of the float32 values, in nats. Two
students: one that knows the frequencies of tokens only, and one that is near the teacher.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard
from bench_core import Bench, Contestant, Suite, require_equal
from bench_rows import make_corpus

from megatron_miniplm._C import encode_logits
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.logit_codec import EXACT_BITS, Encoding, decode, encode
from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.data.record_writer import RecordWriter
from megatron_miniplm.data.sparse_logits import SparseLogits

ENCODINGS = tuple(Encoding(value_bits=bits) for bits in (4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16))
_PAPER_BYTES = 4.05  # of arXiv 2410.16215, ids not counted
_RECORD_BYTES = 32 + 32  # header, and its place in the index
_MB = 1e6


@dataclass(frozen=True)
class _Kept:
    """The instances of a case, and what both students think of their entries."""

    vocab: int
    instances: Sequence[SparseLogits]
    students: dict[str, list[tuple[np.ndarray, np.ndarray]]]
    """Of each instance: log-probs of the entries (float64[nnz]), mass off them (float64[n])."""

    @property
    def entries(self) -> int:
        return sum(each.nnz for each in self.instances)

    @property
    def positions(self) -> int:
        return sum(len(each) for each in self.instances)


def encodings(bench: Bench) -> None:
    """Bytes of a kept logit, all included, and the error of the loss, for every encoding."""
    kept = _kept(bench)
    for encoding in (*ENCODINGS, *_exact()):
        records = [encode(each, encoding, vocab_size=kept.vocab) for each in kept.instances]
        size = sum(len(each.payload) + _RECORD_BYTES for each in records)
        found = [decode(each.payload) for each in records]
        name = f"{encoding.value_bits} bits{', zstd' if encoding.zstd else ''}"
        for student, opinions in kept.students.items():
            differences = np.concatenate([
                np.abs(_losses(mine, *opinion) - _losses(theirs, *opinion))
                for mine, theirs, opinion in zip(found, kept.instances, opinions, strict=True)
            ])  # fmt: skip
            bench.row(
                f"kept logit, {name}, {student} student", "bytes", ours=size / kept.entries,
                peer=("paper, values only", _PAPER_BYTES), lower_is_better=True,
                error_ours=float(differences.mean()),
            )  # fmt: skip
        bench.row(f"position, {name}", "bytes", ours=size / kept.positions, lower_is_better=True,
                  error_ours=float(np.mean([*_divergences(found, kept.instances)])))  # fmt: skip


def id_codes(bench: Bench) -> None:
    """Bits of an id: ours as written, others as computed with their best parameter."""
    kept = _kept(bench)
    ours = 8 * sum(_id_bytes(each, kept.vocab) for each in kept.instances)
    others = np.sum([_other_codes(each, kept.vocab) for each in kept.instances], axis=0)
    for name, bits in zip(("Rice of gaps", "Elias-Fano", "plain"), others, strict=True):
        bench.row("id, interpolative", "bits", ours=ours / kept.entries,
                  peer=(name, float(bits) / kept.entries), lower_is_better=True)  # fmt: skip


def codec_speed(bench: Bench) -> None:
    """Positions a second through the codec, on one thread."""
    kept, encoding = _kept(bench), Encoding()
    packed = [encode(each, encoding, vocab_size=kept.vocab).payload for each in kept.instances]
    plain = [
        each.ids.tobytes() + each.log_probs.astype(np.float16).tobytes() for each in kept.instances
    ]
    timings = bench.race(
        Contestant(name="encode", run=lambda: [
            encode(each, encoding, vocab_size=kept.vocab).payload for each in kept.instances
        ]),
        Contestant(name="decode", run=lambda: list(map(decode, packed))),
        Contestant(name="zstd of int32 and float16", run=lambda: [
            zstandard.compress(each, 3) for each in plain
        ]),
        work=f"{kept.positions} positions, {kept.entries} kept logits",
    )  # fmt: skip
    require_equal("encode", timings["encode"].result == packed, "its bytes differ from run to run")
    bench.rate("encode", "positions/s", kept.positions, ours=timings["encode"],
               peers=[timings["zstd of int32 and float16"]])  # fmt: skip
    bench.rate("decode", "positions/s", kept.positions, ours=timings["decode"])
    size = sum(map(len, packed)) / _MB
    bench.rate("encode", "MB/s of the store", size, ours=timings["encode"])
    bench.rate("decode", "MB/s of the store", size, ours=timings["decode"])


def store_speed(bench: Bench) -> None:
    """A store written and read at random, against files written and read front to back."""
    kept = _kept(bench)
    few = [encode(each, Encoding(), vocab_size=kept.vocab) for each in kept.instances]
    count = bench.sizes.pick(100, 4000)
    records = [few[at % len(few)] for at in range(count)]
    corpus = make_corpus(bench, count, 2, 3)
    size = sum(len(each.payload) for each in records) / _MB
    path, flat = bench.scratch / "store", bench.scratch / "flat"

    def write() -> None:
        writer = RecordWriter(path, corpus=corpus, config={}, facts={})
        for number in writer.todo():
            rows = writer.rows(number)
            writer.write_window(number, records[rows.start : rows.stop])
        writer.finish()

    def write_flat() -> None:
        with flat.open("wb") as file:
            for each in records:
                file.write(each.payload)
            file.flush()
            os.fsync(file.fileno())

    written = bench.race(
        Contestant(
            name="store", run=write, prepare=[lambda: shutil.rmtree(path, ignore_errors=True)]
        ),
        Contestant(name="one file, fsynced", run=write_flat),
        work=f"{size:.0f} MB in {count} records",
    )
    bench.rate("write", "MB/s", size, ours=written["store"], limit=written["one file, fsynced"])
    store = RecordStore.open(path)
    order = np.random.default_rng(0).permutation(count)

    def read_flat() -> int:
        with flat.open("rb") as file:
            return sum(len(block) for block in iter(lambda: file.read(1 << 20), b""))

    def read_records() -> int:
        batches = (store.read(order[start : start + 16]) for start in range(0, count, 16))
        return sum(len(each) for batch in batches for each in batch)

    read = bench.race(
        Contestant(name="records at random", run=read_records),
        Contestant(name="one file, in order", run=read_flat),
        work=f"{size:.0f} MB in {count} records, from the page cache",
    )
    require_equal("records at random", len({each.result for each in read.values()}) == 1,
                  "it read other bytes than were written")  # fmt: skip
    bench.rate("read", "MB/s", size, ours=read["records at random"],
               limit=read["one file, in order"])  # fmt: skip


def _exact() -> Iterator[Encoding]:
    for zstd in (False, True):
        yield Encoding(value_bits=EXACT_BITS, zstd=zstd)


def _kept(bench: Bench) -> _Kept:
    if bench.sizes.store is None:
        sizes = bench.sizes
        vocab = 49_152
        instances = _random_instances(sizes.pick(1, 32), sizes.pick(64, 1024), vocab)
    else:
        vocab, instances = _stored_instances(bench.sizes.store)
    return _Kept(vocab, instances, {
        "frequency": _frequency_student(vocab, instances), "near": _near_student(instances)
    })  # fmt: skip


def _stored_instances(path: Path) -> tuple[int, list[SparseLogits]]:
    store = RecordStore.open(path)
    bits = store.manifest.config["encoding"]["value_bits"]
    if bits != EXACT_BITS:
        raise ConfigError(
            f"--store {path} keeps {bits} bits of a log-prob: errors are measured from float32, so "
            f"cache the logits with {EXACT_BITS}"
        )
    return store.manifest.content["vocab_size"], [
        decode(payload) for payload in store.read(store.ids)
    ]


def _random_instances(count: int, positions: int, vocab: int) -> list[SparseLogits]:
    """Instances with 1 to 100 entries a position; log-probs fall like a power of the rank."""
    rng = np.random.default_rng(0)

    def instance() -> SparseLogits:
        counts = np.minimum(rng.integers(1, 160, positions), 100).astype(np.uint32)
        ids = [
            np.sort(rng.permutation(np.unique((vocab ** rng.random(600)).astype(np.int32) - 1))[:k])
            for k in counts
        ]
        logits = [-1.2 * np.log1p(rng.permutation(k)) for k in counts]
        log_probs = [each - np.log(np.exp(each).sum()) - 0.1 for each in logits]

        def column(low: float, high: float) -> np.ndarray:
            return rng.uniform(low, high, len(counts)).astype(np.float32)

        return SparseLogits(
            counts=counts, ids=np.concatenate(ids),
            log_probs=np.concatenate(log_probs).astype(np.float32), gold_log_prob=column(-12, 0),
            entropy=column(0, 8), logit_std=column(2, 4),
            tail_mass=np.full(len(counts), 1 - np.exp(-0.1), np.float32),
        )  # fmt: skip

    return [instance() for _ in range(count)]


def _frequency_student(
    vocab: int, instances: Sequence[SparseLogits]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every position alike: the mean of the teacher's probabilities, smoothed."""
    mass = np.full(vocab, 1e-3)
    for each in instances:
        mass += np.bincount(each.ids, np.exp(each.log_probs.astype(np.float64)), vocab)
    log_probs = np.log(mass / mass.sum())
    return [
        (log_probs[each.ids], 1 - _sums(each, np.exp(log_probs[each.ids]))) for each in instances
    ]


def _near_student(instances: Sequence[SparseLogits]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The teacher with normal noise of 0.7 nats on every logit."""
    rng = np.random.default_rng(1)

    def opinion(each: SparseLogits) -> tuple[np.ndarray, np.ndarray]:
        logits = each.log_probs + rng.normal(0, 0.7, each.nnz)
        tail = each.tail_mass + 1e-6
        total = _sums(each, np.exp(logits)) + tail
        return logits - np.repeat(np.log(total), each.counts), tail / total

    return [opinion(each) for each in instances]


def _losses(
    teacher: SparseLogits, student_log_probs: np.ndarray, student_tail: np.ndarray
) -> np.ndarray:
    """float64[n]: the divergence with the residual bucket."""
    log_probs, tail = teacher.log_probs.astype(np.float64), teacher.tail_mass.astype(np.float64)
    tail, student_tail = np.maximum(tail, 1e-12), np.maximum(student_tail, 1e-12)
    inside = _sums(teacher, np.exp(log_probs) * (log_probs - student_log_probs))
    return inside + tail * np.log(tail / student_tail)


def _divergences(found: Sequence[SparseLogits], given: Sequence[SparseLogits]) -> Iterator[float]:
    """Mean divergence of the decoded entries from the given ones, of each instance, nats."""
    for mine, theirs in zip(found, given, strict=True):
        right, log_probs = theirs.log_probs.astype(np.float64), mine.log_probs.astype(np.float64)
        inside = np.exp(right) * (right - log_probs) + np.exp(log_probs) - np.exp(right)
        yield float(_sums(theirs, inside).mean())


def _sums(logits: SparseLogits, values: np.ndarray) -> np.ndarray:
    """float64[n]: sums over the entries of each position, which may have none."""
    rows = np.repeat(np.arange(len(logits)), logits.counts)
    return np.bincount(rows, values, len(logits))


def _id_bytes(logits: SparseLogits, vocab: int) -> int:
    """Bytes of all ids as written: of the exact layout, without its counts and log-probs."""
    data = encode_logits(logits.counts, logits.ids, logits.log_probs, vocab=vocab, bits=EXACT_BITS)
    of_counts = len(logits) + sum(int((logits.counts >> 7 * n > 0).sum()) for n in range(1, 5))
    return len(data) - of_counts - logits.log_probs.nbytes


def _other_codes(logits: SparseLogits, vocab: int) -> tuple[float, float, float]:
    """Bits of all ids by Rice codes of the gaps, Elias-Fano, and plain binary."""
    counts = logits.counts.astype(np.int64)
    gaps = np.diff(logits.ids, prepend=-1) - 1
    firsts = (np.cumsum(counts) - counts)[counts > 0]
    gaps[firsts] = logits.ids[firsts]
    low = np.arange(16)[:, None]
    rice = [_sums(logits, (gaps >> bits) + 1 + bits) for bits in range(16)]
    fano = counts * (low + 1) + (vocab >> low)
    fano[:, counts == 0] = 0
    plain = logits.nnz * (vocab - 1).bit_length()
    return float(np.min(rice, axis=0).sum() + 4 * len(counts)), float(fano.min(axis=0).sum()), plain


SUITE = Suite(
    "logits",
    {
        "encodings": encodings,
        "id-codes": id_codes,
        "codec-speed": codec_speed,
        "store-speed": store_speed,
    },
)
