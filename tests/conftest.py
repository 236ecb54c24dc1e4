"""Fixtures shared by the suites: where real data is, and a small real tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.data.corpus import Corpus
from tests.pool import PROJECT, RankPool
from tests.runs import TINY, pretrain_flags, score_flags

SEQ_LENGTH = 64
BIG = 260_000
"""Characters of `big_corpus`, whatever the project grows to."""


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of real corpora and tokenizers; tests that need it skip without."""
    folder = os.environ.get("MINIPLM_REAL_DATA")
    shared = Path(folder) if folder else PROJECT.parent / "shared" / "data"
    if not shared.is_dir():
        pytest.skip("real corpora are not part of the repository: MINIPLM_REAL_DATA names a folder")
    return shared


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte-level BPE with 512 entries, trained on this project's own Python files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    texts = [path.read_text() for path in sorted((PROJECT / "megatron_miniplm").rglob("*.py"))[:12]]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four ranks, started when first needed."""
    ranks = RankPool(4, tmp_path_factory.mktemp("pool"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Prefix of a corpus of how this project's own files begin: some 3,000 instances of 65."""
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "text.jsonl").open("w") as file:
        for path in sorted((PROJECT / "megatron_miniplm").rglob("*.py")):
            record = {"text": path.read_text()[:2_000], "domain": path.parent.name}
            file.write(json.dumps(record) + "\n")
    code = main([
        "preprocess", "--input", str(folder / "text.jsonl"), "--json-keys", "text",
        "--domain-key", "domain", "--tokenizer-model", str(tiny_tokenizer),
        "--seq-length", str(SEQ_LENGTH), "--output-prefix", str(folder / "code"),
    ])  # fmt: skip
    assert code == 0
    return folder / "code"


@pytest.fixture(scope="session")
def big_corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A corpus of a little more than two windows of 4,096 very short instances."""
    folder = tmp_path_factory.mktemp("big")
    with (folder / "text.jsonl").open("w") as file:
        paths = sorted(PROJECT.glob("megatron_miniplm/[cdm]*/*.py"))
        for path in paths:
            file.write(json.dumps({"text": path.read_text()[: BIG // len(paths)]}) + "\n")
    flags = [
        "preprocess", "--input", str(folder / "text.jsonl"), "--seq-length", "12",
        "--tokenizer-model", str(tiny_tokenizer), "--output-prefix", str(folder / "short"),
    ]  # fmt: skip
    assert main(flags) == 0
    assert len(Corpus.open(folder / "short")) > 2 * 4096
    return folder / "short"


@pytest.fixture(scope="session")
def model(pool: RankPool, big_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained a little, so that scores differ between instances."""
    save = tmp_path_factory.mktemp("model") / "run"
    pool.run(pretrain_flags(big_corpus, save, *TINY, iterations=10), 1)
    return save


@pytest.fixture(scope="session")
def one_process(
    pool: RankPool, big_corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Scores of `big_corpus`, made by one process."""
    output = tmp_path_factory.mktemp("scores") / "one"
    pool.run(score_flags(big_corpus, model, output), 1)
    return output
