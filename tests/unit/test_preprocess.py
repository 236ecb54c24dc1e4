"""preprocess: the same corpus from every input form, right counts, nothing from bad input."""

from __future__ import annotations

import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.data import sources
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.packing import EndTable, PackingConfig
from megatron_miniplm.data.packing_reference import ReferencePacker
from megatron_miniplm.data.preprocess import Preprocessor
from megatron_miniplm.data.text import Document, TextConfig, TextReader
from megatron_miniplm.data.tokenizers import load_tokenizer
from megatron_miniplm.data.writer import CorpusWriter

PROJECT = Path(__file__).resolve().parents[2]
SEQ_LENGTH = 64


@pytest.fixture(scope="module")
def records() -> list[dict[str, str]]:
    """150 records of two domains: the licence's paragraphs, numbered, not all of them ASCII."""
    paragraphs = (PROJECT / "LICENSE").read_text().split("\n\n")
    return [
        {
            "domain": "code" if number % 3 else "prose ✓",
            "text": f"{paragraphs[number % len(paragraphs)]} [{number}]"
            + (" naïve ✓" if number % 7 == 0 else ""),
        }
        for number in range(150)
    ]


@pytest.fixture(scope="module")
def jsonl(records: list[dict[str, str]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.fixture
def run(tiny_tokenizer: Path, tmp_path: Path) -> Callable[..., Corpus]:
    """Run the verb on --input words (and flags); returns the corpus."""

    def preprocess(*words: str | Path, name: str = "corpus") -> Corpus:
        prefix = tmp_path / "out" / name
        assert main(command(tiny_tokenizer, prefix, *words)) == 0
        return Corpus.open(prefix)

    return preprocess


def command(tokenizer: Path, prefix: Path, *words: str | Path) -> list[str]:
    fixed = ["--tokenizer-model", tokenizer, "--output-prefix", prefix, "--seq-length", SEQ_LENGTH]
    return ["preprocess", *map(str, fixed), "--input", *map(str, words)]


def instances(corpus: Corpus) -> list[list[int]]:
    return [ids.tolist() for ids in corpus.gather(range(corpus.num_instances))]


def statistics(corpus: Corpus) -> dict[str, object]:
    return dict(corpus.manifest.content["statistics"])


# ------------------------------------------------------------------------------------------------
# The corpus


def test_the_corpus_is_the_packed_documents_in_order(
    run: Callable[..., Corpus],
    tmp_path: Path,
    tiny_tokenizer: Path,
    records: list[dict[str, str]],
    jsonl: bytes,
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl)
    corpus = run(tmp_path / "a.jsonl", "--domain-key", "domain")
    tokenizer = load_tokenizer(tiny_tokenizer)
    names = list(dict.fromkeys(record["domain"] for record in records))
    packer = ReferencePacker(EndTable.build(tokenizer.token_bytes(), 0), seq_length=SEQ_LENGTH)
    expected = []
    for record in records:
        ids = np.append(tokenizer.encode_flat([record["text"]])[0], np.int32(tokenizer.eod_id))
        packed = packer.add(names.index(record["domain"]), ids)
        for piece in np.split(packed.tokens, np.cumsum(packed.lengths)[:-1]):
            if len(piece):
                expected.append((record["domain"], piece.tolist()))
    assert len(expected) > 100
    assert list(corpus.domain_names) == names
    found = [names[domain] for domain in corpus.domains]
    assert list(zip(found, instances(corpus), strict=True)) == expected


def test_counts_of_the_manifest(
    run: Callable[..., Corpus], tmp_path: Path, records: list[dict[str, str]], jsonl: bytes
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl + b'\n{"domain": "code", "text": ""}\n\n')
    corpus = run(tmp_path / "a.jsonl", "--domain-key", "domain")
    stats = statistics(corpus)
    tokenizer = corpus.tokenizer()
    text = "".join(record["text"] for record in records)
    assert stats["documents"] == len(records)
    assert (stats["characters"], stats["text_bytes"]) == (len(text), len(text.encode()))
    assert stats["text_bytes"] > stats["characters"]  # there is something beyond ASCII
    assert (stats["instances"], stats["packed_tokens"]) == (corpus.num_instances, corpus.num_tokens)
    assert (stats["empty_documents"], stats["bad_records"], stats["lost_text_bytes"]) == (1, 0, 0)
    assert stats["packing"]["tokens_in"] == stats["tokens"]
    table = tokenizer.token_bytes()
    for number, name in enumerate(corpus.domain_names):
        mine = stats["domains"][name]
        own = [record["text"] for record in records if record["domain"] == name]
        rows = np.flatnonzero(corpus.domains == number)
        flat = np.concatenate(corpus.gather(rows))
        assert mine["documents"] == len(own)
        assert mine["text_bytes"] == len("".join(own).encode())
        assert mine["tokens"] == len(tokenizer.encode_flat(own)[0]) + len(own)
        assert (mine["instances"], mine["packed_tokens"]) == (len(rows), len(flat))
        in_tokens = b"".join(table[at] for at in flat if at != tokenizer.eod_id)
        assert mine["packed_text_bytes"] == len(in_tokens)


def test_text_that_is_no_token_and_separators_in_texts_are_counted(
    tmp_path: Path, shared_tokenizers: Path
) -> None:
    # SmolLM2's vocabulary lacks the bytes 0xF1 and 0x04; the other bytes of U+40000 it has.
    texts = ["a \U00040000 b", "x<|endoftext|>y", "\x04", "word " * 100]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prefix = tmp_path / "out"
    assert main(command(shared_tokenizers / "smollm2_hf", prefix, tmp_path / "a.jsonl")) == 0
    stats = statistics(Corpus.open(prefix))
    assert stats["lost_text_bytes"] == 2
    assert stats["documents_without_tokens"] == 1
    assert stats["separators_in_text"] == 1
    assert stats["documents"] == 4


@pytest.mark.parametrize("characters", [1, 500, 10**9])
@pytest.mark.parametrize("backend", ["fast", "hf"])
def test_batch_size_and_back_end_change_nothing(
    tmp_path: Path, tiny_tokenizer: Path, jsonl: bytes, characters: int, backend: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl)

    def make(name: str, characters: int, backend: str) -> Corpus:
        tokenizer = load_tokenizer(tiny_tokenizer, backend=backend)
        reader = TextReader(TextConfig(input=(str(tmp_path / "a.jsonl"),), domain_key="domain"))
        packing = PackingConfig(seq_length=SEQ_LENGTH)
        with CorpusWriter(
            tmp_path / name, tokenizer=tokenizer, seq_length=SEQ_LENGTH, config={}
        ) as writer:
            found = Preprocessor(tokenizer, packing, writer).run(
                reader, batch_characters=characters
            )
            writer.finish(*found)
        return Corpus.open(tmp_path / name)

    found, expected = make("found", characters, backend), make("expected", 3000, "fast")
    assert found.fingerprint == expected.fingerprint
    assert statistics(found) == statistics(expected)


def test_thread_counts_give_the_same_bytes(
    run: Callable[..., Corpus], tmp_path: Path, tiny_tokenizer: Path, jsonl: bytes
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl)
    expected = run(tmp_path / "a.jsonl", "--domain-key", "domain")
    for workers in (1, 2):
        prefix = tmp_path / f"workers{workers}"
        words = command(tiny_tokenizer, prefix, tmp_path / "a.jsonl", "--domain-key", "domain")[1:]
        subprocess.run(
            [sys.executable, "-m", "megatron_miniplm", "preprocess", *words, "--append-eod",
             "--workers", str(workers)],
            cwd=PROJECT, check=True,
        )  # fmt: skip
        assert Corpus.open(prefix).fingerprint == expected.fingerprint


def test_without_a_domain_key_there_is_one_domain(
    run: Callable[..., Corpus], tmp_path: Path, jsonl: bytes
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl)
    corpus = run(tmp_path / "a.jsonl")
    assert list(corpus.domain_names) == ["text"]
    assert not corpus.domains.any()


def test_keys_are_chosen_and_dots_lead_inwards(
    run: Callable[..., Corpus], tmp_path: Path, jsonl: bytes, records: list[dict[str, str]]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl)
    nested = [{"body": r["text"], "meta": {"pile_set_name": r["domain"]}} for r in records]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(record) for record in nested))
    flat = run(tmp_path / "a.jsonl", "--domain-key", "domain")
    flags = ["--json-keys", "body", "--domain-key", "meta.pile_set_name"]
    deep = run(tmp_path / "b.jsonl", *flags, name="deep")
    assert deep.fingerprint == flat.fingerprint
    assert deep.domain_names == flat.domain_names


def test_tails_are_flushed_and_separators_left_out_on_request(
    run: Callable[..., Corpus], tmp_path: Path, jsonl: bytes
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl)
    flags = ["--domain-key", "domain"]
    plain = run(tmp_path / "a.jsonl", *flags)
    flushed = run(tmp_path / "a.jsonl", *flags, "--flush-tails", name="flushed")
    assert instances(flushed)[: plain.num_instances] == instances(plain)
    # One for each domain, but for one whose text happens to fill its last instance.
    assert 1 <= flushed.num_instances - plain.num_instances <= 2
    assert flushed.num_tokens == statistics(flushed)["tokens"]
    bare = run(tmp_path / "a.jsonl", *flags, "--no-append-eod", name="bare")
    assert statistics(bare)["tokens"] == statistics(plain)["tokens"] - 150
    assert not any(bare.eod_id in ids for ids in instances(bare))


def test_shards_hold_as_many_instances_as_asked(
    run: Callable[..., Corpus], tmp_path: Path, jsonl: bytes
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl)
    one = run(tmp_path / "a.jsonl")
    many = run(tmp_path / "a.jsonl", "--instances-per-shard", "50", name="many")
    assert len(many.shards) == -(-one.num_instances // 50) > 1
    assert instances(many) == instances(one)


def test_a_manifest_repeats_its_run(
    run: Callable[..., Corpus], tmp_path: Path, jsonl: bytes
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl)
    first = run(tmp_path / "a.jsonl", "--domain-key", "domain")
    words = ["--from-run", str(first.manifest_path), "--output-prefix", str(tmp_path / "again")]
    assert main(["preprocess", *words]) == 0
    assert Corpus.open(tmp_path / "again").fingerprint == first.fingerprint


def test_a_finished_corpus_is_replaced_only_on_request(
    run: Callable[..., Corpus],
    tmp_path: Path,
    tiny_tokenizer: Path,
    jsonl: bytes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl)
    first = run(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(jsonl + jsonl)
    assert main(command(tiny_tokenizer, first.prefix, tmp_path / "a.jsonl")) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Corpus.open(first.prefix).fingerprint == first.fingerprint
    second = run(tmp_path / "a.jsonl", "--overwrite")
    assert second.num_tokens > first.num_tokens


# ------------------------------------------------------------------------------------------------
# Input forms


def two_zstd_frames(data: bytes) -> bytes:
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    # As the zstd program does; the format has no checksum by itself.
    ".zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        *COMPRESSIONS.items(),
        (".zst", two_zstd_frames),
        (".crlf", lambda b: b.replace(b"\n", b"\r\n")),
    ],
)
def test_every_compression_gives_the_same_documents(
    tmp_path: Path,
    jsonl: bytes,
    suffix: str,
    compress: Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "_BLOCK", 1000)  # lines that span blocks
    (tmp_path / "a.jsonl").write_bytes(jsonl)
    path = tmp_path / f"b.jsonl{suffix}"
    path.write_bytes(compress(jsonl))
    expected = read(tmp_path / "a.jsonl", domain_key="domain")
    reader = TextReader(TextConfig(input=(str(path),), domain_key="domain"))
    assert list(reader) == expected
    assert reader.documents == len(expected) == 150
    assert reader.bytes_read == reader.total_bytes == path.stat().st_size


def read(*paths: Path | str, **config: str) -> list[Document]:
    return list(TextReader(TextConfig(input=tuple(map(str, paths)), **config)))


def write_lines(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_inputs_keep_their_order_and_globs_are_sorted(tmp_path: Path) -> None:
    for name in ["b2", "b10", "b1", "a"]:
        write_lines(tmp_path / f"{name}.jsonl", name)
    found = read(tmp_path / "b*.jsonl", tmp_path / "a.jsonl")
    assert [document.text for document in found] == ["b1", "b10", "b2", "a"]


def test_a_name_with_glob_characters_is_that_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "x[1].jsonl", "literal")
    write_lines(tmp_path / "x1.jsonl", "matched")
    assert [document.text for document in read(tmp_path / "x[1].jsonl")] == ["literal"]


def test_standard_input_is_read(tmp_path: Path, tiny_tokenizer: Path, jsonl: bytes) -> None:
    prefix = tmp_path / "out"
    words = command(tiny_tokenizer, prefix, "-", "--domain-key", "domain")
    subprocess.run(
        [sys.executable, "-m", "megatron_miniplm", *words], input=jsonl, cwd=PROJECT, check=True
    )
    assert statistics(Corpus.open(prefix))["documents"] == 150


def test_a_byte_order_mark_and_a_missing_last_newline_are_no_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}')
    assert [document.text for document in read(path)] == ["one", "two"]


# ------------------------------------------------------------------------------------------------
# Bad input

GOOD = b'{"text": "fine", "domain": "d"}\n'
BAD_RECORDS = [
    pytest.param(b'{"text": "x"', "malformed JSON", id="malformed"),
    pytest.param(b'{"text": "x"} trailing', "malformed JSON at column 15", id="trailing"),
    pytest.param(b'["text"]', "a JSON list, not an object", id="no object"),
    pytest.param(b'{"txt": "x"}', "no key 'text'; the record has ['txt']", id="no text"),
    pytest.param(b'{"text": 3, "domain": "d"}', "'text' is a JSON int", id="number"),
    pytest.param(b'{"text": null, "domain": "d"}', "'text' is a JSON NoneType", id="null"),
    pytest.param(b'{"text": "x"}', "no key 'domain'", id="no domain"),
    pytest.param(b'{"text": "x", "domain": ["d"]}', "'domain' is a JSON list", id="bad domain"),
    pytest.param(b'{"text": "x", "domain": ""}', "'domain' is empty", id="empty domain"),
    pytest.param(b'{"text": "x\xff"}', "invalid UTF-8 at byte 12", id="UTF-8"),
    pytest.param(b'{"text": "\\ud800", "domain": "d"}', "malformed JSON", id="lone surrogate"),
]


def assert_refused(
    words: Sequence[str], out: Path, capsys: pytest.CaptureFixture[str], *fragments: str
) -> None:
    """The verb fails with a one-line message holding `fragments`, and leaves no file in `out`."""
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for fragment in fragments:
        assert fragment in message
    assert [path for path in out.rglob("*") if not path.is_dir()] == []


@pytest.mark.parametrize(("line", "reason"), BAD_RECORDS)
def test_a_bad_record_is_refused_by_file_and_line(
    tmp_path: Path,
    tiny_tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    line: bytes,
    reason: str,
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD * 200 + b"\n" + line + b"\n" + GOOD)
    words = command(tiny_tokenizer, tmp_path / "out" / "c", path, "--domain-key", "domain")
    expected = [f"{path}, line 202: ", reason, "--on-bad-record skip"]
    assert_refused(words, tmp_path / "out", capsys, *expected)


def test_a_record_found_bad_after_instances_were_written_leaves_nothing(
    tmp_path: Path, tiny_tokenizer: Path, jsonl: bytes
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl + b"{")
    tokenizer = load_tokenizer(tiny_tokenizer)
    reader = TextReader(TextConfig(input=(str(tmp_path / "a.jsonl"),)))
    out = tmp_path / "out"
    with CorpusWriter(out / "c", tokenizer=tokenizer, seq_length=64, config={}) as writer:
        preprocessor = Preprocessor(tokenizer, PackingConfig(seq_length=64), writer)
        with pytest.raises(DataError, match="line 151"):
            preprocessor.run(reader, batch_characters=500)
        assert preprocessor.packer.counters.instances > 100
    assert [path for path in out.rglob("*") if not path.is_dir()] == []


def test_bad_records_are_skipped_counted_and_shown(
    run: Callable[..., Corpus],
    tmp_path: Path,
    jsonl: bytes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = jsonl.splitlines(keepends=True)
    bad = [param.values[0] + b"\n" for param in BAD_RECORDS]
    (tmp_path / "good.jsonl").write_bytes(jsonl)
    (tmp_path / "bad.jsonl").write_bytes(b"".join([*lines[:9], *bad, *lines[9:]]))
    flags = ["--domain-key", "domain", "--on-bad-record", "skip"]
    clean = run(tmp_path / "good.jsonl", *flags, name="clean")
    capsys.readouterr()
    skipped = run(tmp_path / "bad.jsonl", *flags, name="skipped")
    message = capsys.readouterr().err
    assert f"{tmp_path / 'bad.jsonl'}, line 10: malformed JSON" in message
    assert message.count("skipped ") == 5
    assert statistics(skipped)["bad_records"] == len(bad)
    assert skipped.fingerprint == clean.fingerprint


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_truncated_compressed_file_is_refused(
    tmp_path: Path,
    tiny_tokenizer: Path,
    jsonl: bytes,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
    policy: str,
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = COMPRESSIONS[suffix](jsonl * 3)
    path.write_bytes(whole[: len(whole) * 2 // 3])
    words = command(tiny_tokenizer, tmp_path / "out" / "c", path, "--on-bad-record", policy)
    assert_refused(words, tmp_path / "out", capsys, f"{path}, after line", "truncated")


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_corrupt_or_misnamed_compressed_file_is_refused(
    tmp_path: Path, jsonl: bytes, suffix: str
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(jsonl)
    with pytest.raises(DataError, match=f"{path}, after line 0"):
        read(path)
    damaged = bytearray(COMPRESSIONS[suffix](jsonl))
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=str(path)):
        read(path)


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", gzip.compress(b"", mtime=0)])
@pytest.mark.parametrize("beside", [b"", GOOD * 100])
def test_a_file_without_records_is_refused_by_name(
    tmp_path: Path,
    tiny_tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    beside: bytes,
) -> None:
    suffix = ".gz" if content.startswith(b"\x1f") else ""
    empty = tmp_path / f"empty.jsonl{suffix}"
    empty.write_bytes(content)
    (tmp_path / "beside.jsonl").write_bytes(beside)
    inputs = [empty] if not beside else [tmp_path / "beside.jsonl", empty]
    words = command(tiny_tokenizer, tmp_path / "out" / "c", *inputs)
    assert_refused(words, tmp_path / "out", capsys, f"{empty} holds no record")


@pytest.mark.parametrize("content", [b'{"text": ""}\n' * 3, b"{\n{\n"])
def test_input_without_a_document_is_refused(
    tmp_path: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    words = command(tiny_tokenizer, tmp_path / "out" / "c", path, "--on-bad-record", "skip")
    assert_refused(words, tmp_path / "out", capsys, f"no document in {path}")


def test_too_little_text_for_one_instance_is_refused(
    tmp_path: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", "short")
    words = command(tiny_tokenizer, tmp_path / "out" / "c", path)
    assert_refused(words, tmp_path / "out", capsys, "no instance of 65", "--flush-tails")


def test_missing_files_folders_and_duplicates_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "text")
    (tmp_path / "b.jsonl").symlink_to(path)
    (tmp_path / "sub").mkdir()
    for words, error, message in [
        ([tmp_path / "none.jsonl"], DataError, "none.jsonl does not exist"),
        ([path, tmp_path / "*.json"], DataError, r"\*.json does not exist and matches no file"),
        ([tmp_path / "sub"], ConfigError, r"sub is a folder.*\*\.jsonl"),
        ([tmp_path / "s*"], ConfigError, "sub is a folder"),
        ([path, tmp_path / "a*"], ConfigError, "a.jsonl twice"),
        ([path, tmp_path / "b.jsonl"], ConfigError, "b.jsonl twice"),
        (["-", "-"], ConfigError, "standard input twice"),
    ]:
        with pytest.raises(error, match=message):
            TextReader(TextConfig(input=tuple(map(str, words))))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers 0"),
        (["--json-keys", "text", "title"], "--json-keys takes one key, not 2"),
        (["--seq-length", "0"], "--seq-length 0"),
        (["--instances-per-shard", "0"], "(0)"),
        (["--eod-token", "<none>"], "--eod-token '<none>'"),
        (["--tokenizer-model", "/nowhere"], "no tokenizer at /nowhere"),
    ],
)
def test_wrong_flags_are_refused(
    tmp_path: Path,
    tiny_tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    path = write_lines(tmp_path / "a.jsonl", "word " * 100)
    words = [*command(tiny_tokenizer, tmp_path / "out" / "c", path), *flags]
    assert_refused(words, tmp_path / "out", capsys, message)


def test_too_many_domains_are_refused(
    tmp_path: Path,
    tiny_tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("megatron_miniplm.data.preprocess.MAX_DOMAINS", 3)
    records = [{"text": "x", "id": str(number)} for number in range(4)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    words = command(tiny_tokenizer, tmp_path / "out" / "c", path, "--domain-key", "id")
    assert_refused(words, tmp_path / "out", capsys, "more than 3 domains", "'3'", "--domain-key")


# ------------------------------------------------------------------------------------------------
# Parquet, and domains from file names


def test_parquet_rows_are_the_same_documents_as_lines(
    run: Callable[..., Corpus], tmp_path: Path, records: list[dict[str, str]], jsonl: bytes
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    nested = [{"body": r["text"], "meta": {"domain": r["domain"]}, "id": 1} for r in records]
    parquet.write_table(
        pyarrow.Table.from_pylist(nested), tmp_path / "a.parquet", row_group_size=40
    )
    (tmp_path / "a.jsonl").write_bytes(jsonl)
    flags = ["--json-keys", "body", "--domain-key", "meta.domain"]
    found = run(tmp_path / "a.parquet", *flags, name="found")
    expected = run(tmp_path / "a.jsonl", "--domain-key", "domain")
    assert found.fingerprint == expected.fingerprint
    assert statistics(found) == statistics(expected)


def test_bad_parquet_is_refused_by_file_and_row(
    tmp_path: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    words = command(tiny_tokenizer, tmp_path / "out" / "c", path)
    parquet.write_table(pyarrow.table({"text": ["x", None, "y"]}), path)
    assert_refused(words, tmp_path / "out", capsys, f"{path}, row 2: 'text' is a JSON NoneType")
    parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    assert_refused(words, tmp_path / "out", capsys, f"{path} has no column 'text'", "['body']")
    path.write_bytes(path.read_bytes()[:-20])
    assert_refused(words, tmp_path / "out", capsys, f"{path} is no readable Parquet file")


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path,
    tiny_tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    words = command(tiny_tokenizer, tmp_path / "out" / "c", path)
    assert_refused(words, tmp_path / "out", capsys, "megatron-miniplm[parquet]")


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("wiki.jsonl", "wiki"),
        ("wiki-00003-of-00010.jsonl.gz", "wiki"),
        ("web_text_12.json.zst", "web_text"),
        ("books.part-0007.parquet", "books"),
        ("c4-en.jsonl", "c4-en"),
        ("0001.jsonl", "0001"),
    ],
)
def test_the_domain_of_a_file_is_its_name_less_suffixes_and_shard_number(
    name: str, domain: str
) -> None:
    assert sources.domain_of_file(f"some/folder-3/{name}") == domain


def test_domains_come_from_file_names_on_request(
    run: Callable[..., Corpus], tmp_path: Path, jsonl: bytes
) -> None:
    for name in ["web-1", "web-2", "books"]:
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl)
    corpus = run(tmp_path / "*.jsonl", "--domain-from-file-name")
    assert list(corpus.domain_names) == ["books", "web"]
    with pytest.raises(ConfigError, match="give one of them"):
        TextConfig(input=("x",), domain_key="domain", domain_from_file_name=True)
    with pytest.raises(ConfigError, match="standard input has no name"):
        sources.domain_of_file("-")
