"""SIGKILL at any moment of `split` and `select`: nothing half-made opens or gets in the way."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.data.verify import verify
from megatron_miniplm.stages import select, split
from tests.small_artifacts import random_instances, visible, write_corpus, write_scores

ROUNDS = 25


def work_forever(splitting: split.Config, selecting: select.Config) -> None:
    """Make the artifacts over and over, on top of each other."""
    while True:
        split.run(dataclasses.replace(splitting, overwrite=True))
        select.run(dataclasses.replace(selecting, overwrite=True))


@pytest.fixture
def stages(tmp_path, tiny_tokenizer) -> tuple[split.Config, select.Config]:
    corpus = write_corpus(tmp_path / "pile", tiny_tokenizer, random_instances(300), per_shard=20)
    splitting = split.Config(
        data_path=corpus.prefix, reference_fraction=0.2, reference_prefix=tmp_path / "ref",
        pool_prefix=tmp_path / "pool",
    )  # fmt: skip
    split.run(splitting)
    pool = Corpus.open(tmp_path / "pool")
    rng = np.random.default_rng(0)
    folders = {
        f"{role}_scores": write_scores(
            tmp_path / "scores" / role, pool, rng.uniform(1, 4, len(pool)), name=role
        )
        for role in ("teacher", "reference")
    }
    selecting = select.Config(data_path=pool.prefix, output_prefix=tmp_path / "best", **folders)
    select.run(selecting)
    return splitting, selecting


def materialize(corpus: Corpus, prefix: Path, *, overwrite: bool = False) -> None:
    rows = np.arange(0, len(corpus), 2)
    options = {"config": {}, "selection": {}, "materialize": True}
    write_subset(corpus, rows, prefix, overwrite=overwrite, **options)


def materialize_forever(corpus: Corpus, prefix: Path) -> None:
    while True:
        materialize(corpus, prefix, overwrite=True)


def manifests(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def test_a_killed_stage_leaves_nothing_that_opens_and_nothing_in_the_way(tmp_path, stages, capfd):
    rng = np.random.default_rng(1)
    context = multiprocessing.get_context("fork")  # starts in milliseconds; no torch in the child
    expected = {
        path.stem: Corpus.open(path.with_suffix("")).fingerprint for path in manifests(tmp_path)
    }
    files = visible(tmp_path)
    start = time.perf_counter()
    for stage, config in zip((split, select), stages, strict=True):
        stage.run(dataclasses.replace(config, overwrite=True))
    took = time.perf_counter() - start  # of one round: kills fall all over it on any machine
    incomplete = 0
    for _ in range(ROUNDS):
        process = context.Process(target=work_forever, args=stages, daemon=True)
        process.start()
        time.sleep(0.002 + took * rng.uniform(0, 1.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        incomplete += visible(tmp_path) != files
        for manifest in manifests(tmp_path):
            # Killed while --overwrite replaced the pool, the selection has no parent just now.
            if manifest.stem != "best" or (tmp_path / "pool.json").exists():
                assert verify(manifest.with_suffix("")) == []
        # The same commands, with no flag added, complete what is missing.
        split.run(stages[0])
        select.run(stages[1])
        found = {
            path.stem: Corpus.open(path.with_suffix("")).fingerprint for path in manifests(tmp_path)
        }
        assert found == expected
    for name in ("ref", "pool", "best"):
        for path in tmp_path.glob(f"{name}[.-]*"):
            path.unlink()
    split.run(stages[0])
    select.run(stages[1])
    assert visible(tmp_path) == files
    assert incomplete >= ROUNDS // 8, "the kills hit no moment that matters: change the delays"


def test_a_killed_copy_of_tokens_is_whole_or_absent_and_completed_by_the_same_call(
    tmp_path, tiny_tokenizer
):
    instances = random_instances(3000)
    corpus = write_corpus(tmp_path / "pile", tiny_tokenizer, instances, per_shard=500)
    prefix = tmp_path / "copy"
    materialize(corpus, prefix)
    expected, files = Corpus.open(prefix).fingerprint, visible(tmp_path)
    rng = np.random.default_rng(3)
    incomplete = 0
    for _ in range(ROUNDS):
        process = multiprocessing.get_context("fork").Process(
            target=materialize_forever, args=(corpus, prefix), daemon=True
        )
        process.start()
        time.sleep(rng.uniform(0.002, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        incomplete += visible(tmp_path) != files
        if prefix.with_name("copy.json").exists():
            assert verify(prefix) == []
        else:
            with pytest.raises(DataError):
                Corpus.open(prefix)
        materialize(corpus, prefix)
        assert verify(prefix) == []
        assert Corpus.open(prefix).fingerprint == expected
        for path in tmp_path.glob(".copy.*"):
            pytest.fail(f"{path} is left over")
    assert incomplete >= ROUNDS // 8, "the kills hit no moment that matters: change the delays"
