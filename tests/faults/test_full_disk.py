"""A full disk: every stage says so, leaves nothing that opens, and completes once there is room."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import DataError, MiniPLMError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.documents import TokenizedDocuments
from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.data.verify import verify
from tests.pool import PROJECT
from tests.runs import TINY, pretrain_flags
from tests.small_artifacts import visible
from tools import preprocess_data

Make = Callable[[Path], str]
"""Makes an artifact at a prefix and returns what it said: empty if all went well."""


@pytest.fixture
def documents(tmp_path: Path, tiny_tokenizer: Path) -> Path:
    """Some 100,000 tokens in a stock prefix."""
    files = sorted((PROJECT / "megatron_miniplm/data").glob("*.py"))
    lines = [json.dumps({"text": path.read_text()}) + "\n" for path in files]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    words = ["--input", tmp_path / "a.jsonl", "--tokenizer-model", tiny_tokenizer]
    assert preprocess_data.main([*map(str, words), "--output-prefix", str(tmp_path / "web")]) == 0
    return tmp_path / "web_text_document"


@pytest.fixture
def make(
    request: pytest.FixtureRequest,
    documents: Path,
    tiny_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Make:
    """The stage that the test names."""
    tokenizer = ["--tokenizer-model", tiny_tokenizer]
    adopt = ["adopt", "--input", documents, "--seq-length", "16", *tokenizer]
    corpus = tmp_path / "corpus"
    assert main([*map(str, adopt), "--output-prefix", str(corpus)]) == 0

    def command(*words: object) -> str:
        capsys.readouterr()
        run = preprocess_data.main if words[0] == "--input" else main
        return capsys.readouterr().err if run(list(map(str, words))) else ""

    def subset(prefix: Path, *, materialize: bool) -> str:
        opened = Corpus.open(corpus)
        rows = np.arange(0, len(opened), 2)
        options = {"config": {}, "selection": {}, "materialize": materialize}
        try:
            write_subset(opened, rows, prefix, **options)
        except DataError as error:
            return str(error)
        return ""

    split = ["split", "--data-path", corpus, "--reference-fraction", "0.5", "--reference-prefix"]
    cache = ["cache-logits", "--data-path", tmp_path / "part", "--load", tmp_path / "teacher"]
    makes: dict[str, Make] = {
        "adopt": lambda prefix: command(*adopt, "--output-prefix", prefix),
        "view": lambda prefix: subset(prefix, materialize=False),
        "materialize": lambda prefix: subset(prefix, materialize=True),
        "retokenize": lambda prefix: command(
            "retokenize", "--data-path", corpus, *tokenizer, "--output-prefix", prefix
        ),
        "split": lambda prefix: command(*split, prefix.with_name("ref"), "--pool-prefix", prefix),
        "documents": lambda prefix: command(
            "--input", tmp_path / "a.jsonl", *tokenizer, "--output-prefix", prefix
        ),
        "cache-logits": lambda prefix: command(*cache, "--top-k", "8", "--output", prefix),
    }
    if request.param == "cache-logits":
        part = ["--pool-prefix", tmp_path / "rest", tmp_path / "part"]
        assert command(*split[:4], "0.02", "--reference-prefix", part[2], *part[:2]) == ""
        train = pretrain_flags(corpus, tmp_path / "teacher", *TINY, iterations=1)
        assert command(*train, "--lr-warmup-iters", "0") == ""
    return makes[request.param]


def leave(folder: Path, size: int) -> Path:
    """Fill the disk but for `size` bytes."""
    filler = folder / "filler"
    room = os.statvfs(folder)
    filler.write_bytes(bytes(room.f_bavail * room.f_bsize - size))
    return filler


def identity(prefix: Path) -> object:
    """What the finished artifact at `prefix` is; refuses to say where there is none."""
    if prefix.with_name("c_text_document.idx").exists():
        return TokenizedDocuments.open(prefix.with_name("c_text_document")).tokens.tolist()
    if prefix.is_dir():
        return RecordStore.open(prefix).fingerprint
    return Corpus.open(prefix).fingerprint


@pytest.mark.parametrize(
    "make",
    ["adopt", "view", "materialize", "retokenize", "split", "documents", "cache-logits"],
    indirect=True,
)
def test_it_is_said_leaves_nothing_and_the_same_command_completes_later(
    make: Make, small_disk: Path, tmp_path: Path
) -> None:
    assert make(tmp_path / "expected" / "c") == ""
    expected = identity(tmp_path / "expected" / "c")
    prefix = small_disk / "c"
    failures = 0
    for pages in (0, 1, 2, 4, 8, 16, 32, 64):  # it fills up at one file or another
        filler = leave(small_disk, pages * 4096)
        message = make(prefix)
        filler.unlink()
        if not message:
            break
        failures += 1
        assert "No space left on device" in message
        assert "Traceback" not in message
        assert str(small_disk) in message
        with pytest.raises(MiniPLMError):
            identity(prefix)
        # Of a split, the reference may be complete when there is no room for the pool; what was
        # cached of a store stays in its folder, for the next run.
        kept = {name for name in visible(small_disk) if name.startswith("ref")}
        assert visible(small_disk) <= kept | ({"c"} if prefix.is_dir() else set())
    else:
        assert make(prefix) == ""
    assert failures >= 2, "there was room for everything: leave less"
    assert identity(prefix) == expected
    for manifest in small_disk.glob("*.json"):
        assert verify(manifest.with_suffix("")) == []
    assert not list(small_disk.rglob(".*"))
