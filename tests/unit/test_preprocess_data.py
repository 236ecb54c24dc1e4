"""tools/preprocess_data.py: Megatron's files from text, the separator included; then adopt."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.documents import DocumentWriter, TokenizedDocuments
from megatron_miniplm.data.tokenizers import load_tokenizer
from tests.small_artifacts import visible
from tools import preprocess_data

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Paragraphs of this project's sources; some are empty."""
    parts = []
    for path in sorted((PROJECT / "megatron_miniplm/data").glob("*.py")):
        parts += [*path.read_text().replace("<|endoftext|>", "EOD").split("\n\n\n"), ""]
    return parts


@pytest.fixture
def jsonl(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "a.jsonl"
    records = [{"text": text, "title": text[:9] or "none"} for text in texts]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tool(tokenizer: Path, jsonl: Path, prefix: Path, *words: str) -> int:
    """Run it with the flags of Megatron-LM's own README."""
    fixed = ["--input", jsonl, "--output-prefix", prefix, "--tokenizer-model", tokenizer,
             "--tokenizer-type", "HuggingFaceTokenizer", "--workers", 2]  # fmt: skip
    return preprocess_data.main([*map(str, fixed), *words])


@pytest.mark.parametrize("flags", [[], ["--append-eod"], ["--no-append-eod"]])
def test_stock_megatron_reads_one_sequence_a_document(
    tmp_path, tiny_tokenizer, texts, jsonl, capsys, monkeypatch, flags
):
    monkeypatch.setattr(preprocess_data, "BATCH_CHARACTERS", 2000)
    assert tool(tiny_tokenizer, jsonl, tmp_path / "out/web", *flags) == 0
    assert visible(tmp_path / "out") == {"web_text_document.bin", "web_text_document.idx"}
    tokenizer = load_tokenizer(tiny_tokenizer)
    separator = [] if "--no-append-eod" in flags else [tokenizer.eod_id]
    expected = [tokenizer.encode_flat([text])[0].tolist() + separator for text in texts if text]
    stock = IndexedDataset(str(tmp_path / "out/web_text_document"))
    assert [stock[at].tolist() for at in range(len(stock))] == expected
    assert stock.document_indices.tolist() == list(range(len(expected) + 1))
    assert stock.index.dtype == np.uint16
    said = capsys.readouterr().err
    assert ("every document ends with <|endoftext|> (id 0)" in said) == bool(separator)
    assert ("no separator between documents" in said) != bool(separator)


@pytest.mark.parametrize("flags", [[], ["--flush-tails"]])
def test_adopting_its_files_gives_the_corpus_of_the_text(tmp_path, tiny_tokenizer, jsonl, flags):
    fixed = ["--tokenizer-model", str(tiny_tokenizer), "--seq-length", "48", *flags]
    assert tool(tiny_tokenizer, jsonl, tmp_path / "web") == 0
    stock, found = str(tmp_path / "web_text_document"), tmp_path / "found"
    assert main(["adopt", "--input", stock, *fixed, "--output-prefix", str(found)]) == 0
    expected = tmp_path / "expected"
    words = ["preprocess", "--input", str(jsonl), *fixed, "--output-prefix", str(expected)]
    assert main(words) == 0
    adopted, packed = Corpus.open(found), Corpus.open(expected)
    assert len(adopted) > 100
    assert adopted.lengths.tolist() == packed.lengths.tolist()
    for ours, theirs in zip(
        adopted.gather(range(len(adopted))), packed.gather(range(len(packed))), strict=True
    ):
        assert ours.tobytes() == theirs.tobytes()


def test_every_key_makes_its_files(tmp_path, tiny_tokenizer, texts, jsonl):
    assert tool(tiny_tokenizer, jsonl, tmp_path / "web", "--json-keys", "text", "title") == 0
    titles = TokenizedDocuments.open(tmp_path / "web_title_document")
    tokenizer = load_tokenizer(tiny_tokenizer)
    first = titles.tokens[: titles.ends(0, 1)[0]].tolist()
    assert tokenizer.decode(first) == texts[0][:9] + "<|endoftext|>"
    assert len(titles) == len(texts)


@pytest.mark.slow
def test_real_text_with_a_large_vocabulary_survives_the_round_trip(
    tmp_path, shared_dir, shared_tokenizers
):
    with lzma.open(shared_dir / "corpus/heldout.jsonl.xz") as file:
        lines = [file.readline() for _ in range(60)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    model = shared_tokenizers / "qwen2.5_hf"
    assert tool(model, tmp_path / "a.jsonl", tmp_path / "real") == 0
    fixed = ["--tokenizer-model", str(model), "--seq-length", "256"]
    stock = str(tmp_path / "real_text_document")
    for words in (["adopt", "--input", stock], ["preprocess", "--input", tmp_path / "a.jsonl"]):
        prefix = str(tmp_path / str(words[0]))
        assert main([*map(str, words), *fixed, "--output-prefix", prefix]) == 0
    adopted, packed = Corpus.open(tmp_path / "adopt"), Corpus.open(tmp_path / "preprocess")
    assert adopted.dtype == np.int32
    assert len(adopted) > 20
    found = [tokens.tolist() for tokens in adopted.gather(range(len(adopted)))]
    assert found == [tokens.tolist() for tokens in packed.gather(range(len(packed)))]


def test_the_script_runs_by_its_path(tmp_path, tiny_tokenizer, jsonl):
    words = ["--input", jsonl, "--output-prefix", tmp_path / "web", "--tokenizer-model",
             tiny_tokenizer, "--log-interval", 10]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "tools/preprocess_data.py", *map(str, words)], cwd=PROJECT,
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert "Processed " in done.stderr
    assert "docs/s, " in done.stderr
    assert TokenizedDocuments.open(tmp_path / "web_text_document")


# ------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("flag", sorted(preprocess_data.UNSUPPORTED))
@pytest.mark.parametrize("spelling", ["{}", "{}=2"])
def test_flags_that_mean_nothing_here_are_refused_by_name(capsys, flag, spelling):
    assert preprocess_data.main(["--input", "x", spelling.format(flag)]) == 2
    assert f"{flag} is not supported: " in capsys.readouterr().err


def test_a_bad_record_leaves_no_file(tmp_path, tiny_tokenizer, jsonl, capsys):
    jsonl.write_bytes(jsonl.read_bytes() + b'{"text": 3}\n')
    assert tool(tiny_tokenizer, jsonl, tmp_path / "web") == 2
    assert "not a string" in capsys.readouterr().err
    assert visible(tmp_path) == {"a.jsonl"}
    assert tool(tiny_tokenizer, jsonl, tmp_path / "web", "--on-bad-record", "skip") == 0
    assert "1 bad records" in capsys.readouterr().err


def test_files_that_are_there_are_replaced_only_on_request(tmp_path, tiny_tokenizer, jsonl, capsys):
    assert tool(tiny_tokenizer, jsonl, tmp_path / "web") == 0
    before = (tmp_path / "web_text_document.bin").read_bytes()
    jsonl.write_text('{"text": "another"}\n')
    assert tool(tiny_tokenizer, jsonl, tmp_path / "web") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "web_text_document.bin").read_bytes() == before
    stale = tmp_path / "web_text_document/cache/GPTDataset_indices"  # keyed by path alone
    stale.mkdir(parents=True)
    assert tool(tiny_tokenizer, jsonl, tmp_path / "web", "--overwrite") == 0
    assert not stale.exists()
    assert len(TokenizedDocuments.open(tmp_path / "web_text_document")) == 1


def test_texts_of_no_token_at_all_make_no_file(tmp_path, shared_tokenizers, capsys):
    # SmolLM2's vocabulary lacks this byte.
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "\x04"}) + "\n")
    assert tool(shared_tokenizers / "smollm2_hf", tmp_path / "a.jsonl", tmp_path / "web") == 2
    assert "no document of 1 has a token" in capsys.readouterr().err
    assert visible(tmp_path) == {"a.jsonl"}


def test_numbers_and_keys_out_of_range_are_refused(tmp_path, tiny_tokenizer, jsonl, capsys):
    for words, reason in (
        (["--log-interval", "0"], "--log-interval 0 must be at least 1"),
        (["--json-keys", "text", "text"], "give different keys"),
    ):
        assert tool(tiny_tokenizer, jsonl, tmp_path / "web", *words) == 2
        assert reason in capsys.readouterr().err
    words = ["--json-keys", "text", "title"]
    assert tool(tiny_tokenizer, Path("-"), tmp_path / "web", *words) == 2
    assert "standard input can be read once" in capsys.readouterr().err


def test_a_writer_left_without_finish_leaves_no_file_and_the_old_one(tmp_path):
    with DocumentWriter(tmp_path / "docs", np.dtype(np.uint16)) as writer:
        writer.add(np.array([5, 0]), np.array([2]))
        writer.finish()
    with DocumentWriter(tmp_path / "docs", np.dtype(np.uint16), overwrite=True) as writer:
        writer.add(np.array([7, 8, 0]), np.array([3]))
    assert TokenizedDocuments.open(tmp_path / "docs").tokens.tolist() == [5, 0]
    assert visible(tmp_path) == {"docs.bin", "docs.idx"}
    with pytest.raises(ConfigError, match="overwrite"):
        DocumentWriter(tmp_path / "docs", np.dtype(np.uint16)).__enter__()


def test_two_writers_of_one_prefix_do_not_mix(tmp_path):
    prefix, dtype = tmp_path / "web", np.dtype(np.uint16)
    with DocumentWriter(prefix, dtype) as writer:
        with pytest.raises(ConfigError, match=r"another process is writing .*web"):
            DocumentWriter(prefix, dtype).__enter__()
        writer.add(np.array([5, 6]), np.array([2]))
        writer.finish()
    assert TokenizedDocuments.open(prefix).tokens.tolist() == [5, 6]
    assert visible(tmp_path) == {"web.bin", "web.idx"}
