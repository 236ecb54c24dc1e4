"""What every registered teacher must do, each on one small case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_miniplm import teachers
from megatron_miniplm.core.registry import Registry
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.teachers.teacher import TEACHERS
from tests.pool import RankPool

Registry.discover(teachers)

# Name -> its settings, given a trained model.
CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "online": lambda model: {"teacher_load": str(model)},
}


def test_every_registered_teacher_has_a_case() -> None:
    assert set(CASES) == set(TEACHERS.names())


@pytest.mark.parametrize("name", CASES)
def test_signals_belong_to_their_micro_batches_and_carry_no_gradient(
    name: str, model: Path, big_corpus: Path, pool: RankPool
) -> None:
    (said,) = pool.run(
        "tests.parallel.jobs:teacher_signals", 1,
        name=name, settings=CASES[name](model), corpus=str(big_corpus),
    )  # fmt: skip
    assert said["parent"] == open_weights(model).fingerprint
    assert len(said["together"]) == len(said["alone"]) == len(said["labels"]) == 3
    for together, alone in zip(said["together"], said["alone"], strict=True):
        assert torch.equal(together, alone)
        assert not together.requires_grad
    assert not torch.equal(said["together"][0], said["together"][1])
