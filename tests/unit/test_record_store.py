"""The record store: bytes by instance id, filled by anybody, never half there, never wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.core.manifest import Parent
from megatron_miniplm.data import record_store, record_writer
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.record_store import Record, RecordStore
from megatron_miniplm.data.record_writer import RecordWriter
from megatron_miniplm.data.subset import write_subset
from tests.small_artifacts import flip_byte, random_instances, visible, write_corpus

COUNT = 200  # windows of 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tiny_tokenizer) -> Corpus:
    folder = tmp_path_factory.mktemp("stored")
    return write_corpus(folder / "pool", tiny_tokenizer, random_instances(COUNT))


def start(path: Path, corpus: Corpus, **kwargs) -> RecordWriter:
    settings = {"config": {"teacher": "abc"}, "facts": {"vocab_size": 512}} | kwargs
    return RecordWriter(path, corpus=corpus, **settings)


def record(instance_id: int, salt: int = 0) -> Record:
    """What is stored of an instance is a function of its id."""
    rng = np.random.default_rng((instance_id, salt))
    size = int(rng.integers(0, 300))
    return Record(
        payload=rng.bytes(size), num_positions=size % 7, num_values=size,
        sums={"entropy": size / 3},
    )  # fmt: skip


def fill(writer: RecordWriter, windows) -> None:
    ids = writer._corpus.ids
    for number in windows:
        writer.write_window(number, [record(int(ids[row])) for row in writer.rows(number)])


def made(path: Path, corpus: Corpus, **kwargs) -> Path:
    writer = start(path, corpus, **kwargs)
    fill(writer, writer.todo())
    assert writer.finish()
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_records_come_back_by_id_in_any_order(tmp_path, corpus):
    store = RecordStore.open(
        made(tmp_path / "s", corpus, parents={"model": Parent(fingerprint="f", path="m")})
    )
    asked = np.random.default_rng(0).integers(0, COUNT, 500)
    found = store.read(asked)
    assert [bytes(each) for each in found] == [record(int(i)).payload for i in asked]
    assert store.read([]) == []
    assert np.array_equal(store.ids, np.arange(COUNT))
    content, all_records = store.manifest.content, [record(i) for i in range(COUNT)]
    assert content["num_values"] == sum(each.num_values for each in all_records)
    positions = sum(each.num_positions for each in all_records)
    assert content["num_tokens"] == positions
    mean = sum(each.sums["entropy"] for each in all_records) / positions
    assert content["mean_entropy"] == pytest.approx(mean, rel=1e-15)
    assert content["vocab_size"] == 512
    assert set(store.manifest.parents) == {"corpus", "model"}
    assert content["num_bytes"] == sum(
        len(data) for name, data in contents(tmp_path / "s").items() if name != "manifest.json"
    )
    assert visible(tmp_path / "s") == {"shards", "index.npy", "manifest.json"}


def test_a_store_of_a_subset_is_asked_by_root_ids(tmp_path, corpus):
    rows = np.flatnonzero(np.arange(COUNT) % 3 == 1)
    write_subset(corpus, rows, tmp_path / "part", config={}, selection={})
    part = Corpus.open(tmp_path / "part")
    store = RecordStore.open(made(tmp_path / "s", part))
    assert np.array_equal(store.ids, rows)
    assert bytes(store.read([100])[0]) == record(100).payload
    with pytest.raises(DataError, match=r"instance 99 is not in .*, nor are 1 more of 3"):
        store.read([99, 100, 102])
    store.check_corpus(part)
    store.check_corpus(corpus)


def test_a_store_of_another_corpus_is_refused(tmp_path, corpus, tiny_tokenizer):
    store = RecordStore.open(made(tmp_path / "s", corpus))
    other = write_corpus(tmp_path / "other", tiny_tokenizer, random_instances(5, seed=1))
    with pytest.raises(LineageError, match=f"{corpus.fingerprint}.*{other.fingerprint}"):
        store.check_corpus(other)


def test_any_order_of_writers_gives_the_same_files(tmp_path, corpus):
    one = contents(made(tmp_path / "one", corpus))
    for number in (2, 0, 3, 1):  # four jobs, one after the other
        fill(start(tmp_path / "many", corpus), [number])
    assert start(tmp_path / "many", corpus).finish()
    assert contents(tmp_path / "many") == one


def _one_job(path: Path, prefix: Path, shard: tuple[int, int], kill_after: int | None) -> None:
    """A job of an array; with `kill_after`, it dies hard within the window after that many."""
    writer = start(path, Corpus.open(prefix))
    for done, number in enumerate(writer.todo(shard)):
        if done == kill_after:
            (path / "shards").mkdir(exist_ok=True)
            writer._journal.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        fill(writer, [number])
    writer.finish()


def test_killed_writers_and_many_at_once_give_the_same_files(tmp_path, corpus):
    one = contents(made(tmp_path / "one", corpus))
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

    # The first dies between its second shard and the note of it; the shard is made again.
    assert run(((0, 2), 1), ((1, 2), None)) == [-signal.SIGKILL, 0]
    assert (tmp_path / "s/shards/00000002.records").exists()
    assert start(tmp_path / "s", corpus).todo() == [2]
    with pytest.raises(DataError, match=r"incomplete: run the same command again"):
        RecordStore.open(tmp_path / "s")
    assert run(*[((job, 4), None) for job in range(4)]) == [0, 0, 0, 0]
    assert contents(tmp_path / "s") == one


def test_a_finished_store_is_left_as_it_is(tmp_path, corpus):
    made(tmp_path / "s", corpus)
    before = contents(tmp_path / "s")
    again = start(tmp_path / "s", corpus)
    assert again.todo() == []
    assert again.finish()
    assert contents(tmp_path / "s") == before
    with pytest.raises(LineageError, match="teacher is 'abc' there and 'xyz' here"):
        start(tmp_path / "s", corpus, config={"teacher": "xyz"})
    fresh = start(tmp_path / "s", corpus, config={"teacher": "xyz"}, overwrite=True)
    assert visible(tmp_path / "s") == {"journal"}
    assert fresh.todo() == [0, 1, 2, 3]


def test_a_second_writer_leaves_a_finished_store_as_it_is(tmp_path, corpus):
    second = start(tmp_path / "s", corpus)
    made(tmp_path / "s", corpus)
    before = contents(tmp_path / "s")
    second.write_window(1, [record(row, salt=1) for row in second.rows(1)])
    assert second.finish()
    assert contents(tmp_path / "s") == before
    assert visible(tmp_path / "s") == {"shards", "index.npy", "manifest.json"}


def test_a_window_that_is_being_written_is_waited_for_and_left_as_it_is(tmp_path, corpus):
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Record):
        def as_bytes(self, instance_id: int) -> bytes:
            begun.set()
            go_on.wait(10)
            return super().as_bytes(instance_id)

    first, second = (start(tmp_path / "s", corpus) for _ in range(2))
    fill(first, [0, 2, 3])
    slow = [Slow(**vars(record(row))) for row in first.rows(1)]
    others = [record(row, salt=1) for row in first.rows(1)]
    threads = [
        threading.Thread(target=first.write_window, args=(1, slow)),
        threading.Thread(target=second.write_window, args=(1, others)),
        threading.Thread(target=second._assemble_alone),
    ]
    threads[0].start()
    assert begun.wait(10)
    for thread in threads[1:]:
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
    (draft,) = [name for name in visible(tmp_path / "s/shards") if name[0] == "."]
    assert draft.endswith(f"-{os.getpid()}")
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert contents(tmp_path / "s") == contents(made(tmp_path / "one", corpus))


def test_a_store_without_instances_opens_and_holds_none(tmp_path, corpus):
    writer = start(tmp_path / "s", corpus)
    writer.add_shard("r0", np.empty(0, np.int64), [], step=1, updates=np.empty(0, np.int64))
    assert writer.finish_seen()
    store = RecordStore.open(tmp_path / "s")
    assert len(store) == 0
    assert store.read([]) == []
    with pytest.raises(DataError, match=r"instance 3 is not in .*it holds 0 instances"):
        store.read([3])


def test_a_manifest_that_was_changed_is_refused(tmp_path, corpus):
    path = made(tmp_path / "s", corpus) / "manifest.json"
    said = path.read_text()
    raw = json.loads(said)
    changes: list[dict] = [
        {"content": raw["content"] | {"mean_entropy": raw["content"]["mean_entropy"] + 0.1}},
        {"config": {"teacher": "abd"}},
        {"fingerprint": raw["fingerprint"][::-1]},
        {"parents": {}},
    ]
    changes += [
        {"content": {k: v for k, v in raw["content"].items() if k != name}}
        for name in ("files", "root_fingerprint", "num_instances", "checksum")
    ]
    for change in changes:
        path.write_text(json.dumps(raw | change))
        with pytest.raises(DataError, match=r"manifest\.json was changed since it was written"):
            RecordStore.open(tmp_path / "s")
    path.write_text(said)
    RecordStore.open(tmp_path / "s")


def test_a_corpus_of_any_size_has_few_enough_files_and_windows_of_a_million_tokens():
    size = record_writer._window_size
    assert [size(n, 1024) for n in (200, 1 << 20, 1 << 21, 10**9)] == [64, 64, 128, 1024]
    assert size(10**9, 1 << 15) == 32
    assert size(10, 1 << 21) == 1


def test_a_folder_with_something_else_is_refused(tmp_path, corpus):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"something else than logit store \(notes\.txt\)"):
        start(tmp_path, corpus)


def test_every_flipped_byte_of_a_shard_is_refused_with_the_id(tmp_path, corpus):
    path = made(tmp_path / "s", corpus) / "shards/00000001.records"
    store = RecordStore.open(tmp_path / "s")
    sizes = store._places[2][64:128]
    ends = np.cumsum(sizes)
    for at in np.random.default_rng(0).integers(0, ends[-1], 60):
        flip_byte(path, at)
        hit = 64 + int(np.searchsorted(ends, at, side="right"))
        # Opened again: what was opened refuses any file that was written to meanwhile.
        with pytest.raises(DataError, match=rf"instance {hit} is damaged in .*00000001\.records"):
            RecordStore.open(tmp_path / "s").read([hit])
        flip_byte(path, at)
    assert bytes(RecordStore.open(tmp_path / "s").read([70])[0]) == record(70).payload


def test_a_wrong_index_is_refused_where_it_is_used(tmp_path, corpus):
    path = made(tmp_path / "s", corpus) / "index.npy"
    good = np.load(path)
    for column, value in ((1, 99), (1, 3), (2, 1), (3, 10), (3, 1 << 40), (2, -5)):
        index = good.copy()
        index[column * COUNT + 70] = value
        np.save(path, index)
        with pytest.raises(DataError, match="instance 70"):
            RecordStore.open(tmp_path / "s").read([70])


@pytest.mark.parametrize("name", ["shards/00000002.records", "index.npy"])
def test_a_missing_or_truncated_file_is_refused_when_the_store_is_opened(tmp_path, corpus, name):
    path = made(tmp_path / "s", corpus) / name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=rf"{name} has \d+ bytes, but \d+ were written: restore"):
        RecordStore.open(tmp_path / "s")
    path.unlink()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        RecordStore.open(tmp_path / "s")


def test_a_file_that_vanishes_under_its_reader_is_an_error_with_the_id(tmp_path, corpus):
    store = RecordStore.open(made(tmp_path / "s", corpus))
    store.read([1])
    (tmp_path / "s/shards/00000002.records").unlink()
    os.truncate(tmp_path / "s/shards/00000000.records", 10)
    for instance_id in (130, 1):
        with pytest.raises(DataError, match=rf"instance {instance_id}: .*restore"):
            store.read([instance_id])


def test_a_shard_that_is_damaged_before_the_end_is_made_again(tmp_path, corpus):
    writer = start(tmp_path / "s", corpus)
    fill(writer, writer.todo())
    os.truncate(tmp_path / "s/shards/00000001.records", 10)
    with pytest.raises(DataError, match=r"00000001\.records has 10 bytes"):
        writer.finish()
    assert start(tmp_path / "s", corpus).todo() == [1]


def test_more_shards_than_open_files_are_read(tmp_path, corpus, monkeypatch):
    opened = lru_cache(maxsize=3)(record_store._opened.__wrapped__)
    monkeypatch.setattr(record_store, "_opened", opened)
    writer = start(tmp_path / "s", corpus)
    for at in range(12):
        writer.add_shard(f"{at:04d}", np.array([at]), [record(at)], step=1, updates=[1])
    assert writer.finish_seen()
    store = pickle.loads(pickle.dumps(RecordStore.open(tmp_path / "s")))
    before = len(os.listdir("/proc/self/fd"))
    for at in (*range(12), 0, 1):
        assert bytes(store.read([at])[0]) == record(at).payload
    assert len(os.listdir("/proc/self/fd")) - before <= 3


def test_what_a_run_saw_is_kept_once_the_latest_step_and_not_beyond_a_resume(tmp_path, corpus):
    writer = start(tmp_path / "s", corpus)

    def add(step: int, name: str, *ids: int) -> None:
        records = [record(each, salt=step) for each in ids]
        writer.add_shard(name, np.array(ids), records, step=step, updates=[step] * len(ids))

    add(100, "r0", 5, 3, 9)
    add(100, "r1", 4)
    add(300, "r0", 5, 3)  # beyond the checkpoint that the run resumes from
    writer.rewind(200)
    assert len(visible(tmp_path / "s/shards")) == 2
    add(200, "r0", 9, 1)
    writer = start(tmp_path / "s", corpus)
    assert not writer.finish()  # by windows, nothing is there
    assert writer.finish_seen()
    store = RecordStore.open(tmp_path / "s")
    assert store.ids.tolist() == [1, 3, 4, 5, 9]
    assert store.updates.tolist() == [200, 100, 100, 100, 200]
    expected = [record(i, salt=s).payload for i, s in ((1, 200), (3, 100), (9, 200))]
    assert [bytes(each) for each in store.read([1, 3, 9])] == expected
    assert store.manifest.content["num_superseded"] == 1
    live = [(1, 200), (3, 100), (4, 100), (5, 100), (9, 200)]
    assert store.manifest.content["num_values"] == sum(record(i, s).num_values for i, s in live)
    assert len(visible(tmp_path / "s/shards")) == 3
    assert "300" not in json.dumps(store.manifest.content["files"])


def test_of_an_instance_that_is_seen_again_the_latest_update_counts_whoever_saw_it(
    tmp_path, corpus
):
    writer = start(tmp_path / "s", corpus)
    # Between two saves, rank 0 sees 5 after rank 1 has.
    for name, ids, updates in (("r0", [5, 7], [3, 1]), ("r1", [5, 7], [2, 4])):
        records = [record(i, salt=update) for i, update in zip(ids, updates, strict=True)]
        writer.add_shard(name, np.array(ids), records, step=4, updates=np.array(updates))
    assert writer.finish_seen()
    found = RecordStore.open(tmp_path / "s").read([5, 7])
    assert [bytes(each) for each in found] == [record(5, 3).payload, record(7, 4).payload]


def test_instances_that_were_seen_without_a_record_are_counted(tmp_path, corpus):
    writer = start(tmp_path / "s", corpus)
    writer.add_shard("r0", np.array([], np.int64), [], step=1, updates=[], lost=[3, 4, 4])
    writer.add_shard("r0", np.array([3]), [record(3)], step=2, updates=[2], lost=[9])
    assert writer.finish_seen()
    store = RecordStore.open(tmp_path / "s")
    assert store.ids.tolist() == [3]
    assert store.manifest.content["num_lost"] == 2  # 4 and 9: the record of 3 came later
