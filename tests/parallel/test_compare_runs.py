"""compare_runs.py names the step where two trainings part, whatever made them part."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.runs import TINY, pretrain_flags

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    """tools/compare_runs.py, as the command line sees it."""
    sys.path.insert(0, str(PROJECT / "tools"))
    try:
        import compare_runs

        yield compare_runs
    finally:
        sys.path.remove(str(PROJECT / "tools"))


@pytest.fixture(scope="module")
def trained(pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """--save folder of six updates, with two checkpoints."""
    save = tmp_path_factory.mktemp("compared") / "run"
    pool.run(pretrain_flags(corpus, save, *TINY, "--save-interval", "3", iterations=6), 1)
    return save


def changed(run: Path, copy: Path, change) -> Path:
    """A copy of a run whose rows of metrics went through `change`."""
    copy.mkdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(row) + "\n" for row in map(change, rows))
    (copy / "metrics.jsonl").write_text(text)
    return copy


def test_runs_that_differ_only_in_what_the_clock_says_are_the_same(tool, trained, tmp_path, capsys):
    def slower(row):
        return row | {"tokens per second": 1.0, "eta (s)": 9.0, "iteration time (ms)": 5.0}

    other = changed(trained, tmp_path / "slower", slower)
    assert tool.main([str(trained), str(other)]) == 0
    assert "the same bit for bit" in capsys.readouterr().out


def test_the_first_step_and_the_largest_difference_of_each_metric_are_named(
    tool, trained, tmp_path
):
    def drift(row):
        by = 1e-4 * max(0, row["iteration"] - 2)
        return row | {"lm loss": row["lm loss"] + by}

    other = changed(trained, tmp_path / "drift", drift)
    found = {each.name: each for each in tool.compare_metrics(trained, other, 0.0)}
    assert found["lm loss"].first.startswith("iteration 3: ")
    assert found["lm loss"].largest == pytest.approx(4e-4, rel=1e-3)
    assert found["lm loss"].largest_at == "iteration 6"
    assert not found["grad norm"].first
    assert tool.main([str(trained), str(other), "--tolerance", "1e-3"]) == 0
    assert tool.main([str(trained), str(other), "--tolerance", "1e-5"]) == 1


def test_a_count_that_is_off_by_one_and_a_loss_that_is_no_number_exceed_any_tolerance(
    tool, trained, tmp_path
):
    def broken(row):
        return row | {"lm loss": float("nan"), "consumed_tokens": row["consumed_tokens"] + 1}

    other = changed(trained, tmp_path / "broken", broken)
    found = {each.name for each in tool.compare_metrics(trained, other, 0.5) if each.first}
    assert found == {"lm loss", "consumed_tokens"}


def test_a_run_that_died_early_or_lacks_a_metric_is_not_the_same(tool, trained, tmp_path, capsys):
    dead = changed(trained, tmp_path / "dead", lambda row: row)
    lines = (dead / "metrics.jsonl").read_text().splitlines(keepends=True)
    (dead / "metrics.jsonl").write_text("".join(lines[:3]))
    assert tool.main([str(dead), str(trained)]) == 1
    assert "first at iteration 4: logged steps, training" in capsys.readouterr().out
    (found,) = (each for each in tool.compare_metrics(trained, dead, 0.0) if each.first)
    assert (found.first, found.alone) == (f"iteration 4: only in {trained}", 3)

    def poorer(row):
        return {name: value for name, value in row.items() if name != "grad norm"}

    poor = changed(trained, tmp_path / "poor", poorer)
    assert tool.main([str(trained), str(poor)]) == 1
    assert "first at iteration 1: grad norm" in capsys.readouterr().out


def test_checkpoints_are_compared_tensor_by_tensor(tool, trained, tmp_path, capsys):
    early, late = (trained / f"iter_{n:07d}" for n in (3, 6))
    copy = shutil.copytree(late, tmp_path / late.name)
    assert tool.main([str(late), str(copy)]) == 0
    assert tool.main([str(early), str(late)]) == 1
    assert "decoder.final_layernorm.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "give two runs"),
        (("RUN",), "give two runs"),
        (("RUN", "RUN/iter_0000003"), "one is a checkpoint"),
        (("RUN", "RUN", "--", "--lr", "1"), "need --commits or --layouts"),
        (("RUN", "EMPTY"), "--save folder of a run"),
        (("--layouts", "", "", "--", "--save", "x"), "--save is set by"),
        (("--layouts", "", "", "--output", "RUN", "--", "--lr", "1"), "exists already: remove it"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_told_from_a_difference(
    tool, trained, tmp_path, words, why, capsys
):
    places = {"EMPTY": str(tmp_path)}
    assert tool.main([places.get(w, w.replace("RUN", str(trained))) for w in words]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.slow
def test_two_layouts_agree_within_1e_5_and_not_bit_for_bit(tool, corpus, tmp_path, capsys):
    flags = pretrain_flags(corpus, tmp_path, *TINY, iterations=5)[1:]
    at = flags.index("--save")
    words = ["--layouts", "", "--tensor-model-parallel-size 2", "--output", str(tmp_path / "runs")]
    assert tool.main([*words, "--", *flags[:at], *flags[at + 2 :]]) == 0
    said = capsys.readouterr().out
    assert "--tensor-model-parallel-size: 1 and 2" in said
    assert "the same within 1e-05" in said
    made = sorted(path for path in (tmp_path / "runs").iterdir())
    assert tool.main([*map(str, made), "--tolerance", "0"]) == 1


@pytest.mark.slow
def test_a_commit_and_the_working_tree_are_run_with_the_same_flags(tool, corpus, tmp_path, capsys):
    flags = pretrain_flags(corpus, tmp_path, *TINY, iterations=5)[1:]
    at = flags.index("--save")
    code = tool.main(["--commits", "HEAD", ".", "--", *flags[:at], *flags[at + 2 :]])
    said = capsys.readouterr().out
    assert code == (0 if "the same bit for bit" in said else 1)
    assert "lm loss" in said
