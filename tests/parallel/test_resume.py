"""A checkpoint continues the run: bit for bit in the same layout, within rounding in another."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.core.errors import CheckpointError, ConfigError, LineageError
from megatron_miniplm.core.manifest import read_json, write_json
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.staging import exclusive
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.models.checkpoint import (
    LOCK,
    RetentionConfig,
    iteration_folder,
    latest_checkpoint,
    refuse_foreign_folder,
    remove_old_checkpoints,
    verify_checkpoint,
)
from tests.parallel.resume_matrix import LAYOUTS, Runs
from tests.pool import RankFailedError, RankPool
from tests.runs import INTERLEAVED, TP2, curve, losses, pretrain_flags

TOLERANCE = 1e-5  # fp32 sums in another order over ten updates

# Each layout once on either side, with the distributed optimizer and without; the same four ranks
# again are among all pairs.
MOVES = {
    "TP2 -> same": ((2, TP2), (2, TP2)),
    "TP2 -> PP2 interleaved": ((2, TP2), (2, INTERLEAVED)),
    "ZeRO DP2 -> same": (LAYOUTS["DP2"], LAYOUTS["DP2"]),
    "ZeRO TP2 x DP2 -> PP2 interleaved": (LAYOUTS["TP2 x DP2"], LAYOUTS["PP2 interleaved"]),
    "ZeRO PP2 interleaved -> DP2": (LAYOUTS["PP2 interleaved"], LAYOUTS["DP2"]),
}


@pytest.fixture(scope="module")
def runs(pool: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(pool, corpus, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("move", MOVES)
def test_resumed_run_equals_the_uninterrupted_one(move: str, runs: Runs) -> None:
    source, target = MOVES[move]
    worst, same = runs.move(source, target)
    print(f"\n{move}: max |loss - uninterrupted loss| over 10 updates = {worst:.2e}")
    assert worst <= TOLERANCE
    assert same or source != target


@pytest.mark.slow
@pytest.mark.parametrize("source", LAYOUTS)
def test_what_is_saved_in_any_layout_goes_on_in_any_other(source: str, runs: Runs) -> None:
    found = {
        target: runs.move(LAYOUTS[source], LAYOUTS[target])
        for target in LAYOUTS
    }  # fmt: skip
    print(f"\n{source}: {found}")
    assert max(worst for worst, _ in found.values()) <= TOLERANCE
    assert found[source][1], "not bitwise in the same layout"


def test_a_run_of_a_version_that_lacked_a_flag_continues(
    runs, pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    _, half = runs(2, TP2)
    shutil.copytree(half, tmp_path / "run")
    path = tmp_path / "run" / "iter_0000010" / "manifest.json"
    manifest = read_json(path)
    del manifest["config"]["z_loss_weight"]
    write_json(path, manifest)
    flags = pretrain_flags(corpus, tmp_path / "run", *TP2.split(), "--exit-interval", "11")
    with pytest.raises(RankFailedError, match=r"--z-loss-weight 0.0 there, 0.001 here"):
        pool.run([*flags, "--z-loss-weight", "1e-3"], 2)
    pool.run(flags, 2)
    assert len(losses(tmp_path / "run")) == 11


def test_a_run_whose_last_checkpoint_is_corrupt_is_taken_back_by_one_flag(
    runs: Runs, pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    whole, _ = runs(2, TP2)
    save = tmp_path / "run"
    shutil.copytree(whole, save)
    victim = sorted((save / "iter_0000020").glob("*.distcp"))[-1]
    flip(victim)
    flags = pretrain_flags(corpus, save, *TP2.split())
    offered = rf"{victim.name} has checksum .* iter_0000010 is intact: .* --ckpt-step 10"
    with pytest.raises(RankFailedError, match=offered):
        pool.run(flags, 2)
    with pytest.raises(RankFailedError, match="there are iter_0000010, iter_0000020"):
        pool.run([*flags, "--ckpt-step", "7"], 2)
    pool.run([*flags, "--ckpt-step", "10", "--exit-interval", "15"], 2)
    assert len(losses(save)) == 15, "rows of later updates are made anew"
    shutil.rmtree(save / "iter_0000010")
    pool.run([*flags, "--ckpt-step", "10"], 2)  # the command of a requeued job, unchanged
    assert losses(save) == losses(whole)
    verify_checkpoint(save / "iter_0000020")


def flip(victim: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)


def test_gpu_hours_count_work_that_was_logged_and_lost(
    runs, pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    _, half = runs(2, TP2)
    shutil.copytree(half, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 11, "GPU-hours": 7.0}\n')
    flags = pretrain_flags(corpus, tmp_path / "run", *TP2.split(), "--exit-interval", "11")
    pool.run(flags, 2)
    rows = curve(tmp_path / "run")
    assert [row["iteration"] for row in rows] == list(range(1, 12))
    assert 7 < rows[-1]["GPU-hours"] < 8
    timers = rows[-1]["timers (ms)"]
    assert {"data wait", "forward-backward", "gradient check", "optimizer"} <= set(timers)


def test_only_the_last_checkpoints_and_those_of_the_interval_stay(
    pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    keep = ["--save-interval", "3", "--save-keep-last", "2", "--save-retain-interval", "6"]
    run = pretrain_flags(corpus, tmp_path / "run", *keep, iterations=16)
    pool.run(run, 1)
    folders = sorted(path.name for path in (tmp_path / "run").glob("iter_*"))
    assert folders == [f"iter_{at:07d}" for at in (6, 12, 15, 16)]
    for folder in (tmp_path / "run").glob("iter_*"):
        verify_checkpoint(folder)
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "iter_0000016"


def test_a_run_taken_back_keeps_what_it_saves(tmp_path: Path) -> None:
    for at in (100, 150, 200):
        folder = iteration_folder(tmp_path, at)
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
    # 200 turned out corrupt, so the tracker was set to 100, and the run has just saved 150.
    remove_old_checkpoints(tmp_path, RetentionConfig(save_keep_last=1), saved=150)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000150", "iter_0000200"]


def test_repeating_a_finished_run_changes_nothing(runs, pool: RankPool, corpus: Path) -> None:
    whole, _ = runs(2, TP2)
    before = (whole / "metrics.jsonl").read_bytes()
    pool.run(pretrain_flags(corpus, whole, *TP2.split()), 2)
    assert (whole / "metrics.jsonl").read_bytes() == before


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class TestOverwrite:
    """--overwrite replaces finished and other runs, and never an unfinished one of its own."""

    def test_a_finished_run_is_replaced(
        self, runs, pool: RankPool, corpus: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(runs(2, TP2)[0], tmp_path / "run")
        flags = pretrain_flags(corpus, tmp_path / "run", "--seed", "3", "--overwrite")
        pool.run([*flags, "--train-iters", "6"], 1)
        assert len(losses(tmp_path / "run")) == 6
        assert not (tmp_path / "run" / "iter_0000020").exists()

    def test_its_own_unfinished_run_continues(
        self, runs, pool: RankPool, corpus: Path, tmp_path: Path
    ) -> None:
        whole, half = runs(2, TP2)
        shutil.copytree(half, tmp_path / "run")
        pool.run(pretrain_flags(corpus, tmp_path / "run", *TP2.split(), "--overwrite"), 2)
        assert losses(tmp_path / "run") == losses(whole)
        assert (tmp_path / "run" / "iter_0000010").exists(), "it must not have begun anew"

    def test_what_is_refused_leaves_the_old_run(
        self, runs, pool: RankPool, corpus: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(runs(2, TP2)[0], tmp_path / "run")
        before = contents(tmp_path / "run")
        flags = pretrain_flags(corpus, tmp_path / "run", "--overwrite", "--lr-warmup-iters", "20")
        with pytest.raises(RankFailedError, match="lower --lr-warmup-iters"):
            pool.run(flags, 2)
        assert contents(tmp_path / "run") == before

    def test_the_folder_of_another_verb_is_refused(
        self, runs, corpus: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(runs(2, TP2)[0], tmp_path / "run")
        before = contents(tmp_path / "run")
        with pytest.raises(ConfigError, match="made by `pretrain`, not by `convert`"):
            refuse_foreign_folder(tmp_path / "run", "convert")
        assert contents(tmp_path / "run") == before


def test_two_jobs_on_one_folder_are_refused(
    runs, pool: RankPool, corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs(2, TP2)[1], tmp_path / "run")
    with (
        exclusive(tmp_path / "run" / LOCK, wait=False),
        pytest.raises(RankFailedError, match="another process is writing"),
    ):
        pool.run(pretrain_flags(corpus, tmp_path / "run", *TP2.split()), 2)


class TestRefusals:
    """What does not belong to the run in SAVE is refused by name, and SAVE stays as it is."""

    @pytest.fixture(autouse=True)
    def _half(self, runs, tmp_path: Path) -> None:
        shutil.copytree(runs(2, TP2)[1], tmp_path / "run")
        self.save = tmp_path / "run"

    def refused(self, pool: RankPool, flags: list[str], error: type, *words: str) -> None:
        before = contents(self.save)
        with pytest.raises(RankFailedError) as caught:
            pool.run(flags, 1)
        text = str(caught.value)
        assert error.__name__ in text
        for word in words:
            assert word in text
        assert contents(self.save) == before

    def test_another_model_shape(self, pool: RankPool, corpus: Path) -> None:
        flags = pretrain_flags(corpus, self.save, "--num-layers", "2")
        self.refused(pool, flags, CheckpointError, "num_layers", "4", "2")

    def test_other_hyperparameters(self, pool: RankPool, corpus: Path) -> None:
        flags = pretrain_flags(corpus, self.save, "--lr", "3e-4")
        self.refused(pool, flags, ConfigError, "--lr 0.0006 there, 0.0003 here", "--overwrite")

    def test_another_corpus(self, pool: RankPool, corpus: Path, tmp_path: Path) -> None:
        write_subset(
            Corpus.open(corpus), np.arange(0, 500), tmp_path / "half", config={}, selection={}
        )
        flags = pretrain_flags(tmp_path / "half", self.save)
        self.refused(pool, flags, LineageError, "was trained with corpus")

    def test_a_flipped_bit_in_a_checkpoint_file(self, pool: RankPool, corpus: Path) -> None:
        victim = sorted((self.save / "iter_0000010").glob("*.distcp"))[0]
        flip(victim)
        flags = pretrain_flags(corpus, self.save)
        self.refused(pool, flags, CheckpointError, victim.name, "corrupt", "nothing was loaded")

    def test_a_truncated_checkpoint_file(self, pool: RankPool, corpus: Path) -> None:
        victim = sorted((self.save / "iter_0000010").glob("*.distcp"))[0]
        victim.write_bytes(victim.read_bytes()[:-1])
        flags = pretrain_flags(corpus, self.save)
        self.refused(pool, flags, CheckpointError, victim.name, "truncated")


def test_a_checkpoint_that_cannot_be_removed_stays_and_the_run_goes_on(tmp_path: Path) -> None:
    for at in (100, 150, 200):
        manifest = iteration_folder(tmp_path, at) / "manifest.json"
        manifest.parent.mkdir()
        manifest.write_text("{}")
    (iteration_folder(tmp_path, 100) / "manifest.json").unlink()
    (iteration_folder(tmp_path, 100) / "manifest.json").mkdir()  # which unlink refuses
    remove_old_checkpoints(tmp_path, RetentionConfig(save_keep_last=1), saved=200)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["iter_0000100", "iter_0000200"]
