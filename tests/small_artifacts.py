"""Small real artifacts for tests: a corpus of random tokens, scores of it, how to read it stock."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.logit_codec import Encoding, encode
from megatron_miniplm.data.record_writer import RecordWriter
from megatron_miniplm.data.scores import ScoreWriter
from megatron_miniplm.data.sparse_logits import SparseLogits
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


def random_logits(positions: int, *, seed: int, kept: int, vocab: int = 512) -> SparseLogits:
    """The `kept` likeliest tokens of random distributions, with the log-partition at 2."""
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(positions, vocab)) * 2)
    log_q = logits.log_softmax(-1)
    ids = log_q.topk(kept).indices.sort(-1).values
    log_probs = log_q.gather(-1, ids)
    columns = {
        "gold_log_prob": log_q[:, 0], "entropy": -(log_q.exp() * log_q).sum(-1),
        "logit_std": logits.std(-1), "tail_mass": (1 - log_probs.exp().sum(-1)).clamp_min(0),
    }  # fmt: skip
    return SparseLogits(
        counts=np.full(positions, kept, np.uint32), ids=ids.flatten().int().numpy(),
        log_probs=log_probs.flatten().float().numpy(),
        log_partitions={2.0: (log_q / 2).logsumexp(-1).float().numpy()},
        **{name: value.float().numpy() for name, value in columns.items()},
    )  # fmt: skip


def write_logits(path: Path, corpus: Corpus, *, seed: int = 0, kept: int = 5, **facts) -> Path:
    """A finished store of random logits of every instance, in float32; seeds are of root ids."""
    writer = RecordWriter(
        path, corpus=corpus, facts={"vocab_size": corpus.vocab_size} | facts,
        config={
            "what": "logits", "sampling": "topk", "kd_temperatures": [2.0],
            "truncate": "top-p-k", "top_k": kept, "force_gold": False,
        },
    )  # fmt: skip
    for number in writer.todo():
        records = []
        for row in writer.rows(number):
            tokens = corpus.tokens(row)
            positions = int((tokens[:-1] != corpus.eod_id).sum())
            said = random_logits(positions, seed=seed + int(corpus.ids[row]), kept=kept)
            records.append(encode(said, Encoding(value_bits=32), vocab_size=corpus.vocab_size))
        writer.write_window(number, records)
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
