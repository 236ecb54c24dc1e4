"""SIGKILL at any moment of preprocess_data, adopt and retokenize: nothing half-made opens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.documents import TokenizedDocuments
from megatron_miniplm.data.verify import verify
from tests.pool import PROJECT
from tests.small_artifacts import visible
from tools import preprocess_data

ROUNDS = 5
# A process of its own, not a fork: the tokenizers' threads do not survive one.
WORK_FOREVER = """
import json, sys
from megatron_miniplm.__main__ import main
from tools import preprocess_data
tool, *verbs = json.loads(sys.argv[1])
while True:
    assert preprocess_data.main(tool) == 0
    for words in verbs:
        assert main(words) == 0
    print("once more", flush=True)
"""


@pytest.fixture
def commands(tmp_path: Path, tiny_tokenizer: Path) -> list[list[str]]:
    """Text to documents, documents to corpus, corpus to corpus; each replaces what is there."""
    files = sorted((PROJECT / "megatron_miniplm/data").glob("*.py"))
    lines = [json.dumps({"text": path.read_text()}) + "\n" for path in files]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    fixed = ["--tokenizer-model", str(tiny_tokenizer), "--overwrite", "--output-prefix"]
    stock, adopted = tmp_path / "web", tmp_path / "adopted"
    return [
        ["--input", str(tmp_path / "a.jsonl"), *fixed, str(stock)],
        ["adopt", "--input", f"{stock}_text_document", "--seq-length", "64", *fixed, str(adopted)],
        ["retokenize", "--data-path", str(adopted), *fixed, str(tmp_path / "new")],
    ]


def run_all(commands: list[list[str]]) -> None:
    tool, *verbs = commands
    assert preprocess_data.main(tool) == 0
    for words in verbs:
        assert main(words) == 0


def test_a_killed_adoption_leaves_nothing_that_opens_and_nothing_in_the_way(tmp_path, commands):
    rng = np.random.default_rng(2)
    run_all(commands)
    stock = tmp_path / "web_text_document"
    tokens = TokenizedDocuments.open(stock).tokens.tolist()
    expected = {name: Corpus.open(tmp_path / name).fingerprint for name in ("adopted", "new")}
    files = visible(tmp_path)
    incomplete = 0
    for _ in range(ROUNDS):
        process = subprocess.Popen(
            [sys.executable, "-c", WORK_FOREVER, json.dumps(commands)], cwd=PROJECT,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        started = time.monotonic()
        assert process.stdout.readline() == "once more\n"
        process.stdout.readline()
        one_round = time.monotonic() - started
        time.sleep(rng.uniform(0, min(one_round, 1.0)))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        process.stdout.close()
        incomplete += visible(tmp_path) != files
        for name in ("adopted", "new"):
            if (tmp_path / f"{name}.json").exists():
                assert verify(tmp_path / name) == []
        if (tmp_path / "web_text_document.idx").exists():
            assert TokenizedDocuments.open(stock).tokens.tolist() == tokens
        run_all(commands)
        found = {name: Corpus.open(tmp_path / name).fingerprint for name in expected}
        assert found == expected
        assert visible(tmp_path) == files
    assert incomplete, "the kills hit no moment that matters: change the delays"
