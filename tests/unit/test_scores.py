"""Scores: filled by any number of processes, resumable, never half there, never NaN."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.core.manifest import Parent
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.scores import Scores, ScoreWriter
from megatron_miniplm.data.tokenizers import load_tokenizer
from megatron_miniplm.data.writer import CorpusWriter
from tests.small_artifacts import flip_byte, random_instances, visible, write_corpus

COUNT = 3 * ScoreWriter.window + 100


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tiny_tokenizer) -> Corpus:
    """Four windows of instances of 3 tokens."""
    prefix = tmp_path_factory.mktemp("scored") / "pool"
    with CorpusWriter(
        prefix, tokenizer=load_tokenizer(tiny_tokenizer), seq_length=8, config={}
    ) as writer:
        writer.add(np.arange(3 * COUNT) % 512, np.full(COUNT, 3), 0)
        writer.finish(["prose"], {})
    return Corpus.open(prefix)


def start(path: Path, corpus: Corpus, **kwargs) -> ScoreWriter:
    settings = {"config": {"checkpoint": "abc"}, "model": {"parameters": 5}} | kwargs
    return ScoreWriter(path, corpus=corpus, **settings)


def fill(writer: ScoreWriter, windows) -> None:
    """Each row's sum is a function of its row, so any window can be checked later."""
    for number in windows:
        rows = np.array(writer.rows(number))
        writer.write_window(number, expected(rows), np.full(len(rows), 2, np.int32))


def expected(rows: np.ndarray) -> np.ndarray:
    return (0.5 + rows / 7).astype(np.float32)


def test_scores_come_back_row_by_row(tmp_path, corpus):
    writer = start(tmp_path / "s", corpus, parents={"model": Parent(fingerprint="f", path="m")})
    fill(writer, writer.todo())
    assert writer.finish()
    scores = Scores.open(tmp_path / "s")
    assert scores.sum_nll.dtype == np.float32
    assert scores.num_tokens.dtype == np.int32
    assert np.array_equal(scores.sum_nll, expected(np.arange(COUNT)))
    assert np.array_equal(scores.mean_nll(), scores.sum_nll.astype(np.float64) / 2)
    assert scores.corpus_fingerprint == corpus.fingerprint
    assert scores.manifest.content["model"] == {"parameters": 5}
    assert scores.manifest.content["num_tokens"] == 2 * COUNT
    assert set(scores.manifest.parents) == {"corpus", "model"}
    assert visible(tmp_path / "s") == {"sum_nll.npy", "num_tokens.npy", "manifest.json"}


def test_an_instance_without_scored_tokens_has_mean_zero(tmp_path, corpus):
    writer = start(tmp_path / "s", corpus)
    for number in writer.todo():
        size = len(writer.rows(number))
        writer.write_window(number, np.zeros(size, np.float32), np.zeros(size, np.int32))
    writer.finish()
    assert not Scores.open(tmp_path / "s").mean_nll().any()


def test_the_files_do_not_depend_on_who_wrote_which_window_when(tmp_path, corpus):
    one = start(tmp_path / "one", corpus)
    fill(one, [0, 1, 2, 3])
    one.finish()
    for number in (2, 0, 3, 1):  # four jobs, one after the other
        fill(start(tmp_path / "many", corpus), [number])
    assert start(tmp_path / "many", corpus).finish()
    for name in ("sum_nll.npy", "num_tokens.npy"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert Scores.open(tmp_path / "many").fingerprint == Scores.open(tmp_path / "one").fingerprint


@pytest.mark.parametrize("jobs", [1, 2, 3, 7])
def test_a_job_array_covers_every_window_once(tmp_path, corpus, jobs):
    writer = start(tmp_path / "s", corpus)
    dealt = [number for job in range(jobs) for number in writer.todo((job, jobs))]
    assert sorted(dealt) == list(range(4))


@pytest.mark.parametrize("shard", [(1, 1), (-1, 2), (0, 0)])
def test_a_job_outside_its_array_is_refused(tmp_path, corpus, shard):
    with pytest.raises(ConfigError, match=f"--shard {shard[0]}/{shard[1]}"):
        start(tmp_path / "s", corpus).todo(shard)


def test_a_resumed_job_only_does_what_is_missing(tmp_path, corpus):
    fill(start(tmp_path / "s", corpus), [1, 3])
    again = start(tmp_path / "s", corpus)
    assert again.todo() == [0, 2]
    assert again.todo((0, 2)) == [0, 2]
    assert again.todo((1, 2)) == []
    assert not again.finish()
    with pytest.raises(DataError, match="incomplete"):
        Scores.open(tmp_path / "s")


def test_a_finished_folder_is_left_as_it_is(tmp_path, corpus):
    writer = start(tmp_path / "s", corpus)
    fill(writer, writer.todo())
    writer.finish()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    again = start(tmp_path / "s", corpus)
    assert again.todo() == []
    assert again.finish()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()} == before
    with pytest.raises(LineageError, match="'abc' there and 'xyz' here"):
        start(tmp_path / "s", corpus, config={"checkpoint": "xyz"})
    (tmp_path / "s" / "run.json").write_text("{}")  # the stage leaves it beside the columns
    fresh = start(tmp_path / "s", corpus, config={"checkpoint": "xyz"}, overwrite=True)
    assert visible(tmp_path / "s") == {"journal"}
    assert fresh.todo() == [0, 1, 2, 3]


def test_a_folder_of_another_job_is_refused(tmp_path, corpus, tiny_tokenizer):
    fill(start(tmp_path / "s", corpus), [1])
    with pytest.raises(LineageError, match="checkpoint is 'abc' there and 'xyz' here"):
        start(tmp_path / "s", corpus, config={"checkpoint": "xyz"})
    other = write_corpus(tmp_path / "other", tiny_tokenizer, random_instances(5))
    with pytest.raises(LineageError, match=f"{corpus.fingerprint}.*{other.fingerprint}"):
        start(tmp_path / "s", other)


def test_a_folder_with_something_else_is_refused(tmp_path, corpus):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"something else than scores \(notes\.txt\)"):
            start(tmp_path, corpus, overwrite=overwrite)
    assert visible(tmp_path) == {"notes.txt"}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0])
def test_a_window_with_a_broken_number_is_refused(tmp_path, corpus, bad):
    writer = start(tmp_path / "s", corpus)
    sums = expected(np.array(writer.rows(1)))
    sums[17] = bad
    with pytest.raises(DataError, match=r"window 1 from row 4096: row 17 has sum_nll"):
        writer.write_window(1, sums, np.full(len(sums), 2, np.int32))
    assert writer.todo() == [0, 1, 2, 3]


def test_a_window_of_another_size_or_with_too_many_tokens_is_refused(tmp_path, corpus):
    writer = start(tmp_path / "s", corpus)
    with pytest.raises(DataError, match=r"window 3 has 100 rows, but got \[4096\]"):
        writer.write_window(3, np.ones(4096, np.float32), np.ones(4096, np.int32))
    with pytest.raises(DataError, match="counts 3 tokens, it predicts 2"):
        writer.write_window(3, np.ones(100, np.float32), np.full(100, 3, np.int32))


def test_a_corrupt_window_is_done_again(tmp_path, corpus):
    writer = start(tmp_path / "s", corpus)
    fill(writer, writer.todo())
    flip_byte(tmp_path / "s" / "journal" / "00000002.window", 100)
    with pytest.raises(DataError, match=r"00000002\.window is corrupt"):
        writer.finish()
    again = start(tmp_path / "s", corpus)
    assert again.todo() == [2]
    fill(again, [2])
    assert again.finish()
    assert np.array_equal(Scores.open(tmp_path / "s").sum_nll, expected(np.arange(COUNT)))


@pytest.mark.parametrize("name", ["sum_nll.npy", "num_tokens.npy"])
def test_a_flipped_byte_in_finished_scores_is_refused(tmp_path, corpus, name):
    writer = start(tmp_path / "s", corpus)
    fill(writer, writer.todo())
    writer.finish()
    flip_byte(tmp_path / "s" / name, -1)
    with pytest.raises(DataError, match="changed since they were written"):
        Scores.open(tmp_path / "s")


def _one_job(path: Path, prefix: Path, shard: tuple[int, int], kill_after: int | None) -> None:
    """A job of an array; with `kill_after`, it dies hard after that many windows."""
    writer = start(path, Corpus.open(prefix))
    for done, number in enumerate(writer.todo(shard)):
        if done == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        fill(writer, [number])
    writer.finish()


def test_processes_fill_one_folder_and_a_killed_one_is_made_up_for(tmp_path, corpus):
    # A forked process starts in milliseconds; it only touches numpy and files.
    context = multiprocessing.get_context("fork")

    def run(*jobs) -> list[int]:
        processes = [
            context.Process(
                target=_one_job, args=(tmp_path / "s", corpus.prefix, *job), daemon=True
            )
            for job in jobs
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]

    assert run(((0, 2), 1), ((1, 2), None)) == [-signal.SIGKILL, 0]
    assert start(tmp_path / "s", corpus).todo() == [2]
    # All at once, and all of them see the last window come in.
    assert run(*[((job, 4), None) for job in range(4)]) == [0, 0, 0, 0]
    assert np.array_equal(Scores.open(tmp_path / "s").sum_nll, expected(np.arange(COUNT)))
    assert visible(tmp_path / "s") == {"sum_nll.npy", "num_tokens.npy", "manifest.json"}
