"""What models write, learn and say on a device is what they do on a CPU, in fp32.

The same jobs and commands twice: here, and in a rank of the pool, which sees no device.
"""

# ruff: noqa: F811 - fixtures of other modules are imported by their names

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_miniplm.__main__ import main
from tests.parallel import test_capture, test_generation, test_minillm, test_regression
from tests.parallel.generation_jobs import continued
from tests.parallel.test_generation import GREEDY, SAMPLE, qwen  # noqa: F401
from tests.parallel.test_minillm import models  # noqa: F401
from tests.parallel.test_regression import data  # noqa: F401
from tests.pool import RankPool
from tests.runs import curve

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

TOLERANCE = 1e-4  # fp32 sums in another order; one draw that falls otherwise shows as 1e-2


def assert_the_same_run(found: Path, expected: Path) -> None:
    """Every loss of every update, and what its gradient was."""
    ours, theirs = curve(found), curve(expected)
    assert len(ours) == len(theirs) > 1
    names = [name for name in theirs[1] if name.endswith(("loss", "kl", "reward", "error"))]
    assert names
    for a, b in zip(ours, theirs, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], abs=TOLERANCE), name
        assert a["grad norm"] == pytest.approx(b["grad norm"], rel=1e-3)


@pytest.mark.parametrize("sampling", [SAMPLE, GREEDY], ids=["sample", "greedy"])
def test_the_same_tokens_are_drawn(sampling, qwen, pool: RankPool) -> None:
    asked = test_generation.asked(sampling=sampling, folders=[str(qwen)])
    ((expected, _),) = pool.run(test_generation.JOB, 1, **asked)
    assert continued(**asked)[0] == expected


def test_minillm_learns_the_same(models, corpus: Path, pool: RankPool, tmp_path: Path) -> None:
    here, there = (
        test_minillm.flags(corpus, tmp_path / name, models) for name in ("here", "there")
    )
    pool.run(there, 1)
    assert main(here) == 0
    assert_the_same_run(tmp_path / "here", tmp_path / "there")


def test_a_proxy_learns_the_same(data, pool: RankPool, tmp_path: Path) -> None:
    here, there = (
        test_regression.flags(data, tmp_path / name, "--lr-warmup-iters", "1", iterations=3)
        for name in ("here", "there")
    )
    pool.run(there, 1)
    assert main(here) == 0
    assert_the_same_run(tmp_path / "here", tmp_path / "there")


def test_a_store_that_is_filled_while_a_model_is_trained_says_the_same(
    corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    here, there = (test_capture.flags(corpus, tmp_path / name) for name in ("here", "there"))
    pool.run(there, 1)
    assert main(here) == 0
    test_capture.assert_say_the_same(tmp_path / "here/store", tmp_path / "there/store")
