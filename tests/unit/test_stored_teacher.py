"""A stored teacher says the same of an instance in whatever batch; stores that are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import PADDING_ROW, make_batch
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.head import Head
from megatron_miniplm.objectives.kd import Distillation, KdConfig
from megatron_miniplm.objectives.objective import LossConfig
from megatron_miniplm.parallel.vocab import VocabShard
from megatron_miniplm.teachers.stored import StoredConfig, StoredTeacher
from megatron_miniplm.teachers.teacher import Lesson
from megatron_miniplm.training.batch_size import BatchConfig
from megatron_miniplm.training.loader import Loader
from tests.small_artifacts import (
    SEQ_LENGTH,
    flip_byte,
    random_instances,
    write_corpus,
    write_logits,
)

V = 512


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> dict[str, Corpus]:
    root = tmp_path_factory.mktemp("corpora")
    return {
        name: write_corpus(root / name, tiny_tokenizer, random_instances(40, seed=seed))
        for seed, name in enumerate(("one", "two"))
    }


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, corpora) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stores")
    return {
        name: write_logits(root / name, corpus, seed=1000 * at, kept=3 + 2 * at)
        for at, (name, corpus) in enumerate(corpora.items())
    }


def choose(parent: Corpus, rows: np.ndarray, prefix: Path) -> None:
    write_subset(parent, rows, prefix, config={}, selection={"why": "test"})


def lesson(*words: str) -> Lesson:
    data = Blend.open(words, seed=3)
    return Lesson(
        data=data, layout=SimpleNamespace(), dtype=torch.float32, student=ModelConfig(vocab_size=V)
    )


def teacher(data: Sequence[str], *stores: Path) -> StoredTeacher:
    return StoredTeacher(StoredConfig(logits_path=tuple(map(str, stores))), lesson(*data))


def losses(teacher: StoredTeacher, rows: np.ndarray, size: int) -> dict[int, tuple[float, ...]]:
    """Row -> (loss, kd loss) of a student that is a function of the tokens alone."""
    torch.manual_seed(0)
    table, weight = torch.randn(V, 8), torch.randn(V, 8)
    objective = Distillation(LossConfig(), KdConfig(kd_temperature=2.0)).taught_by(teacher.facts)
    found = {}
    for start in range(0, len(rows), size):
        batch = make_batch(teacher.data, rows[start : start + size], length=SEQ_LENGTH)
        (ask,) = teacher([batch], [teacher.read_ahead(batch)])
        signal = ask()
        shard = VocabShard(first=0, size=V, valid=V, group=None)
        head = Head(
            hidden_sbh=table[batch.tokens_bs].transpose(0, 1), weight_vh=weight, shard=shard
        )
        for at, row in enumerate(batch.rows_b.tolist()):
            # One row of the batch counts at a time; what surrounds it must not matter.
            mask = torch.zeros_like(batch.mask_bs)
            mask[at] = batch.mask_bs[at]
            alone = type(batch)(batch.tokens_bs, batch.labels_bs, mask, batch.rows_b)
            output = objective(head, alone, signal)
            kd_sum, _ = output.metrics["kd loss"]
            found[row] = (float(output.loss_sum), float(kd_sum))
    return found


def test_losses_of_an_instance_do_not_depend_on_its_batch(corpora, stores) -> None:
    data = [str(corpus.prefix) for corpus in corpora.values()]
    blend = teacher(data, stores["two"], stores["one"])  # in any order
    rows = np.arange(80)
    expected = losses(blend, rows, 1)
    shuffled = np.random.default_rng(0).permutation(rows)
    for found in (losses(blend, shuffled, 8), losses(blend, rows, 5)):
        assert found.keys() == expected.keys()
        for row, values in found.items():
            assert values == pytest.approx(expected[row], rel=1e-6)
    assert len({kd for _, kd in expected.values()}) == 80


def test_a_blend_reads_each_source_from_its_own_store(corpora, stores) -> None:
    both = teacher([str(c.prefix) for c in corpora.values()], *stores.values())
    one = teacher([str(corpora["one"].prefix)], stores["one"])
    batch = make_batch(both.data, [3, 45, PADDING_ROW], length=SEQ_LENGTH)
    signal = both.read_ahead(batch)
    entries = (signal.ids >= 0).sum(-1)
    assert entries[0][batch.mask_bs[0]].unique().tolist() == [3]
    assert entries[1][batch.mask_bs[1]].unique().tolist() == [5]
    assert not entries[~batch.mask_bs].any()
    alone = one.read_ahead(make_batch(one.data, [3], length=SEQ_LENGTH))
    assert torch.equal(signal.log_probs[0, :, :3], alone.log_probs[0])
    assert set(both.parents) == {"logits 1 of 2", "logits 2 of 2"}
    assert both.facts.temperatures == {2.0}
    assert both.facts.mean_logit_std == pytest.approx(2.0, rel=0.05)


def test_a_subset_learns_from_the_store_of_its_corpus(corpora, stores, tmp_path: Path) -> None:
    ids = np.array([7, 12, 30])
    choose(corpora["one"], ids, tmp_path / "some")
    some = teacher([str(tmp_path / "some")], stores["one"])
    whole = teacher([str(corpora["one"].prefix)], stores["one"])
    found = some.read_ahead(make_batch(some.data, [2], length=SEQ_LENGTH))
    expected = whole.read_ahead(make_batch(whole.data, [30], length=SEQ_LENGTH))
    assert torch.equal(found.log_probs, expected.log_probs)


def test_the_loader_reads_with_the_batch_and_only_where_there_is_a_loss(corpora, stores) -> None:
    one = teacher([str(corpora["one"].prefix)], stores["one"])
    for reads in (True, False):
        one.load(SimpleNamespace(is_last_stage=reads))
        loader = Loader(
            data=one.data, config=BatchConfig(micro_batch_size=2, global_batch_size=4),
            topology=SimpleNamespace(dp_rank=0, dp_size=1), read_ahead=one.read_ahead,
        )  # fmt: skip
        for update in loader.updates(0, 3):
            signals = [ask() for ask in one(update.batches, update.ahead)]
            assert [signal is not None for signal in signals] == [reads, reads]
            for batch, signal in zip(update.batches, signals, strict=True):
                if reads:
                    assert torch.equal((signal.ids >= 0).any(-1), batch.mask_bs)


class TestStoresThatAreRefused:
    """Before anything is trained, unless a byte changes later."""

    def test_none(self, corpora) -> None:
        with pytest.raises(ConfigError, match="--teacher stored needs --logits-path"):
            teacher([str(corpora["one"].prefix)])

    def test_of_another_corpus(self, corpora, stores) -> None:
        with pytest.raises(LineageError, match=r"no logits of .*two, whose root corpus is "):
            teacher([str(corpora["two"].prefix)], stores["one"])

    def test_one_too_many(self, corpora, stores) -> None:
        with pytest.raises(ConfigError, match="two is used by no corpus"):
            teacher([str(corpora["one"].prefix)], *stores.values())

    def test_another_vocabulary(self, corpora, tmp_path: Path) -> None:
        store = write_logits(tmp_path / "s", corpora["one"], vocab_size=600)
        with pytest.raises(LineageError, match=r"vocabulary size 600, but .* has 512"):
            teacher([str(corpora["one"].prefix)], store)

    def test_another_tokenizer(self, corpora, tmp_path: Path) -> None:
        store = write_logits(tmp_path / "s", corpora["one"], tokenizer_fingerprint="other")
        with pytest.raises(LineageError, match="has tokenizer other, but"):
            teacher([str(corpora["one"].prefix)], store)

    def test_an_instance_that_is_missing(self, corpora, tmp_path: Path) -> None:
        choose(corpora["one"], np.array([7, 12, 30]), tmp_path / "some")
        store = write_logits(tmp_path / "s", Corpus.open(tmp_path / "some"))
        with pytest.raises(LineageError, match=r"has not all instances .* has no instance 0\."):
            teacher([str(corpora["one"].prefix)], store)
        teacher([str(tmp_path / "some")], store)

    def test_a_byte_that_changed(self, corpora, tmp_path: Path) -> None:
        store = write_logits(tmp_path / "s", corpora["one"])
        teacher([str(corpora["one"].prefix)], store).verify()
        (shard,) = (store / "shards").iterdir()
        flip_byte(shard, 100)
        one = teacher([str(corpora["one"].prefix)], store)
        with pytest.raises(DataError, match="instance 0 is damaged"):
            one.verify()
