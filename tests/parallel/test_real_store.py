"""Logits of a real teacher on real English: their size, and that its scores are in the store."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.data.logit_codec import decode
from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.data.scores import Scores
from tests.parallel.test_conversion import words
from tests.parallel.test_real_checkpoint import smollm2  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow
BYTES = 12_000
MOST_BYTES_PER_LOGIT = 2.7


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
