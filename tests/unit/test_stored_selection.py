"""`select --selector stored`: the instances that a logit store has a record of, and no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.record_store import Record, RecordStore
from megatron_miniplm.data.record_writer import RecordWriter
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.data.verify import verify
from megatron_miniplm.selection import stored
from tests.small_artifacts import random_instances, write_corpus

RECORD = Record(payload=b"said", num_positions=1, num_values=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Corpus:
    folder = tmp_path_factory.mktemp("of_updates")
    return write_corpus(folder / "all", tiny_tokenizer, random_instances(100))


@pytest.fixture(scope="module")
def seen(corpus: Corpus) -> Path:
    """Instance i was seen at update i + 1, but for the odd ones; 10 and 12 once more, at 50."""
    path = corpus.prefix.with_name("seen")
    writer = RecordWriter(path, corpus=corpus, config={"teacher": "t"}, facts={"vocab_size": 512})
    ids = np.array([*range(0, 100, 2), 12, 10])
    updates = np.array([*range(1, 101, 2), 50, 50])
    writer.add_shard("r0", ids, [RECORD] * len(ids), step=100, updates=updates)
    assert writer.finish_seen()
    return path


def select(data: Path, store: Path, prefix: Path, *more: str) -> int:
    words = ["select", "--data-path", str(data), "--selector", "stored", "--logits-path"]
    return main([*words, str(store), "--output-prefix", str(prefix), *more])


def test_it_is_all_that_the_store_holds_and_names_it_as_a_parent(corpus, seen, tmp_path) -> None:
    assert select(corpus.prefix, seen, tmp_path / "part") == 0
    part = Corpus.open(tmp_path / "part")
    assert part.ids.tolist() == list(range(0, 100, 2))
    assert part.manifest.parents["logits"].fingerprint == RecordStore.open(seen).fingerprint
    assert part.root_fingerprint == corpus.root_fingerprint
    assert verify(tmp_path / "part") == []


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--first-update", "91"], [90, 92, 94, 96, 98]),
        (["--last-update", "13"], [0, 2, 4, 6, 8]),  # 10 and 12 were seen again
        (["--first-update", "47", "--last-update", "51"], [10, 12, 46, 48, 50]),
        (["--first-update", "50", "--last-update", "50"], [10, 12]),
    ],
)
def test_of_some_updates_it_is_what_was_seen_last_in_these(
    more, expected, corpus, seen, tmp_path
) -> None:
    assert select(corpus.prefix, seen, tmp_path / "part", *more) == 0
    assert Corpus.open(tmp_path / "part").ids.tolist() == expected


@pytest.mark.parametrize("block", [8, 1 << 20])
def test_of_a_subset_it_is_what_both_have(block, corpus, seen, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stored, "_BLOCK_ROWS", block)
    write_subset(corpus, np.arange(1, 100, 5), tmp_path / "fifths", config={}, selection={})
    assert select(tmp_path / "fifths", seen, tmp_path / "part") == 0
    assert Corpus.open(tmp_path / "part").ids.tolist() == list(range(6, 100, 10))


def test_what_makes_no_sense_is_refused(corpus, seen, tiny_tokenizer, tmp_path, capfd) -> None:
    def refused(why: str, data: Path, store: Path, *more: str) -> None:
        assert select(data, store, tmp_path / "part", *more) == 2
        assert why in capfd.readouterr().err
        assert not (tmp_path / "part.json").exists()

    refused("--selection-ratio 0.5 has no effect", corpus.prefix, seen, "--selection-ratio", "0.5")
    refused("101 to 99: it has updates 1 to 99", corpus.prefix, seen, "--first-update", "101")
    refused("updates 2 to 2: it has", corpus.prefix, seen, "--first-update=2", "--last-update=2")
    refused("must not be before", corpus.prefix, seen, "--first-update=51", "--last-update=47")
    refused("--first-update 0 and", corpus.prefix, seen, "--first-update", "0")
    refused("--last-update -3:", corpus.prefix, seen, "--last-update", "-3")
    other = write_corpus(tmp_path / "other", tiny_tokenizer, random_instances(9, seed=5))
    refused("is of root corpus", other.prefix, seen)
    plain = RecordWriter(tmp_path / "plain", corpus=other, config={}, facts={"vocab_size": 512})
    plain.write_window(0, [RECORD] * 9)
    assert plain.finish()
    refused("does not say at which", other.prefix, tmp_path / "plain", "--last-update", "3")
    words = ["select", "--data-path", str(corpus.prefix), "--output-prefix", str(tmp_path / "part")]
    assert main([*words, "--first-update", "3"]) == 2
    assert "--first-update 3 has no effect on --selector difference" in capfd.readouterr().err
    assert main([*words, "--selector", "stored"]) == 2
    assert "--selector stored needs --logits-path" in capfd.readouterr().err
    assert main([*words, "--selector", "stord", "--logits-path", str(seen)]) == 2
    assert "unknown selector 'stord'; known: difference, proxy, random, reference, stored" in (
        capfd.readouterr().err
    )
