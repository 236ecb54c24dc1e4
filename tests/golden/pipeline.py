"""The main job in miniature, on the text of this project's licence: every number of it.

The text never changes, the tokenizer lies beside this file, and everything else is seeded, so all
that may move the numbers is the code (and, within tolerance, the CPU's rounding).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_miniplm.core.manifest import hash_parts
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.scores import Scores
from tests.pool import PROJECT, RankPool
from tests.runs import losses

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden.json"
TEACHER = ["--num-layers", "4", "--hidden-size", "64", "--ffn-hidden-size", "176"]
SMALL = ["--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "88"]


def run_pipeline(pool: RankPool, folder: Path) -> dict[str, Any]:
    """Run every verb of the main job in `folder`; returns the numbers that are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_text(folder / "text.jsonl")
    corpus, reference, pool_prefix = folder / "corpus", folder / "reference", folder / "pool"
    pool.run([
        "preprocess", "--input", str(folder / "text.jsonl"), "--json-keys", "text",
        "--domain-key", "domain", "--tokenizer-model", str(HERE / "tokenizer.json"),
        "--seq-length", "32", "--output-prefix", str(corpus),
    ], 1)  # fmt: skip
    pool.run([
        "split", "--data-path", str(corpus), "--reference-fraction", "0.2", "--seed", "1",
        "--reference-prefix", str(reference), "--pool-prefix", str(pool_prefix),
    ], 1)  # fmt: skip
    curves = {
        "teacher": _train(pool, corpus, folder / "teacher", TEACHER, iterations=40),
        "reference": _train(pool, reference, folder / "ref", SMALL, iterations=20),
    }
    scores = {}
    for role, run in (("teacher", "teacher"), ("reference", "ref")):
        output = folder / "scores" / role
        pool.run([
            "score", "--data-path", str(pool_prefix), "--load", str(folder / run),
            "--output", str(output),
        ], 1)  # fmt: skip
        scores[role] = Scores.open(output).mean_nll()
    pool.run([
        "select", "--data-path", str(pool_prefix), "--selector", "difference",
        "--teacher-scores", str(folder / "scores/teacher"),
        "--reference-scores", str(folder / "scores/reference"),
        "--selection-ratio", "0.5", "--output-prefix", str(folder / "chosen"),
    ], 1)  # fmt: skip
    chosen = folder / "chosen"
    curves["student"] = _train(pool, chosen, folder / "student", SMALL, iterations=20)
    teaching = [
        "--objective", "kd", "--teacher", "online", "--teacher-load", str(folder / "teacher"),
    ]  # fmt: skip
    taught = [*SMALL, *teaching]
    curves["taught student"] = _train(pool, chosen, folder / "taught", taught, iterations=20)
    opened = Corpus.open(corpus)
    tokens = np.concatenate(opened.gather(range(len(opened)))).astype("<i4")
    return {
        "corpus": {
            "instances": len(opened),
            "tokens_hash": hash_parts(tokens.tobytes(), opened.lengths.astype("<i4").tobytes()),
            "domains": np.bincount(opened.domains).tolist(),
        },
        "reference_ids": Corpus.open(reference).ids.tolist(),
        "kept_ids": Corpus.open(folder / "chosen").ids.tolist(),
        "r": (scores["reference"] - scores["teacher"]).tolist(),
        "losses": curves,
    }


def _write_text(path: Path) -> None:
    paragraphs = (PROJECT / "LICENSE").read_text().split("\n\n")
    with path.open("w") as file:
        for at, text in enumerate(paragraphs):
            file.write(json.dumps({"text": text, "domain": f"part {at // 30}"}) + "\n")


def _train(
    pool: RankPool, corpus: Path, save: Path, shape: list[str], *, iterations: int
) -> list[float]:
    pool.run([
        "pretrain", "--train-data-path", str(corpus), "--save", str(save), *shape,
        "--num-attention-heads", "2", "--micro-batch-size", "8", "--global-batch-size", "8",
        "--train-iters", str(iterations), "--lr", "1e-3", "--lr-warmup-iters", "4",
        "--log-interval", "1", "--seed", "1",
    ], 1)  # fmt: skip
    return losses(save)
