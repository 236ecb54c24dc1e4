"""Batches are read ahead, in order, and what goes wrong with a file ends the run by name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.training.batch_size import BatchConfig
from megatron_miniplm.training.loader import Loader
from tests.small_artifacts import random_instances, write_corpus

CONFIG = BatchConfig(micro_batch_size=2, global_batch_size=16, rampup_batch_size=(8, 4, 40))


@pytest.fixture
def small(tmp_path: Path, tiny_tokenizer: Path) -> Corpus:
    return write_corpus(tmp_path / "small", tiny_tokenizer, random_instances(300))


def loader(data: Blend, *, workers: int, rank: int = 0, ranks: int = 1) -> Loader:
    config = replace(CONFIG, num_workers=workers)
    return Loader(data=data, config=config, topology=SimpleNamespace(dp_rank=rank, dp_size=ranks))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_updates_come_in_order_whoever_reads_them(small: Corpus, workers: int) -> None:
    data = Blend.open([str(small.prefix)], seed=3)
    found = list(loader(data, workers=workers).updates(0, 9))
    assert [update.global_batch_size for update in found] == [8, 8, 8, 12, 12, 16, 16, 16, 16]
    rows = [batch.rows_b for update in found for batch in update.batches]
    assert np.concatenate(rows).tolist() == data.order.rows(0, 112).tolist()
    assert all(len(batch.rows_b) == 2 for update in found for batch in update.batches)
    later = list(loader(data, workers=workers).updates(24, 2))
    assert np.array_equal(later[1].batches[5].tokens_bs, found[4].batches[5].tokens_bs)


def test_ranks_share_every_update(small: Corpus) -> None:
    data = Blend.open([str(small.prefix)], seed=3)
    shares = [list(loader(data, workers=1, rank=r, ranks=2).updates(24, 3)) for r in range(2)]
    for at, update in enumerate(loader(data, workers=0).updates(24, 3)):
        both = [shares[n % 2][at].batches[n // 2].rows_b for n in range(len(update.batches))]
        alone = [batch.rows_b for batch in update.batches]
        assert np.array_equal(np.concatenate(both), np.concatenate(alone))


def test_readers_are_gone_when_the_loop_stops_early(small: Corpus) -> None:
    before = threading.active_count()
    updates = loader(Blend.open([str(small.prefix)], seed=3), workers=3).updates(0, 1000)
    next(updates)
    assert threading.active_count() > before
    updates.close()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(5)
    assert threading.active_count() == before


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("harm", [truncate, rewrite])
def test_a_file_that_changes_while_it_is_read_is_an_error_that_names_it(
    harm: Callable[[Path], None], small: Corpus
) -> None:
    # Of a mapped file, the first would end the process (SIGBUS) and the second train on anything.
    path = Path(f"{small.shards[0]}.bin")
    updates = loader(Blend.open([str(small.prefix)], seed=3), workers=2).updates(0, 20)
    next(updates)
    harm(path)
    with pytest.raises(DataError, match=rf"row \d+ of {small.prefix}: {path} changed while it"):
        list(updates)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_gone_is_an_error_that_names_it_and_the_row(
    workers: int, small: Corpus
) -> None:
    path = Path(f"{small.shards[0]}.bin")
    data = Blend.open([str(small.prefix)], seed=3)
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: No such file or directory; restore it") as caught:
        list(loader(data, workers=workers).updates(0, 20))
    assert f"row {data.order.rows(0, 1)[0]} of {small.prefix}" in str(caught.value)


def test_ids_outside_the_vocabulary_are_an_error(small: Corpus) -> None:
    path = Path(f"{small.shards[0]}.bin")
    stat = path.stat()
    path.write_bytes(b"\xff\xff" * (stat.st_size // 2))
    corpus = Corpus.open(small.prefix)  # sizes are as they were; `inspect --verify` hashes
    with pytest.raises(DataError, match=r"row 5 of .* token ids from 65535 to 65535, but"):
        corpus.tokens(5)
