"""Cases from text to corpus: speed, memory, identical ids, and the packer alone."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import bench_oracle as oracle
import bench_peers as peers
import fastokens
import tokenizers
from bench_core import Bench, Clocked, Contestant, Timing, require_equal
from bench_oracle import (
    documents_of_prefix,
    documents_of_text,
    instances_of,
    pack_with_oracle,
)
from bench_process import Figures, run_measured
from bench_text import Text, first_bytes, make_text, make_tokenizer, make_tokenizers, repeat_text

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.packing import EndTable, PackingConfig
from megatron_miniplm.data.text import TextConfig
from megatron_miniplm.data.tokenizers import TokenizerConfig, load_tokenizer
from megatron_miniplm.stages import preprocess as stage

SEQ_LENGTH = 1024
WORKERS = 2
MB = 1e6
COPIES = 4
# Name of a peer, and of what it writes.
BATCHED = ("Hugging Face tokenizers in batches, stock writer (re-stated)", "batched")
MEGATRON = ("Megatron-LM preprocess_data.py, 2 workers (re-stated)", "megatron")


def preprocess(bench: Bench) -> None:
    """Uncompressed JSONL to a finished, fsynced corpus, end to end."""
    text = make_text(bench)
    name, tokenizer = make_tokenizer(bench)
    timings = bench.race(
        *_ours(bench, text, tokenizer),
        *_fast_loops(bench, text, tokenizer),
        *_slow_peers(bench, text, tokenizer),
        work=f"{text.text_bytes / MB:.1f} MB of text ({text.source}), tokenizer {name}",
    )
    errors = _check_corpora(bench, text, bench.scratch / "ours", tokenizer)
    _preprocess_rows(bench, text, timings, errors)
    _disk_row(bench, bench.scratch / "ours", timings)


def _ours(bench: Bench, text: Text, tokenizer: Path) -> list[Contestant]:
    longer = repeat_text(text, COPIES * text.path.stat().st_size, bench.scratch / "longer.jsonl")
    once, more, process = (bench.scratch / name for name in ("ours", "more", "process"))
    return [
        Contestant(
            name="preprocess, stage function",
            run=lambda: stage.run(_config(text.path, tokenizer, once)),
            prepare=[lambda: remove(once)],
        ),
        Contestant(
            name=f"preprocess, stage function, the text {COPIES} times",
            run=lambda: stage.run(_config(longer.path, tokenizer, more)),
            prepare=[lambda: remove(more)],
            most_rounds=3,
        ),
        Contestant(
            name="preprocess, whole process",
            run=lambda: _whole_process(text.path, tokenizer, process),
            prepare=[lambda: remove(process)],
        ),
    ]


def _fast_loops(bench: Bench, text: Text, tokenizer: Path) -> list[Contestant]:
    """The tokenizer alone: what of a run it decides, with and without loading it."""
    path = str(tokenizer / "tokenizer.json")
    warm = fastokens.Tokenizer.from_file(path)
    batches = list(peers.text_batches(document for document, _ in text.records()))

    def loaded(copies: int) -> None:
        engine = fastokens.Tokenizer.from_file(path)
        for _ in range(copies):
            peers.flat_texts(engine, batches)

    return [
        Contestant(
            name="fastokens: load, encode_batch_flat on texts in memory", run=lambda: loaded(1)
        ),
        Contestant(
            name=f"fastokens: load, encode_batch_flat {COPIES} times",
            run=lambda: loaded(COPIES),
            most_rounds=3,
        ),
        Contestant(
            name="fastokens, loaded: encode_batch_flat on texts in memory",
            run=lambda: peers.flat_texts(warm, batches),
        ),
        Contestant(
            name="plain loop: load, orjson, fastokens, write; no packing (re-stated)",
            run=lambda: peers.flat_loop(
                fastokens.Tokenizer.from_file(path), text.path, bench.scratch / "loop.bin"
            ),
        ),
    ]


def _slow_peers(bench: Bench, text: Text, tokenizer: Path) -> list[Contestant]:
    eod = load_tokenizer(tokenizer).eod_id
    batched, megatron = (bench.scratch / stem for _, stem in (BATCHED, MEGATRON))
    return [
        Contestant(
            name=BATCHED[0],
            run=lambda: peers.batched_pipeline(text.path, tokenizer, eod, batched),
            prepare=[peers.import_megatron],
            most_rounds=1,
        ),
        Contestant(
            name=MEGATRON[0],
            run=lambda: Clocked(
                peers.megatron_in_child(text.path, tokenizer, eod, megatron, workers=WORKERS), None
            ),
            most_rounds=1,
        ),
    ]


def _preprocess_rows(
    bench: Bench, text: Text, timings: dict[str, Timing], errors: dict[str, float]
) -> None:
    stage_run, longer, process, once, several, warm, *others = timings.values()
    megabytes = text.text_bytes / MB
    bench.rate(
        "text to corpus, stage function", "MB/s", megabytes, ours=stage_run, peers=others,
        limit=once, error_ours=errors["ours"], errors=errors,
    )  # fmt: skip
    bench.rate(
        "text to corpus, whole process", "MB/s", megabytes, ours=process, peers=others[1:],
        limit=once, error_ours=errors["ours"], errors=errors,
    )  # fmt: skip
    bench.rate(
        f"{COPIES} times the text to corpus, stage function", "MB/s", COPIES * megabytes,
        ours=longer, limit=several, error_ours=errors["ours"],
    )  # fmt: skip

    # What more text costs: without loading the tokenizer, which a run does once.
    further = longer.median - stage_run.median
    if further > 0:
        metric = f"text to corpus, each further byte (1 to {COPIES} times the text)"
        bench.rate(
            metric, "MB/s", megabytes, ours=Timing(metric, [further / (COPIES - 1)]), limit=warm,
            peers=others[1:], error_ours=errors["ours"], errors=errors,
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
    """Share of wrong tokens by name: our corpus must be what the oracle packs of each peer's."""
    domains = [domain for _, domain in text.records()]
    loaded = load_tokenizer(tokenizer)
    table = EndTable.build(loaded.token_bytes(), loaded.eod_id)
    ours = instances_of(Corpus.open(prefix))
    for name, stem in (BATCHED, MEGATRON):
        documents = documents_of_prefix(bench.scratch / stem, domains)
        expected = pack_with_oracle(table, documents, seq_length=SEQ_LENGTH)
        what = f"its instances are not those that the oracle packs of the documents of: {name}"
        require_equal("preprocess", ours.equal(expected), what)
    return {"ours": 0.0, BATCHED[0]: 0.0, MEGATRON[0]: 0.0}


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
    table = EndTable.build(tokenizer.token_bytes(), tokenizer.eod_id)
    documents = documents_of_text(text, tokenizer)
    total = len(documents.ids) / 1e6

    def packed_tokens() -> int:
        """A batch goes before the next one comes, as in `preprocess`."""
        batches = oracle.packed_batches(table, documents, seq_length=SEQ_LENGTH)
        return sum(len(batch.tokens) for batch in batches)

    timings = bench.race(
        Contestant(name="packer, one thread", run=packed_tokens),
        Contestant(
            name="numpy definition of the packer",
            run=lambda: pack_with_oracle(table, documents, seq_length=SEQ_LENGTH),
            most_rounds=3,
        ),
        work=f"{total:.1f} M tokens of {text.source}, tokenizer {name}",
    )
    ours, definition = timings.values()
    whole = oracle.pack(table, documents, seq_length=SEQ_LENGTH)
    require_equal(ours.name, whole.equal(definition.result), "differs from its definition")
    require_equal(ours.name, ours.result == len(whole.tokens), "packed other tokens when timed")
    bench.rate(
        "packing, one core", "M tokens/s", total, ours=ours, peers=[definition],
        error_ours=0.0, errors={definition.name: 0.0},
    )  # fmt: skip
