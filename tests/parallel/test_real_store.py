"""Logits of a real teacher on real English: their size, and that its scores are in the store."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from megatron_miniplm.__main__ import main
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.logit_codec import decode
from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.data.scores import Scores
from megatron_miniplm.data.sparse_logits import SparseLogits
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.kernels.sparse_definition import sparse_losses
from megatron_miniplm.kernels.sparse_loss import SparseLoss, SparseTargets
from megatron_miniplm.kernels.token_loss import Tokens
from tests.parallel.test_conversion import words
from tests.parallel.test_real_checkpoint import smollm2  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow
BYTES = 12_000
MOST_BYTES_PER_LOGIT = 2.7
MOST_NATS = 1e-3
POSITIONS = 48
"""Of which every logit of a student is at hand."""


def targets(said: SparseLogits) -> SparseTargets:
    counts = said.counts.astype(np.int64)
    there = np.arange(counts.max()) < counts[:, None]
    ids, probs = np.full(there.shape, -1, np.int32), np.zeros(there.shape, np.float32)
    ids[there], probs[there] = said.ids, np.exp(said.log_probs)
    ids_NK, probs_NK, tail_N = map(torch.from_numpy, (ids, probs, said.tail_mass))
    return SparseTargets(ids_NK=ids_NK, probs_NK=probs_NK, tail_N=tail_N)


def loss(student_NV: torch.Tensor, said: SparseLogits) -> float:
    """Nats a token, with the default tail, in fp64."""
    none = torch.zeros(len(said), dtype=torch.int64)
    tokens = Tokens.of(none, valid=student_NV.shape[1])
    return float(
        sparse_losses(SparseLoss(form="residual"), student_NV, targets(said), tokens).mean()
    )


def test_a_real_teacher_fits_in_few_bytes_and_keeps_its_scores(
    smollm2: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    assert main(words("gguf", smollm2, "megatron", tmp_path / "teacher")) == 0
    text = "\n".join(topics.values())[:BYTES]
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}))
    corpus, teacher = str(tmp_path / "corpus"), str(tmp_path / "teacher")
    flags = [
        "preprocess", "--input", str(tmp_path / "text.jsonl"), "--seq-length", "256",
        "--tokenizer-model", f"{teacher}/tokenizer", "--eod-token", "<|endoftext|>",
        "--output-prefix", corpus,
    ]  # fmt: skip
    assert main(flags) == 0
    shared = ["--data-path", corpus, "--load", teacher, "--micro-batch-size", "4"]
    assert main(["score", *shared, "--output", str(tmp_path / "scores")]) == 0
    assert main(["cache-logits", *shared, "--output", str(tmp_path / "store")]) == 0
    store, scores = RecordStore.open(tmp_path / "store"), Scores.open(tmp_path / "scores")
    kept = [decode(payload) for payload in store.read(store.ids)]
    worst = max(
        abs(-each.gold_log_prob.sum(dtype=np.float64) - nll)
        for each, nll in zip(kept, scores.sum_nll, strict=True)
    )
    content = store.manifest.content
    print(
        f"\n{content['num_tokens']} positions, {content['num_values'] / content['num_tokens']:.1f} "
        f"logits each, {content['bytes_per_value']:.2f} bytes a logit, "
        f"{content['bytes_per_token']:.1f} a position; scores differ by {worst:.1e} at most"
    )
    assert worst < 1e-2
    assert content["bytes_per_value"] <= MOST_BYTES_PER_LOGIT
    # What 10 bits cost a student: one that knows how often words are, and a noisy real model.
    write_subset(Corpus.open(corpus), np.array([0]), tmp_path / "one", config={}, selection={})
    one = ["--data-path", str(tmp_path / "one"), "--load", teacher, "--value-bits", "32"]
    assert main(["cache-logits", *one, "--output", str(tmp_path / "exact")]) == 0
    whole = ["--truncate", "none", "--output", str(tmp_path / "whole")]
    assert main(["cache-logits", *one, *whole]) == 0
    here = np.arange(POSITIONS)
    exact, full, stored = (
        decode(RecordStore.open(tmp_path / name).read([0])[0]).at(here)
        for name in ("exact", "whole", "store")
    )
    vocab = content["vocab_size"]
    text_ids = np.concatenate([Corpus.open(corpus).tokens(i) for i in range(len(store))])
    frequencies = torch.from_numpy(np.bincount(text_ids, minlength=vocab) + 1.0).log()
    noise = torch.randn(POSITIONS, vocab, generator=torch.Generator().manual_seed(1)).double()
    log_probs = torch.from_numpy(full.log_probs.reshape(POSITIONS, vocab)).double()
    for student_NV in (frequencies.expand(POSITIONS, vocab), log_probs / 1.3 + 0.5 * noise):
        expected, found = loss(student_NV, exact), loss(student_NV, stored)
        print(f"loss {expected:.4f} nats a token, of the default encoding {found - expected:+.1e}")
        assert expected > 0.01
        assert abs(found - expected) < MOST_NATS
