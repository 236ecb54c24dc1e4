"""Saves: of the moment they are asked for, bounded, and without harm to the run if they fail."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.core.lines import LineFile
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import read_json
from megatron_miniplm.models.checkpoint import latest_checkpoint, verify_checkpoint
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.training.sinks import TensorBoard, drop_rows_after
from megatron_miniplm.training.zero_state import boxes, bytes_of_a_save
from tests.faults.test_full_disk import leave
from tests.faults.test_kill import start
from tests.pool import RankFailedError, RankPool
from tests.runs import TINY, losses, pretrain_flags

JOBS = "tests.faults.jobs"
ZERO = "--use-distributed-optimizer"


def test_what_is_saved_in_the_background_is_of_the_moment_of_the_save(
    pool: RankPool, tmp_path: Path
) -> None:
    pool.run(f"{JOBS}:change_while_saving", 2, save=str(tmp_path / "run"))


def test_ranks_that_see_different_checkpoints_agree_on_the_one_to_go_on_from(
    pool: RankPool, tmp_path: Path
) -> None:
    said = pool.run(f"{JOBS}:verify_in_different_views", 2, timeout=60, save=str(tmp_path))
    assert said[0] == said[1]
    assert "iter_0000001 is intact" in said[0]


def shards(save: Path) -> dict[str, str]:
    """Hash of every rank's file in every checkpoint."""
    return {
        f"{path.parent.name}/{name}": fact["hash"]
        for path in sorted(save.glob("iter_*/manifest.json"))
        for name, fact in read_json(path)["content"]["files"].items()
        if name.endswith(".distcp")
    }


def test_a_run_that_saves_in_the_background_saves_the_same_bytes(
    pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    flags = [*TINY, ZERO, "--save-interval", "2"]
    pool.run(pretrain_flags(corpus, tmp_path / "sync", *flags, iterations=9), 2)
    pool.run(pretrain_flags(corpus, tmp_path / "async", *flags, "--async-save", iterations=9), 2)
    assert shards(tmp_path / "async") == shards(tmp_path / "sync")
    assert len(shards(tmp_path / "async")) == 2 * 5, "a file of each rank, four saves and the last"
    assert losses(tmp_path / "async") == losses(tmp_path / "sync")
    assert latest_checkpoint(tmp_path / "async") == tmp_path / "async" / "iter_0000009"


class TestDistributedOptimizer:
    def test_a_run_of_elements_is_a_few_boxes(self) -> None:
        for shape in [(), (5,), (3, 4), (2, 1, 3), (2, 3, 4)]:
            cells = np.arange(np.prod(shape, dtype=int)).reshape(shape)
            for begin, end in itertools.combinations_with_replacement(range(cells.size + 1), 2):
                found = list(boxes(shape, begin, end))
                parts = [
                    cells[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
                    for offsets, sizes in found
                ]
                values = [value for part in parts for value in part.flatten()]
                assert values == list(range(begin, end))
                assert len(found) <= max(2 * len(shape) - 1, 1)

    @pytest.mark.parametrize(
        ("world", "tp", "bf16"),
        [(2, 1, True), pytest.param(4, 2, False, marks=pytest.mark.slow)],
    )
    def test_we_and_megatron_core_read_what_the_other_wrote(
        self, world: int, tp: int, bf16: bool, pool: RankPool, tmp_path: Path
    ) -> None:
        files = pool.run(f"{JOBS}:both_forms", world, save=str(tmp_path), tp=tp, bf16=bf16)[0]
        assert files == [f"__{rank}_0.distcp" for rank in range(world)]

    @pytest.mark.slow
    @pytest.mark.parametrize("world", [2, 4])
    def test_a_save_costs_a_rank_only_its_own_part(
        self, world: int, pool: RankPool, tmp_path: Path
    ) -> None:
        shape = ModelConfig(
            num_layers=4, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=4,
            vocab_size=8192,
        )  # fmt: skip
        found = {
            stock: pool.run(
                f"{JOBS}:cost_of_a_save", world, save=str(tmp_path / str(stock)), shape=shape,
                stock=stock,
            )
            for stock in (True, False)
        }  # fmt: skip
        for stock, ranks in found.items():
            for rank, cost in enumerate(ranks):
                size = cost["parameters"]
                print(
                    f"\n{'core' if stock else 'ours'} DP {world} rank {rank}: {size:,.0f} "
                    f"parameters, peak {cost['peak'] / size:.1f} B a parameter, written "
                    f"{cost['written'] / size:.1f} B a parameter, {cost['seconds']:.2f} s"
                )
        ours, core = found[False], found[True]
        said = bytes_of_a_save(
            int(ours[0]["parameters"]), dp_size=world, bf16=False, distributed_optimizer=True
        )
        for rank, cost in enumerate(ours):
            assert cost["written"] == pytest.approx(said[rank > 0], rel=0.01)
        assert max(c["peak"] for c in ours) < 0.5 * max(c["peak"] for c in core)


@contextmanager
def filled_in_training(save: Path, *, rows: int) -> Iterator[Path]:
    """The disk of `save` is full once the run has so many rows; the file that fills it."""
    metrics, filler = save / "metrics.jsonl", save.parent / "filler"
    over = threading.Event()

    def fill() -> None:
        while not over.is_set() and (
            not metrics.exists() or metrics.read_bytes().count(b"\n") < rows
        ):
            time.sleep(0.002)
        leave(save.parent, 300_000)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield filler
    finally:
        over.set()
        thread.join()


class TestFullDisk:
    """Of 2 MB, room for a few checkpoints of 0.7 MB; it fills up while a run trains."""

    def flags(self, corpus: Path, save: Path, *more: str) -> list[str]:
        keep = ["--save-interval", "10", "--save-keep-last", "1"]
        return pretrain_flags(corpus, save, *TINY, *keep, *more, iterations=60)

    def test_the_run_goes_on_and_saves_again_once_there_is_room(
        self, corpus: Path, small_disk: Path
    ) -> None:
        save = small_disk / "run"
        with filled_in_training(save, rows=1) as filler:
            process = start(self.flags(corpus, save, "--async-save"))
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if "could not be saved" in line and filler.exists():
                    assert "No space left on device" in line
                    assert not list(save.glob("*iter_*")), "something half written is left"
                    filler.unlink()
            assert process.wait() == 0, "".join(said)
        assert sum("could not be saved" in line for line in said) in (1, 2), "".join(said)
        assert len(losses(save)) == 60
        assert latest_checkpoint(save) == save / "iter_0000060"
        verify_checkpoint(save / "iter_0000060")

    def test_the_last_save_must_not_fail_and_leaves_the_earlier_one(
        self, pool: RankPool, corpus: Path, small_disk: Path
    ) -> None:
        save = small_disk / "run"
        flags = self.flags(corpus, save, "--save-interval", "100")
        pool.run([*flags, "--exit-interval", "2"], 2)
        with filled_in_training(save, rows=3) as filler:
            wanted = r"iter_0000012 could not be saved.* No space"
            with pytest.raises(RankFailedError, match=wanted):
                pool.run([*flags, "--exit-interval", "12"], 2)
        verify_checkpoint(save / "iter_0000002")
        assert latest_checkpoint(save) == save / "iter_0000002"
        filler.unlink()
        pool.run([*flags, "--exit-interval", "4"], 2)
        assert latest_checkpoint(save) == save / "iter_0000004"
        assert len(losses(save)) == 4

    def test_lines_without_room_wait_for_it(self, small_disk: Path) -> None:
        file = LineFile(small_disk / "rows")
        lines = [json.dumps({"row": at, "text": "x" * 5000}) for at in range(3)]
        file.add(lines[0])
        filler = leave(small_disk, 2000)
        file.add(lines[1])
        assert file.path.read_text().splitlines() == lines[:1]
        filler.unlink()
        file.add(lines[2])
        assert file.path.read_text().splitlines() == lines

    def test_rows_that_must_go_are_said_by_file_and_others_need_no_room(
        self, small_disk: Path
    ) -> None:
        path = small_disk / "metrics.jsonl"
        path.write_text("".join(json.dumps({"iteration": at}) + "\n" for at in range(5000)))
        before = path.read_bytes()
        leave(small_disk, 0)
        drop_rows_after(path, 5000)
        with pytest.raises(DataError, match=r"metrics\.jsonl .* No space left"):
            drop_rows_after(path, 4990)
        assert path.read_bytes() == before

    def test_tensorboard_goes_on_in_another_file(
        self, small_disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(get_logger(), "propagate", True)
        sink = TensorBoard(str(small_disk / "events"), 0)
        numbers = {f"loss {number}": 2.0 for number in range(200)}  # more than what a page leaves
        for at in range(1, 21):
            if at in (5, 13):
                leave(small_disk, 0)
            elif at in (9, 17):
                (small_disk / "filler").unlink()
            sink.write({"iteration": at, **numbers})
            if sink.writer is not None and at in (4, 12):
                sink.writer.flush()
        sink.close()
        events = EventAccumulator(str(small_disk / "events"))
        events.Reload()
        found = [event.step for event in events.Scalars("loss-199")]
        assert found == [*range(1, 5), *range(9, 13), *range(17, 21)]
        assert len(list((small_disk / "events").iterdir())) == 3, "an empty file of every row"
        said = [record.getMessage() for record in caplog.records]
        assert 2 <= len(said) < 8, "an outage is said, not every row of it"
        assert "events: [Errno 28] No space left on device" in said[0]
