"""adopt: the instances of packed text, no token copied; inputs that are no run of tokens."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import DataError
from megatron_miniplm.data import documents as documents_module
from megatron_miniplm.data import views as views_module
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.documents import TokenizedDocuments
from megatron_miniplm.data.packing import EndTable
from megatron_miniplm.data.packing_reference import ReferencePacker
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.data.tokenizers import Tokenizer, load_tokenizer
from megatron_miniplm.data.verify import verify
from megatron_miniplm.data.views import ViewConfig, ViewPacker, view_table
from tests.small_artifacts import visible

PROJECT = Path(__file__).resolve().parents[2]
SEQ_LENGTH = 64
EOD = 0


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    """Two domains of this project's sources, paragraph by paragraph; ``empty`` texts among them."""
    parts = [
        paragraph.replace("<|endoftext|>", "EOD")
        for path in sorted((PROJECT / "megatron_miniplm/core").glob("*.py"))
        for paragraph in path.read_text().split("\n\n\n")
    ]
    return {"code": parts[::2], "prose": parts[1::2]}


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    ids, offsets = tokenizer.encode_flat(texts)
    pieces = np.split(ids, offsets[1:-1])
    return [np.append(piece, np.int32(tokenizer.eod_id)) for piece in pieces]


def write_stock(prefix: Path, documents: Sequence[np.ndarray], dtype: type = np.uint16) -> Path:
    """Documents as Megatron-LM's own builder writes them."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(document.tolist(), [len(document)] if len(document) else [])
    builder.finalize(f"{prefix}.idx")
    return prefix


def command(tokenizer: Path, prefix: Path, *words: object) -> list[str]:
    fixed = ["--tokenizer-model", tokenizer, "--output-prefix", prefix, "--seq-length", SEQ_LENGTH]
    return ["adopt", *map(str, fixed), "--input", *map(str, words)]


def preprocess(tokenizer: Path, folder: Path, texts: dict[str, list[str]], *words: str) -> Corpus:
    folder.mkdir(parents=True, exist_ok=True)
    records = [{"text": text, "domain": name} for name in texts for text in texts[name]]
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    fixed = [
        "--input", folder / "a.jsonl", "--tokenizer-model", tokenizer, "--domain-key", "domain",
        "--seq-length", SEQ_LENGTH, "--output-prefix", folder / "corpus",
    ]  # fmt: skip
    assert main(["preprocess", *map(str, fixed), *words]) == 0
    return Corpus.open(folder / "corpus")


def instances(corpus: Corpus) -> dict[str, list[list[int]]]:
    """Domain -> its instances in order."""
    found: dict[str, list[list[int]]] = {name: [] for name in corpus.domain_names}
    for domain, tokens in zip(corpus.domains, corpus.gather(range(len(corpus))), strict=True):
        found[corpus.domain_names[domain]].append(tokens.tolist())
    return found


@pytest.fixture
def stock(tmp_path: Path, tokenizer: Tokenizer, texts: dict[str, list[str]]) -> dict[str, Path]:
    return {
        name: write_stock(tmp_path / "stock" / name, encode(tokenizer, texts[name]))
        for name in texts
    }


@pytest.fixture
def adopted(tmp_path: Path, tiny_tokenizer: Path, stock: dict[str, Path]) -> Corpus:
    assert main(command(tiny_tokenizer, tmp_path / "out/adopted", *stock.values())) == 0
    return Corpus.open(tmp_path / "out/adopted")


# ------------------------------------------------------------------------------------------------
# The same instances


@pytest.mark.parametrize("flags", [[], ["--flush-tails"]])
def test_instances_are_those_of_the_packed_text(
    tmp_path, tiny_tokenizer, texts, stock, monkeypatch, flags
):
    monkeypatch.setattr(views_module, "BLOCK_TOKENS", 1000)  # documents that span blocks
    expected = preprocess(tiny_tokenizer, tmp_path / "text", texts, *flags)
    assert main([*command(tiny_tokenizer, tmp_path / "new", *stock.values()), *flags]) == 0
    found = Corpus.open(tmp_path / "new")
    assert len(found) > 100
    assert instances(found) == instances(expected)
    theirs, ours = (corpus.manifest.content["statistics"] for corpus in (expected, found))
    assert {name: ours[name] for name in ours if name not in ("packing", "domains")} == {
        name: theirs[name] for name in ours if name not in ("packing", "domains")
    }
    assert ours["packing"] == theirs["packing"]
    for name, counts in ours["domains"].items():
        assert counts.items() <= (theirs["domains"][name] | {"documents_without_tokens": 0}).items()


def pack_documents(tokenizer, documents, *, seq_length, cuts=True, flush_tails=False):
    """Instances and counters of the reference packer, document by document."""
    table = EndTable.build(tokenizer.token_bytes(), EOD)
    if not cuts:
        table = EndTable(np.zeros_like(table.flags), EOD)
    packer = ReferencePacker(table, seq_length=seq_length, flush_tails=flush_tails)
    packed = [packer.add(0, document) for document in documents if len(document)]
    packed += [tail for _, tail in packer.finish()]
    pieces = [
        piece.tolist()
        for item in packed
        for piece in np.split(item.tokens, np.cumsum(item.lengths)[:-1])
        if len(piece)
    ]
    return pieces, packer.counters


def view_documents(tokenizer, prefix, *, seq_length, cuts=True, flush_tails=False):
    config = ViewConfig(seq_length=seq_length, sentence_cuts=cuts, flush_tails=flush_tails)
    documents = TokenizedDocuments.open(prefix)
    packer = ViewPacker(documents, view_table(tokenizer, config), config)
    blocks = list(packer.blocks())
    assert np.concatenate([tokens for tokens, _ in blocks]).tolist() == documents.tokens.tolist()
    runs = [
        (int(start), int(length))
        for _, views in blocks
        for start, length in zip(views.starts, views.lengths, strict=True)
    ]
    return [documents.tokens[at : at + size].tolist() for at, size in runs], packer.counters


# Separators, sentence ends, spaces and others; runs of separators; documents of nothing.
DOCUMENTS = st.lists(
    st.lists(st.sampled_from([0, 0, 1, 14, 221, 220, 300, 198, 400]), max_size=40), min_size=1,
    max_size=20,
)  # fmt: skip


@given(DOCUMENTS, st.integers(1, 9), st.booleans(), st.booleans(), st.integers(1, 50))
def test_runs_are_the_packers_instances_for_any_documents_and_blocks(
    tokenizer, tmp_path_factory, documents, seq_length, cuts, flush_tails, block
):
    arrays = [np.array([*ids, EOD] if ids else [], np.int32) for ids in documents]
    if not any(map(len, arrays)):
        return
    prefix = write_stock(tmp_path_factory.mktemp("stock") / "docs", arrays)
    options = {"seq_length": seq_length, "cuts": cuts, "flush_tails": flush_tails}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views_module, "BLOCK_TOKENS", block)
        patch.setattr(documents_module, "_DOCUMENTS_AT_ONCE", 2)
        found = view_documents(tokenizer, prefix, **options)
    assert found == pack_documents(tokenizer, arrays, **options)


@pytest.mark.parametrize("cuts", [True, False])
def test_runaway_documents_are_guarded_as_in_packing(tmp_path, tokenizer, cuts):
    rng = np.random.default_rng(0)
    sizes = [30, 4000, 12_000, 5, 9000, 20_000, 3, 40]
    documents = [np.append(rng.integers(1, 512, n), EOD).astype(np.int32) for n in sizes]
    prefix = write_stock(tmp_path / "docs", documents)
    found, counters = view_documents(tokenizer, prefix, seq_length=4, cuts=cuts)
    assert counters.overlong_documents >= 2
    assert (found, counters) == pack_documents(tokenizer, documents, seq_length=4, cuts=cuts)


def test_without_sentence_cuts_every_instance_is_full(tmp_path, tiny_tokenizer, stock):
    words = command(tiny_tokenizer, tmp_path / "new", stock["code"], "--no-sentence-cuts")
    assert main(words) == 0
    corpus = Corpus.open(tmp_path / "new")
    tokens = np.fromfile(f"{stock['code']}.bin", np.uint16)
    whole = len(tokens) // (SEQ_LENGTH + 1)
    assert len(corpus) == whole > 50
    assert (
        np.concatenate(corpus.gather(range(whole))).tolist() == tokens[: corpus.num_tokens].tolist()
    )


def test_int32_tokens_and_documents_of_several_sequences_or_none_are_adopted(
    tmp_path, tiny_tokenizer, tokenizer, texts, stock
):
    builder = IndexedDatasetBuilder(str(tmp_path / "split.bin"), dtype=np.int32)
    for document in encode(tokenizer, texts["code"]):
        half = len(document) // 2
        sizes = [half, len(document) - half] if half else [len(document)]
        builder.add_document(document.tolist(), sizes)
        builder.end_document()  # one without a sequence
    builder.finalize(str(tmp_path / "split.idx"))
    for name, prefix in (("one", stock["code"]), ("two", tmp_path / "split")):
        assert main(command(tiny_tokenizer, tmp_path / name, prefix)) == 0
    one, two = Corpus.open(tmp_path / "one"), Corpus.open(tmp_path / "two")
    assert (one.dtype, two.dtype) == (np.uint16, np.int32)
    assert instances(two)["split"] == instances(one)["code"]
    counts = two.manifest.content["statistics"]
    assert counts["documents"] == counts["documents_without_tokens"] == len(texts["code"])


def test_prefixes_of_one_domain_are_packed_one_by_one(tmp_path, tiny_tokenizer, tokenizer, texts):
    parts = [texts["code"][:10], texts["code"][10:]]
    prefixes = [
        write_stock(tmp_path / f"part{number}", encode(tokenizer, part))
        for number, part in enumerate(parts)
    ]
    words = command(tiny_tokenizer, tmp_path / "new", *prefixes, "--domain", "web", "web")
    assert main(words) == 0
    corpus = Corpus.open(tmp_path / "new")
    expected = []
    for number, part in enumerate(parts):
        alone = preprocess(tiny_tokenizer, tmp_path / f"text{number}", {"web": part})
        expected += instances(alone)["web"]
    assert corpus.domain_names == ("web",)
    assert instances(corpus) == {"web": expected}
    assert corpus.manifest.content["statistics"]["domains"]["web"]["documents"] == sum(
        map(len, parts)
    )


def test_a_prefix_without_an_instance_is_left_out(tmp_path, tiny_tokenizer, tokenizer, stock):
    small = write_stock(tmp_path / "small", [np.array([5, EOD])])
    assert main(command(tiny_tokenizer, tmp_path / "new", small, stock["code"])) == 0
    corpus = Corpus.open(tmp_path / "new")
    assert [shard.name for shard in corpus.shards] == ["new-00000-of-00001"]
    assert corpus.domain_names == ("small", "code")
    assert set(corpus.domains.tolist()) == {1}


# ------------------------------------------------------------------------------------------------
# A corpus like any other, and no copy


@pytest.mark.parametrize("link", ["relative", "hard", "absolute"])
def test_no_token_is_copied(tmp_path, tiny_tokenizer, stock, link):
    words = command(tiny_tokenizer, tmp_path / "a/b/new", *stock.values(), "--link", link)
    assert main(words) == 0
    corpus = Corpus.open(tmp_path / "a/b/new")
    for shard, source, number in zip(corpus.shards, stock.values(), range(2), strict=True):
        mine = Path(f"{shard}.bin")
        assert os.stat(mine).st_ino == os.stat(f"{source}.bin").st_ino
        assert mine.is_symlink() == (link != "hard")
        if link != "hard":
            assert mine.readlink().is_absolute() == (link == "absolute")
        count = int((corpus.domains == number).sum())
        assert os.path.getsize(f"{shard}.idx") == 20 * count + 42
    assert verify(corpus.prefix) == []


def test_stock_megatron_reads_an_adopted_corpus_and_its_subset(tmp_path, adopted):
    rows = np.arange(0, len(adopted), 3)
    write_subset(adopted, rows, tmp_path / "elsewhere/third", config={}, selection={})
    subset = Corpus.open(tmp_path / "elsewhere/third")
    assert verify(subset.prefix) == []
    for corpus, expected in ((adopted, range(len(adopted))), (subset, rows)):
        stocks = [IndexedDataset(str(shard)) for shard in corpus.shards]
        seen = [stock[at].tolist() for stock in stocks for at in range(len(stock))]
        assert seen == [tokens.tolist() for tokens in adopted.gather(expected)]
    assert subset.domains.tolist() == adopted.domains[rows].tolist()


def test_inspect_verify_split_and_select_take_an_adopted_corpus(tmp_path, adopted, capsys):
    assert main(["inspect", str(adopted.prefix), "--verify", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["verified"]
    assert answer["num_instances"] == len(adopted)
    parts = ["--reference-prefix", tmp_path / "ref", "--pool-prefix", tmp_path / "pool"]
    words = ["split", "--data-path", adopted.prefix, "--reference-fraction", "0.2", *parts]
    assert main(list(map(str, words))) == 0
    assert len(Corpus.open(tmp_path / "ref")) + len(Corpus.open(tmp_path / "pool")) == len(adopted)


def test_a_changed_bin_is_found_by_verify_and_a_shorter_one_at_opening(adopted, stock):
    path = Path(f"{stock['code']}.bin")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert "hash" in verify(adopted.prefix)[0]
    path.write_bytes(data[:-2])
    with pytest.raises(DataError, match="truncated or was replaced"):
        Corpus.open(adopted.prefix)


def test_a_manifest_repeats_its_run(tmp_path, adopted):
    words = ["--from-run", str(adopted.manifest_path), "--output-prefix", str(tmp_path / "again")]
    assert main(["adopt", *words]) == 0
    assert Corpus.open(tmp_path / "again").fingerprint == adopted.fingerprint


# ------------------------------------------------------------------------------------------------
# What is refused


def refused(tiny_tokenizer: Path, folder: Path, capsys, *words: object) -> str:
    """What `adopt` says; it must leave nothing."""
    prefix = folder / "refused"
    assert main(command(tiny_tokenizer, prefix, *words)) == 2
    assert not [name for name in visible(folder) if "refused" in name]
    return capsys.readouterr().err


def test_a_document_without_separator_is_named(tmp_path, tiny_tokenizer, tokenizer, texts, capsys):
    documents = encode(tokenizer, texts["code"])
    documents[7] = documents[7][:-1]
    prefix = write_stock(tmp_path / "docs", documents)
    said = refused(tiny_tokenizer, tmp_path, capsys, prefix)
    assert f"document 7 ends with token {documents[7][-1]}, not with the separator 0" in said
    assert "--append-eod" in said


def test_another_separator_is_named_by_eod_token(tmp_path, tiny_tokenizer, stock, capsys):
    said = refused(tiny_tokenizer, tmp_path, capsys, stock["code"], "--eod-token", "e")
    assert "document 0 ends with token 0, not with the separator" in said


def test_ids_beyond_the_vocabulary_are_refused(tmp_path, tiny_tokenizer, tokenizer, texts, capsys):
    for at, (wrong, dtype) in enumerate([(512, np.uint16), (-1, np.int32), (2**31 - 1, np.int32)]):
        documents = encode(tokenizer, texts["code"])
        documents[5][2] = wrong
        prefix = write_stock(tmp_path / f"docs{at}", documents, dtype)
        said = refused(tiny_tokenizer, tmp_path, capsys, prefix)
        assert f"document 5 holds token {wrong}, but the vocabulary has 512" in said


@pytest.mark.parametrize("change", [lambda b: b[:-2], lambda b: b + b"\0\0", lambda b: b""])
def test_a_bin_of_another_size_than_the_index_says_is_refused(
    tmp_path, tiny_tokenizer, stock, capsys, change
):
    path = Path(f"{stock['code']}.bin")
    path.write_bytes(change(path.read_bytes()))
    said = refused(tiny_tokenizer, tmp_path, capsys, stock["code"])
    assert f"code.bin has {path.stat().st_size} bytes, but code.idx describes" in said


def forge(prefix: Path, offset: int, layout: str, value: int) -> None:
    data = bytearray(Path(f"{prefix}.idx").read_bytes())
    struct.pack_into(layout, data, offset, value)
    Path(f"{prefix}.idx").write_bytes(data)


def test_documents_that_do_not_lie_back_to_back_are_refused_by_number(
    tmp_path, tiny_tokenizer, stock, texts, capsys
):
    count = len(texts["code"])
    forge(stock["code"], 34 + 4 * count + 8 * 6, "<q", 2)  # overlaps document 0
    said = refused(tiny_tokenizer, tmp_path, capsys, stock["code"])
    assert "document 6 (sequence 6, " in said
    assert "lies at byte 2, expected" in said


def test_a_subset_is_not_taken_for_documents(tmp_path, tiny_tokenizer, adopted, capsys):
    write_subset(adopted, np.arange(1, 60, 2), tmp_path / "odd", config={}, selection={})
    said = refused(tiny_tokenizer, tmp_path, capsys, tmp_path / "odd-00000-of-00001")
    assert "back to back" in said
    said = refused(tiny_tokenizer, tmp_path, capsys, tmp_path / "odd")
    assert "a corpus is instances already" in said


def test_document_boundaries_that_do_not_ascend_to_the_end_are_refused(
    tmp_path, tiny_tokenizer, stock, texts, capsys
):
    count = len(texts["code"])
    boundaries = 34 + 12 * count
    forge(stock["code"], boundaries + 8 * 3, "<q", 1)
    assert "document 2 ends before it starts" in refused(
        tiny_tokenizer, tmp_path, capsys, stock["code"]
    )
    forge(stock["code"], boundaries + 8 * count, "<q", count - 1)
    said = refused(tiny_tokenizer, tmp_path, capsys, stock["code"])
    assert f"span 0 to {count - 1} of {count} sequences" in said


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_other_token_types_are_refused(tmp_path, tiny_tokenizer, capsys, dtype):
    prefix = write_stock(tmp_path / "docs", [np.array([5, 6, EOD])], dtype)
    said = refused(tiny_tokenizer, tmp_path, capsys, prefix)
    assert f"holds {np.dtype(dtype)} tokens; only uint16 and int32" in said


def test_inputs_that_are_missing_empty_mixed_or_given_twice_are_refused(
    tmp_path, tiny_tokenizer, stock, capsys
):
    say = lambda *words: refused(tiny_tokenizer, tmp_path, capsys, *words)  # noqa: E731
    assert "there is no" in say(tmp_path / "nothing")
    assert "twice" in say(stock["code"], f"{stock['code']}.idx")
    other = write_stock(tmp_path / "int32", [np.array([5, EOD])], np.int32)
    assert "adopt each type into its own corpus" in say(stock["code"], other)
    assert "2 tokens fill no instance" in say(other)
    assert "2 names for 1 inputs" in say(other, "--domain", "a", "b")


def test_the_output_never_takes_the_place_of_its_input(tmp_path, tiny_tokenizer, stock, capsys):
    prefix = tmp_path / "own-00000-of-00001"
    for suffix in (".bin", ".idx"):
        os.rename(f"{stock['code']}{suffix}", f"{prefix}{suffix}")
    before = visible(tmp_path)
    assert main([*command(tiny_tokenizer, tmp_path / "own", prefix), "--overwrite"]) == 2
    assert "choose another output prefix" in capsys.readouterr().err
    assert visible(tmp_path) == before


def test_a_finished_corpus_is_replaced_only_on_request(tmp_path, tiny_tokenizer, stock, capsys):
    assert main(command(tiny_tokenizer, tmp_path / "new", stock["code"])) == 0
    assert main(command(tiny_tokenizer, tmp_path / "new", stock["prose"])) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command(tiny_tokenizer, tmp_path / "new", stock["prose"]), "--overwrite"]) == 0
    assert Corpus.open(tmp_path / "new").domain_names == ("prose",)
