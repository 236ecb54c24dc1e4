"""Killed at any moment and started again, the writer of a record store makes the same files."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.record_store import Record, RecordStore
from megatron_miniplm.data.record_writer import RecordWriter
from tests.small_artifacts import random_instances, write_corpus

ROUNDS = 8


def fill(path: Path, prefix: Path) -> None:
    corpus = Corpus.open(prefix)
    writer = RecordWriter(path, corpus=corpus, config={}, facts={})
    for number in writer.todo():
        payloads = (np.random.default_rng(row).bytes(2000) for row in writer.rows(number))
        writer.write_window(
            number,
            [Record(payload=each, num_positions=1, num_values=9, sums={}) for each in payloads],
        )
    writer.finish()


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_is_made_up_for(tmp_path, tiny_tokenizer):
    prefix = tmp_path / "pool"
    write_corpus(prefix, tiny_tokenizer, random_instances(300))
    context = multiprocessing.get_context("fork")
    started = time.monotonic()
    fill(tmp_path / "whole", prefix)
    seconds = time.monotonic() - started
    rng, killed = np.random.default_rng(0), 0
    for number in range(ROUNDS):
        path = tmp_path / f"s{number}"
        while not (path / "manifest.json").exists():
            process = context.Process(target=fill, args=(path, prefix), daemon=True)
            process.start()
            process.join(rng.uniform(0, 1.2 * seconds))
            if process.exitcode is None:
                process.kill()
                process.join()
                killed += 1
            assert process.exitcode in (0, -9)
        fill(path, prefix)  # a kill between the manifest and the end of the journal
        assert contents(path) == contents(tmp_path / "whole")
        assert not (path / "journal").exists()
        assert len(RecordStore.open(path).read(np.arange(300))) == 300
    assert killed >= ROUNDS // 2, "the kills hit no moment that matters: change the delays"
