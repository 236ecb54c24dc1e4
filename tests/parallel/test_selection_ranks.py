"""`select` under torchrun: the same bytes for any number of ranks, and no rank left waiting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.core.manifest import hash_parts
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.stages import select
from tests.pool import RankFailedError, RankPool
from tests.small_artifacts import random_instances, visible, write_corpus, write_scores

COUNT = 400


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tiny_tokenizer) -> Corpus:
    """Five shards, three domains."""
    prefix = tmp_path_factory.mktemp("ranks") / "pool"
    return write_corpus(prefix, tiny_tokenizer, random_instances(COUNT), per_shard=90)


@pytest.fixture(scope="module")
def scores(corpus) -> dict[str, Path]:
    """Many ties, some across shards."""
    rng = np.random.default_rng(5)
    folder = corpus.prefix.parent
    return {
        role: write_scores(folder / role, corpus, rng.integers(1, 6, COUNT).astype(float))
        for role in ("teacher", "reference")
    }


def command(corpus: Corpus, scores: dict[str, Path], prefix: Path, *more: str) -> list[str]:
    return [
        "select", "--data-path", str(corpus.prefix), "--output-prefix", str(prefix),
        "--teacher-scores", str(scores["teacher"]),
        "--reference-scores", str(scores["reference"]), *more,
    ]  # fmt: skip


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which holds the time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "chosen.json"}


@pytest.mark.parametrize(
    "flags",
    [
        ["--selection-ratio", "0.3"],
        ["--selection-tokens", "2000", "--stratify", "domain"],
        ["--selector", "random", "--materialize"],
    ],
    ids=["ratio", "tokens by domain", "materialised"],
)
def test_ranks_write_what_one_process_writes(pool: RankPool, corpus, scores, tmp_path, flags):
    links = ["--link", "absolute"]
    pool.run(command(corpus, scores, tmp_path / "one" / "chosen", *flags, *links), 1)
    one = Corpus.open(tmp_path / "one" / "chosen")
    for world in (2, 3):
        folder = tmp_path / f"{world}"
        pool.run(command(corpus, scores, folder / "chosen", *flags, *links), world)
        assert content_of(folder) == content_of(tmp_path / "one")
        found = Corpus.open(folder / "chosen")
        assert found.fingerprint == one.fingerprint
        assert found.manifest.content["selection"] == one.manifest.content["selection"]


def test_more_ranks_than_shards_are_of_no_harm(pool: RankPool, tiny_tokenizer, tmp_path):
    corpus = write_corpus(tmp_path / "pool", tiny_tokenizer, random_instances(20))
    flags = ["select", "--data-path", str(corpus.prefix), "--selector", "random"]
    pool.run([*flags, "--output-prefix", str(tmp_path / "chosen")], 2)
    prefix = tmp_path / "one"
    select.run(select.Config(data_path=corpus.prefix, output_prefix=prefix, selector="random"))
    assert Corpus.open(tmp_path / "chosen").fingerprint == Corpus.open(prefix).fingerprint


def test_what_one_rank_finds_broken_ends_all_of_them(pool: RankPool, corpus, scores, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(scores["teacher"], teacher)
    column = np.load(teacher / "sum_nll.npy")
    column[-1] = np.nan  # in the last rank's shard, under a fingerprint that fits
    np.save(teacher / "sum_nll.npy", column)
    manifest = json.loads((teacher / "manifest.json").read_text())
    counts = np.load(teacher / "num_tokens.npy")
    manifest["fingerprint"] = hash_parts(corpus.fingerprint, column.data, counts.data)
    (teacher / "manifest.json").write_text(json.dumps(manifest))
    before = visible(tmp_path)
    broken = command(corpus, scores | {"teacher": teacher}, tmp_path / "chosen")
    workers = list(pool.workers[:2])
    with pytest.raises(RankFailedError, match=f"row {COUNT - 1} has sum_nll nan"):
        pool.run(broken, 2, timeout=120)
    assert visible(tmp_path) == before
    assert pool.workers[:2] == workers, "a rank hung and had to be killed"
