"""Adopting tokenised documents that exist: no token copied, against reading the file once."""

from __future__ import annotations

from pathlib import Path

import bench_peers as peers
import numpy as np
from bench_core import Bench, Contestant, require_equal
from bench_oracle import documents_of_text
from bench_preprocess import SEQ_LENGTH, remove
from bench_rows import all_bytes, own_token_bytes
from bench_text import Text, make_text, make_tokenizer, repeat_text

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.indexed import contiguous_index, token_dtype
from megatron_miniplm.data.packing import PackingConfig
from megatron_miniplm.data.text import TextConfig
from megatron_miniplm.data.tokenizers import TokenizerConfig, load_tokenizer
from megatron_miniplm.data.views import ViewConfig
from megatron_miniplm.stages import adopt as stage
from megatron_miniplm.stages import preprocess

_TARGET_BYTES = 1_000_000_000


def adopt(bench: Bench) -> None:
    """A Megatron prefix of 1 GB: time against one read of it, bytes, and equality with text."""
    name, tokenizer = make_tokenizer(bench)
    text = make_text(bench)
    prefix, copies = _write_prefix(bench, text, tokenizer)
    bin_path = prefix.with_name(prefix.name + ".bin")
    size = bin_path.stat().st_size / 1e6
    timings = bench.race(
        Contestant(
            name="adopt, stage function",
            run=lambda: _adopt(prefix, tokenizer, bench.scratch / "adopted"),
            prepare=[lambda: remove(bench.scratch / "adopted")],
        ),
        Contestant(name="one sequential read of the .bin", run=lambda: peers.read_once([bin_path])),
        Contestant(
            name="cp of the .bin, fsynced",
            run=lambda: peers.copy_file(bin_path, bench.scratch / "copy.bin"),
            most_rounds=2,
        ),
        work=f"{size:,.0f} MB of tokens ({text.source}, {copies} times), tokenizer {name}",
    )
    ours, limit, copy = timings.values()
    adopted = Corpus.open(bench.scratch / "adopted")
    expected = _corpus_of_text(bench, text, tokenizer, copies)
    _require_same_instances(adopted, expected)
    bench.rate("prefix adopted", "MB/s", size, ours=ours, peers=[copy], limit=limit, error_ours=0.0)
    bench.row("token bytes copied", "bytes", ours=own_token_bytes(adopted.prefix))
    bench.row(
        "bytes written an instance", "bytes", ours=all_bytes(adopted.prefix) / len(adopted),
        peer=(copy.name, size * 1e6 / len(adopted)), lower_is_better=True,
    )  # fmt: skip


def _write_prefix(bench: Bench, text: Text, tokenizer: Path) -> tuple[Path, int]:
    """The text's documents as a stock prefix, again and again; the prefix and how many times."""
    loaded = load_tokenizer(tokenizer)
    documents = documents_of_text(text, loaded)
    ids = documents.ids.astype(token_dtype(loaded.vocab_size))
    copies = 2 if bench.sizes.quick else -(-_TARGET_BYTES // ids.nbytes)
    prefix = bench.scratch / "stock"
    with prefix.with_name("stock.bin").open("wb") as file:
        for _ in range(copies):
            file.write(ids.data)
    lengths = np.tile(np.diff(documents.offsets).astype(np.int32), copies)
    index = prefix.with_name("stock.idx")
    index.write_bytes(contiguous_index(lengths, ids.dtype))
    peers.fsync(prefix.with_name("stock.bin"), index)
    return prefix, copies


def _adopt(prefix: Path, tokenizer: Path, output: Path) -> None:
    stage.run(
        stage.Config(
            input=(str(prefix),),
            tokenizer=TokenizerConfig(tokenizer_model=tokenizer),
            view=ViewConfig(seq_length=SEQ_LENGTH),
            output_prefix=output,
        )
    )


def _corpus_of_text(bench: Bench, text: Text, tokenizer: Path, copies: int) -> Corpus:
    """The same documents, packed from text."""
    size = copies * text.path.stat().st_size
    repeated = repeat_text(text, size, bench.scratch / "repeated.jsonl")
    preprocess.run(
        preprocess.Config(
            text=TextConfig(input=(str(repeated.path),)),
            tokenizer=TokenizerConfig(tokenizer_model=tokenizer),
            packing=PackingConfig(seq_length=SEQ_LENGTH),
            output_prefix=bench.scratch / "packed",
        )
    )
    return Corpus.open(bench.scratch / "packed")


def _require_same_instances(adopted: Corpus, expected: Corpus) -> None:
    """Same lengths, and the same tokens in the same order, from wherever the pointers lead."""
    same = np.array_equal(adopted.lengths, expected.lengths)
    require_equal("adopt", same, "its instances have other lengths than those packed from text")
    rows = range(len(adopted))
    same = all(np.array_equal(adopted.tokens(row), expected.tokens(row)) for row in rows)
    require_equal("adopt", same, "its instances have other tokens than those packed from text")
