"""What every registered teacher must do, each on one small case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_miniplm import teachers
from megatron_miniplm.core.registry import Registry
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.data.scores import Scores
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.teachers.teacher import TEACHERS
from tests.pool import RankPool
from tests.small_artifacts import write_logits, write_scores

Registry.discover(teachers)

# Name -> its settings, given a trained model or a store of the corpus.
CASES: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "online": lambda model, store: {"teacher_load": str(model)},
    "stored": lambda model, store: {"logits_path": (str(store),)},
    "scores": lambda model, store: {
        f"{role}_scores": str(store.with_name(role)) for role in ("teacher", "reference")
    },
}


def test_every_registered_teacher_has_a_case() -> None:
    assert set(CASES) == set(TEACHERS.names())


@pytest.fixture(scope="module")
def store(big_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random logits of every instance; beside them two models' scores."""
    corpus = Corpus.open(big_corpus)
    path = tmp_path_factory.mktemp("store")
    for role, nats in (("teacher", 1.0), ("reference", 2.0)):
        write_scores(path / role, corpus, nats * np.linspace(1, 2, len(corpus)), name=role)
    return write_logits(path / "logits", corpus)


@pytest.mark.parametrize("name", CASES)
def test_signals_belong_to_their_micro_batches_and_carry_no_gradient(
    name: str, model: Path, store: Path, big_corpus: Path, pool: RankPool
) -> None:
    (said,) = pool.run(
        "tests.parallel.jobs:teacher_signals", 1,
        name=name, settings=CASES[name](model, store), corpus=str(big_corpus),
    )  # fmt: skip
    assert said["parents"] in (
        [open_weights(model).fingerprint],
        [RecordStore.open(store).fingerprint],
        [Scores.open(store.with_name(role)).fingerprint for role in ("teacher", "reference")],
    )
    assert len(said["together"]) == len(said["alone"]) == len(said["labels"]) == 3
    for together, alone in zip(said["together"], said["alone"], strict=True):
        assert torch.equal(together, alone)
        assert not together.requires_grad
    assert not torch.equal(said["together"][0], said["together"][1])
