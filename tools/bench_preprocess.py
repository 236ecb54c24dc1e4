"""Cases from text to corpus: speed, memory, identical ids, and the packer alone."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import bench_peers as peers
import fastokens
import numpy as np
import tokenizers
from bench_core import Bench, Clocked, Contestant, Figures, Timing, require_equal, run_measured
from bench_oracle import pack_with_oracle
from bench_text import Text, first_bytes, make_text, make_tokenizer, make_tokenizers, repeat_text

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.indexed import read_index
from megatron_miniplm.data.packing import PackingConfig
from megatron_miniplm.data.text import TextConfig
from megatron_miniplm.data.tokenizers import Tokenizer, TokenizerConfig, load_tokenizer
from megatron_miniplm.stages import preprocess as stage

SEQ_LENGTH = 1024
WORKERS = 2
MB = 1e6


def preprocess(bench: Bench) -> None:
    """Uncompressed JSONL to a finished, fsynced corpus, end to end."""
    text = make_text(bench)
    name, tokenizer = make_tokenizer(bench)
    prefix, eod = bench.scratch / "ours", load_tokenizer(tokenizer).eod_id
    engine = fastokens.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    batches = list(peers.text_batches(document for document, _ in text.records()))
    work = f"{text.text_bytes / MB:.1f} MB of text ({text.source}), tokenizer {name}"
    timings = bench.race(
        Contestant(
            name="preprocess, stage function",
            run=lambda: stage.run(_config(text.path, tokenizer, prefix)),
            prepare=[lambda: remove(prefix)],
        ),
        Contestant(
            name="preprocess, whole process",
            run=lambda: _whole_process(text.path, tokenizer, bench.scratch / "process"),
            prepare=[lambda: remove(bench.scratch / "process")],
        ),
        Contestant(
            name="fastokens encode_batch_flat on texts in memory",
            run=lambda: peers.flat_texts(engine, batches),
        ),
        Contestant(
            name="plain loop: orjson, fastokens, write; no packing (re-stated)",
            run=lambda: peers.flat_loop(engine, text.path, bench.scratch / "loop.bin"),
        ),
        Contestant(
            name="Hugging Face tokenizers in batches, stock writer (re-stated)",
            run=lambda: peers.batched_pipeline(
                text.path, tokenizer, eod, bench.scratch / "batched"
            ),
            prepare=[peers.import_megatron],
            most_rounds=1,
        ),
        Contestant(
            name="Megatron-LM preprocess_data.py, 2 workers (re-stated)",
            run=lambda: Clocked(
                peers.megatron_in_child(
                    text.path, tokenizer, eod, bench.scratch / "megatron", workers=WORKERS
                ),
                None,
            ),
            most_rounds=1,
        ),
        work=work,
    )
    errors = _check_corpora(bench, text, prefix, tokenizer)
    _preprocess_rows(bench, text, timings, errors)
    _disk_row(bench, prefix, timings)


def _preprocess_rows(
    bench: Bench, text: Text, timings: dict[str, Timing], errors: dict[str, float]
) -> None:
    stage_run, process, limit, *others = timings.values()
    megabytes = text.text_bytes / MB
    bench.rate(
        "text to corpus, stage function", "MB/s", megabytes, ours=stage_run, peers=others,
        limit=limit, error_ours=errors["ours"], errors=errors,
    )  # fmt: skip
    bench.rate(
        "text to corpus, whole process", "MB/s", megabytes, ours=process, peers=others[1:],
        limit=limit, error_ours=errors["ours"], errors=errors,
    )  # fmt: skip


def _disk_row(bench: Bench, prefix: Path, timings: dict[str, Timing]) -> None:
    """How fast the corpus's bytes come out, against writing just those bytes."""
    data = b"".join(path.read_bytes() for path in sorted(prefix.parent.glob("ours-*.bin")))
    raw = bench.race(
        Contestant(
            name="sequential fsynced write of the same bytes",
            run=lambda: peers.write_bytes(data, bench.scratch / "raw"),
        ),
        work=f"{len(data) / MB:.1f} MB",
    )
    ours, limit = next(iter(timings.values())), next(iter(raw.values()))
    bench.rate("corpus written, stage function", "MB/s", len(data) / MB, ours=ours, limit=limit)


def _config(path: Path, tokenizer: Path, prefix: Path) -> stage.Config:
    return stage.Config(
        text=TextConfig(input=(str(path),), domain_key="domain"),
        tokenizer=TokenizerConfig(tokenizer_model=tokenizer),
        packing=PackingConfig(seq_length=SEQ_LENGTH),
        output_prefix=prefix,
        workers=WORKERS,
    )


def _whole_process(path: Path, tokenizer: Path, prefix: Path) -> Figures:
    return run_measured(
        [
            sys.executable, "-m", "megatron_miniplm", "preprocess", "--input", str(path),
            "--domain-key", "domain", "--tokenizer-model", str(tokenizer),
            "--seq-length", str(SEQ_LENGTH), "--workers", str(WORKERS),
            "--output-prefix", str(prefix),
        ]
    )  # fmt: skip


def remove(prefix: Path) -> None:
    """Remove an artifact at a prefix, files and folders."""
    for path in prefix.parent.glob(f"{prefix.name}[-.]*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_corpora(bench: Bench, text: Text, prefix: Path, tokenizer: Path) -> dict[str, float]:
    """Share of tokens in instances that differ from the packer oracle on each peer's documents."""
    domains = [domain for _, domain in text.records()]
    corpus, loaded = Corpus.open(prefix), load_tokenizer(tokenizer)
    errors = {"ours": 0.0}
    for name, stem in (
        ("Hugging Face tokenizers in batches, stock writer (re-stated)", "batched"),
        ("Megatron-LM preprocess_data.py, 2 workers (re-stated)", "megatron"),
    ):
        documents = documents_of(bench.scratch / stem, domains)
        tokens, lengths = pack_with_oracle(loaded, documents, seq_length=SEQ_LENGTH)
        require_equal(
            "preprocess",
            np.array_equal(lengths, corpus.lengths)
            and np.array_equal(tokens, corpus_tokens(corpus)),
            f"its instances are not those that the oracle packs from the documents of: {name}",
        )
        errors[name] = 0.0
    return errors


def corpus_tokens(corpus: Corpus) -> np.ndarray:
    """All tokens of a root corpus, end to end."""
    return np.concatenate(
        [np.frombuffer(shard.tokens, corpus.dtype) for shard in corpus.opened_shards]
    )


def documents_of(prefix: Path, domains: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """(domain, int32 ids with separator) of every document of a stock prefix that has tokens."""
    index = read_index(prefix.with_name(prefix.name + ".idx"))
    ids = np.fromfile(prefix.with_name(prefix.name + ".bin"), index.dtype).astype(np.int32)
    ends = np.cumsum(index.lengths, dtype=np.int64)
    found = zip(domains, ends, index.lengths, strict=True)
    return [(domain, ids[end - length : end]) for domain, end, length in found if length > 1]


def preprocess_memory(bench: Bench) -> None:
    """Peak memory of the whole process, small input against one twenty times as large."""
    text = make_text(bench)
    _, tokenizer = make_tokenizer(bench)
    normal = (100, 2000 if bench.sizes.full else 500)
    small, large = (0.2, 1) if bench.sizes.quick else normal
    peaks = {}
    for megabytes in (small, large):
        path, prefix = bench.scratch / "input.jsonl", bench.scratch / "memory"
        make = first_bytes if megabytes * MB < text.path.stat().st_size else repeat_text
        make(text, int(megabytes * MB), path)
        figures = _whole_process(path, tokenizer, prefix)
        remove(prefix)
        peaks[megabytes] = figures
        bench.row(
            f"peak resident memory, {megabytes:g} MB of JSONL", "MB",
            ours=figures.peak_resident / MB, lower_is_better=True,
        )  # fmt: skip
    growth = (peaks[large].peak_resident - peaks[small].peak_resident) / MB
    bench.row(
        f"growth of peak resident memory, {small:g} to {large:g} MB", "MB", ours=growth,
        lower_is_better=True,
    )  # fmt: skip
    if not bench.sizes.full:
        bench.skip("2 GB of input (--full)")


def identical_ids(bench: Bench) -> None:
    """Ids against Hugging Face tokenizers, document by document."""
    text = make_text(bench, shards=None if bench.sizes.full else 1)
    if not bench.sizes.full:
        bench.skip(f"all of the text (--full); this run: {text.source}")
    for name, folder in make_tokenizers(bench).items():
        ours = load_tokenizer(folder)
        reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        wrong = documents = 0
        for texts in peers.text_batches(document for document, _ in text.records()):
            ids, offsets = ours.encode_flat(texts)
            expected = reference.encode_batch_fast(texts, add_special_tokens=False)
            bounds = zip(offsets[:-1], offsets[1:], expected, strict=True)
            wrong += sum(ids[start:end].tolist() != item.ids for start, end, item in bounds)
            documents += len(texts)
        bench.row(
            f"documents of {documents} with other ids, {name}", "documents", ours=wrong,
            lower_is_better=True, error_ours=wrong / documents,
        )  # fmt: skip
        require_equal("encode_flat", wrong == 0, f"{wrong} documents differ under {name}")


def pack(bench: Bench) -> None:
    """The packer alone, one thread, on the ids of real text."""
    text = make_text(bench, shards=2)
    name, folder = make_tokenizer(bench)
    tokenizer = load_tokenizer(folder)
    documents = _with_domains(text, tokenizer)
    total = sum(len(ids) for _, ids in documents)
    timings = bench.race(
        Contestant(name="packer, one thread", run=lambda: _pack_ours(tokenizer, documents)),
        Contestant(
            name="numpy oracle",
            run=lambda: pack_with_oracle(tokenizer, documents, seq_length=SEQ_LENGTH),
            most_rounds=3,
        ),
        work=f"{total / 1e6:.1f} M tokens of {text.source}, tokenizer {name}",
    )
    ours, oracle = timings.values()
    for made, expected in zip(ours.result, oracle.result, strict=True):
        require_equal(ours.name, np.array_equal(made, expected), "differs from the oracle")
    bench.rate(
        "packing, one core", "M tokens/s", total / 1e6, ours=ours, peers=[oracle],
        error_ours=0.0, errors={oracle.name: 0.0},
    )  # fmt: skip


def _with_domains(text: Text, tokenizer: Tokenizer) -> list[tuple[str, np.ndarray]]:
    """(domain, int32 ids with separator) of every document."""
    found = []
    for records in _chunks(text.records(), 2000):
        ids, offsets = tokenizer.encode_flat([document for document, _ in records])
        for (_, domain), start, end in zip(records, offsets[:-1], offsets[1:], strict=True):
            found.append((domain, np.append(ids[start:end], np.int32(tokenizer.eod_id))))
    return found


def _pack_ours(
    tokenizer: Tokenizer, documents: list[tuple[str, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    return pack_with_oracle(tokenizer, documents, seq_length=SEQ_LENGTH)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
