"""Small real artifacts for tests: a corpus of random tokens, scores of it, how to read it stock."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.scores import ScoreWriter
from megatron_miniplm.data.tokenizers import load_tokenizer
from megatron_miniplm.data.writer import CorpusWriter

SEQ_LENGTH = 32
DOMAINS = ("prose", "code", "mail")


def random_instances(count: int, *, seed: int = 0, vocab: int = 512) -> list[np.ndarray]:
    """Instances of 2 to SEQ_LENGTH + 1 random tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, SEQ_LENGTH + 2, count)
    return np.split(rng.integers(0, vocab, lengths.sum()), np.cumsum(lengths)[:-1])


def write_corpus(
    prefix: Path,
    tokenizer_folder: Path,
    instances: Sequence[np.ndarray],
    *,
    per_shard: int = 1_000_000,
    domains: Sequence[int] | None = None,
    overwrite: bool = False,
) -> Corpus:
    """A corpus of these instances; domains go round by default."""
    if domains is None:
        domains = [row % len(DOMAINS) for row in range(len(instances))]
    with CorpusWriter(
        prefix,
        tokenizer=load_tokenizer(tokenizer_folder),
        seq_length=SEQ_LENGTH,
        config={"made_by": "test"},
        instances_per_shard=per_shard,
        overwrite=overwrite,
    ) as writer:
        for tokens, domain in zip(instances, domains, strict=True):
            writer.add(tokens, np.array([len(tokens)]), domain)
        writer.finish(DOMAINS, {})
    return Corpus.open(prefix)


def write_scores(path: Path, corpus: Corpus, mean_nll: np.ndarray, *, name: str = "model") -> Path:
    """Finished scores with these per-token means (float[N], nats)."""
    writer = ScoreWriter(path, corpus=corpus, config={"name": name}, model={"name": name})
    num_tokens = (corpus.lengths - 1).astype(np.int32)
    sums = (mean_nll * num_tokens).astype(np.float32)
    for number in writer.todo():
        rows = writer.rows(number)
        part = slice(rows.start, rows.stop)
        writer.write_window(number, sums[part], num_tokens[part])
    assert writer.finish()
    return path


def visible(folder: Path) -> set[str]:
    """Names of everything in a folder, hidden ones included."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def flip_byte(path: Path, at: int) -> None:
    """Change one byte in place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)
