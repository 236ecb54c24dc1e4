"""Rows reach files, TensorBoard and W&B, and read as one run after any number of resumes."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.lines import read_objects
from megatron_miniplm.training.sinks import (
    SinkConfig,
    drop_rows_after,
    open_sinks,
    scalars,
)
from tests.runs import TINY, pretrain_flags

UPDATE = {
    "iteration": 3,
    "consumed_samples": 24,
    "iteration time (ms)": 5.0,
    "lm loss": 2.5,
    "timers (ms)": {"forward-backward": [1.0, 4.0]},
}
VALIDATION = {"iteration": 3, "consumed_samples": 24, "validation": {"lm loss (code)": 2.0}}


def test_names_are_megatrons_and_timers_those_of_the_slowest_rank() -> None:
    assert scalars(UPDATE) == {
        "consumed-samples": 24, "iteration-time": 5.0, "lm-loss": 2.5, "forward-backward-time": 4.0,
    }  # fmt: skip
    assert scalars(VALIDATION) == {"consumed-samples": 24, "lm-loss-(code)-validation": 2.0}


def test_rows_beyond_the_checkpoint_and_a_cut_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [{"iteration": 1}, {"iteration": 2}, {"iteration": 3, "validation": {}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in good) + '{"iteration": 4, "lm l')
    drop_rows_after(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == good[:2]


def test_tensorboard_holds_one_run_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = SinkConfig(tensorboard_dir=str(tmp_path / "events"))
    for start, values in ((0, {1: 4.0, 2: 3.0, 3: 9.0}), (2, {3: 2.0})):
        sinks = open_sinks(config, tmp_path, run={}, start_iteration=start)
        for iteration, loss in values.items():
            for sink in sinks:
                sink.write(UPDATE | {"iteration": iteration, "lm loss": loss})
        for sink in sinks:
            sink.close()
        time.sleep(1.1)  # files are read in the order of the seconds in their names
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("lm-loss")]
    assert found == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert [row["lm loss"] for row in read_objects(tmp_path / "metrics.jsonl")] == [4.0, 3.0, 2.0]


def test_wandb_works_offline_and_a_continued_run_keeps_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = SinkConfig(wandb_project="miniplm", wandb_exp_name="unit")
    identities = []
    for start in (0, 3):
        sinks = open_sinks(config, tmp_path, run={"lr": 6e-4}, start_iteration=start)
        for sink in sinks:
            sink.write(UPDATE | {"iteration": start + 1})
            sink.write(VALIDATION | {"iteration": start + 1})
            sink.close()
        identities.append((tmp_path / "wandb_run_id.txt").read_text())
    assert identities[0] == identities[1]
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2, "one local file a start"
    assert all(identities[0] in path.name for path in files)
    assert any(b"forward-backward-time" in path.read_bytes() for path in files)
    assert [exit_code(path) for path in files] == [0, 0]


def test_wandb_says_that_a_run_crashed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = ["--wandb-project", "miniplm", "--no-exit-signal-handler", "--exit-interval", "1"]
    run = pretrain_flags(corpus, tmp_path, *TINY, *words)
    assert main(run) == 0
    (tmp_path / "iter_0000002").touch()  # so that the next checkpoint cannot be saved
    assert main(run) == 2
    files = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert sorted(map(exit_code, files)) == [0, 1]


def exit_code(path: Path) -> int:
    """What a local file of W&B says at its end; its own process writes it, maybe a little later."""
    deadline = time.monotonic() + 60
    while not (found := exit_codes(path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    (code,) = found
    return code


def exit_codes(path: Path) -> list[int]:
    """All that a local file of W&B says of it: LevelDB's log format, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:  # a header is never divided over two blocks
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of a record, or the last part
            record, whole = Record.FromString(whole), b""
            found += [record.exit.exit_code] if record.HasField("exit") else []
    return found


def test_settings_of_a_sink_that_is_off_are_refused() -> None:
    with pytest.raises(ConfigError, match="--wandb-entity us has no effect without --wandb-proj"):
        SinkConfig(wandb_entity="us")
