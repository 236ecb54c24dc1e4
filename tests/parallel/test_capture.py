"""Logits of a model in training: what its loss saw, in any layout, and complete after any kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.logit_codec import decode
from megatron_miniplm.data.record_store import RecordStore
from tests.pool import PROJECT, RankPool, kill_group
from tests.runs import PP2, TINY, TP2, losses, pretrain_flags, some_slow

LAYOUTS = {"DP2": (2, ""), "TP2": (2, TP2), "TP2 x PP2": (4, f"{TP2} {PP2}")}
BATCH = 8
SEED = 10


def flags(corpus: Path, folder: Path, *more: str) -> list[str]:
    """20 updates of 8 instances, a checkpoint every 4, numbers stored as they are."""
    return [
        *pretrain_flags(corpus, folder / "run", *TINY, "--save-interval", "4"),
        "--cache-logits", str(folder / "store"), "--top-k", "20", "--value-bits", "32", *more,
    ]  # fmt: skip


def payloads(store: Path) -> dict[int, bytes]:
    opened = RecordStore.open(store)
    return {
        int(i): bytes(data) for i, data in zip(opened.ids, opened.read(opened.ids), strict=True)
    }


@pytest.fixture(scope="module")
def captured(pool: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured")
    pool.run(flags(corpus, folder), 1)
    return folder


def test_what_is_stored_is_what_the_loss_of_every_update_saw(captured: Path, corpus: Path) -> None:
    data = Blend.open((str(corpus),), seed=SEED)
    stored = payloads(captured / "store")
    assert len(stored) == 20 * BATCH
    for update, loss in enumerate(losses(captured / "run")):
        rows = data.order.rows(update * BATCH, BATCH)
        nll = [-decode(stored[row]).gold_log_prob.mean(dtype=np.float64) for row in rows.tolist()]
        assert abs(np.mean(nll) - loss) < 1e-5  # fp32, and the log's digits
    content = RecordStore.open(captured / "store").manifest.content
    assert content["teacher_iteration"] == 20
    steps = sorted({name[7:20] for name in content["files"] if name.startswith("shards/")})
    assert steps == [f"step-{step:08d}" for step in (4, 8, 12, 16, 20)]


def test_looking_does_not_change_the_training(
    captured: Path, pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    pool.run(pretrain_flags(corpus, tmp_path / "run", *TINY), 1)
    assert losses(tmp_path / "run") == losses(captured / "run")


@pytest.mark.parametrize("name", some_slow(LAYOUTS, ["TP2 x PP2"]))
def test_layouts_store_the_same(
    name: str, captured: Path, pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    world, more = LAYOUTS[name]
    pool.run(flags(corpus, tmp_path, *more.split()), world)
    expected, found = payloads(captured / "store"), payloads(tmp_path / "store")
    assert found.keys() == expected.keys()
    moved = total = 0
    for row, data in found.items():
        ours, theirs = decode(data), decode(expected[row])
        np.testing.assert_allclose(ours.gold_log_prob, theirs.gold_log_prob, atol=2e-4)
        moved += np.setxor1d(ours.ids, theirs.ids).size
        total += len(ours)
    # Rounding, which 20 updates carry on, decides where two tokens are as likely.
    assert moved <= 2e-3 * total


def test_a_killed_and_resumed_run_has_a_complete_store(
    captured: Path, pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    words = flags(corpus, tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_miniplm", *words],
        env=environment, cwd=PROJECT, start_new_session=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 6:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline, "it did not get far enough in time"
        time.sleep(0.005)
    kill_group(process)
    assert not (tmp_path / "store/manifest.json").exists(), "it was killed too late"
    # As if it had been killed between the shards of the next checkpoint and the checkpoint.
    shard = next((tmp_path / "store/shards").glob("step-00000004-*"))
    beyond = shard.with_name(shard.name.replace("00000004", "00000019"))
    note = next((tmp_path / "store/journal").glob("step-00000004-*"))
    beyond.write_bytes(shard.read_bytes())
    note.with_name(note.name.replace("00000004", "00000019")).write_bytes(note.read_bytes())
    pool.run(words, 1)
    for name in ("index.npy", *RecordStore.open(captured / "store").manifest.content["files"]):
        found, expected = (folder / "store" / name for folder in (tmp_path, captured))
        assert found.read_bytes() == expected.read_bytes(), name


def test_flags_of_a_store_are_refused_without_one(corpus: Path, tmp_path: Path, capfd) -> None:
    words = [*pretrain_flags(corpus, tmp_path / "run", *TINY), "--top-k", "20"]
    assert main(words) == 2
    assert "--top-k 20 has no effect without --cache-logits" in capfd.readouterr().err
