"""Curves of runs show every logged number once, on axes that runs share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import DataError
from megatron_miniplm.evaluation import run_curves
from megatron_miniplm.evaluation.figures import new_figure, styles
from megatron_miniplm.evaluation.final_losses import final_losses


def write_run(folder: Path, *, steps: int = 40, rate: float = 2.0, **more: float) -> Path:
    """A --save folder of steps 10 apart, a second an update, with validations of two sets."""
    folder.mkdir()
    lines = []
    for at in range(10, 10 * steps + 1, 10):
        row = {
            "iteration": at, "consumed_samples": 4 * at, "consumed_tokens": 1e6 * at,
            "iteration time (ms)": 1000.0, "world size": 2, "throughput (TFLOP/s/GPU)": rate,
            "tokens per second": 1e6, "learning rate": 1e-4, "grad norm": 1.0,
            "global batch size": 4, "eta (s)": 1.0, "lm loss": 3 + 4 / at, **more,
        }  # fmt: skip
        lines.append(row)
        if at % 100 == 0:
            losses = {"lm loss": 3.5, "code lm loss": 2.5}
            lines.append({"iteration": at, "consumed_samples": 4 * at, "validation": losses})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"iteration": 41')  # the run goes on
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is to be saved; not rendered, which takes most of the time."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    return figures


def groups(*folders: Path):
    return run_curves.grouped([run_curves.read_history(each, each.name) for each in folders])


def test_training_flops_are_those_of_each_update(tmp_path):
    folder = write_run(tmp_path / "a", steps=4)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:4]]
    for row, times in zip(rows, (1.0, 1.0, 4.0, 4.0), strict=True):
        row["FLOPs (x 6 N D)"] = times
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = run_curves.read_history(folder, "a")
    found = run_curves.training_flops(history, 7, np.array([5.0, 20.0, 25.0, 40.0, 50.0]))
    assert found == pytest.approx(6 * 7 * 1e6 * np.array([5, 20, 40, 100, 140]))
    assert history.costs["tokens"].tolist() == [10, 20, 30, 40]


def test_a_teacher_whose_flops_are_not_known_is_not_counted_as_none(tmp_path):
    taught = write_run(tmp_path / "b", **{"throughput with teacher (TFLOP/s/GPU)": 3.0})
    with pytest.raises(DataError, match="an earlier version logged it"):
        run_curves.training_flops(run_curves.read_history(taught, "b"), 7, np.ones(1))


def test_compute_counts_the_teacher_and_time_counts_updates_both_of_all_devices(tmp_path):
    alone = run_curves.read_history(write_run(tmp_path / "a"), "a")
    taught = write_run(tmp_path / "b", **{"throughput with teacher (TFLOP/s/GPU)": 3.0})
    beside = run_curves.read_history(taught, "b")
    assert alone.costs["hours"][-1] == pytest.approx(2 * 400 / 3600)
    assert alone.costs["flops"][-1] == pytest.approx(2 * 400 * 2.0 / 1e3)  # PFLOP
    assert beside.costs["flops"][-1] == pytest.approx(2 * 400 * 3.0 / 1e3)
    wide = run_curves.read_history(write_run(tmp_path / "c", **{"world size": 16}), "c")
    assert wide.costs["flops"][-1] == pytest.approx(8 * alone.costs["flops"][-1])
    assert alone.costs["tokens"][-1] == pytest.approx(400)
    between_and_after = run_curves.tokens_at(alone, np.array([5.0, 396.0, 403.0]))
    assert between_and_after == pytest.approx([5, 396, 403])


def test_every_run_is_on_every_panel_and_its_logged_losses_are_behind_their_mean(tmp_path, drawn):
    run_curves.training_loss(groups(write_run(tmp_path / "a"), write_run(tmp_path / "_b$")))
    (figure,) = drawn
    assert [axis.get_xlabel() for axis in figure.axes] == list(run_curves.COSTS.values())
    for axis in figure.axes:
        assert [line.get_linewidth() for line in axis.lines] == [0.8, 2, 0.8, 2]
        np.testing.assert_allclose(axis.lines[0].get_ydata()[:2], [3.4, 3.2])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["a", r" _b\$"]


def test_a_cost_that_one_run_does_not_know_is_no_panel(tmp_path, drawn):
    old = tmp_path / "old"
    old.mkdir()
    row = {"iteration": 1, "consumed_samples": 1, "consumed_tokens": 9, "lm loss": 3.0}
    (old / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    run_curves.training_loss(groups(write_run(tmp_path / "new"), old))
    assert len([axis for axis in drawn[0].axes if axis.lines]) == 2


def test_validations_have_a_panel_for_each_name_at_the_tokens_of_their_iteration(tmp_path, drawn):
    run_curves.validation_losses(groups(write_run(tmp_path / "a")))
    titles = [axis.get_title(loc="left") for axis in drawn[0].axes]
    assert titles == ["lm loss", "code lm loss"]
    np.testing.assert_allclose(drawn[0].axes[1].lines[0].get_xdata(), [100, 200, 300, 400])


def test_where_runs_ended_is_ordered_best_first_with_seeds_as_one(tmp_path, drawn):
    ends = {"a": [3.0], "b": [2.0, 2.4], "c": [2.5]}
    runs = []
    for label, losses in ends.items():
        for seed, loss in enumerate(losses):
            folder = tmp_path / f"{label}{seed}"
            folder.mkdir()
            row = {"iteration": 1, "consumed_samples": 1, "consumed_tokens": 9, "lm loss": 3.0}
            held_out = {"iteration": 1, "validation": {"lm loss": loss}}
            (folder / "metrics.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(held_out)}\n")
            runs.append(run_curves.read_history(folder, label))
    final_losses(run_curves.grouped(runs))
    (axis,) = (each for each in drawn[0].axes if each.lines)
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a", "c", "b"]
    assert [text.get_text() for text in axis.texts] == ["3.000", "2.500", "2.200"]
    assert final_losses(run_curves.grouped(runs[:3])) is None  # two labels


def test_whatever_else_is_logged_has_a_panel_and_a_number_that_never_changes_has_none(
    tmp_path, drawn
):
    with_memory = write_run(tmp_path / "b", **{"peak memory (GiB)": 5.0, "kd loss": 1.0})
    run_curves.other_metrics(groups(write_run(tmp_path / "a"), with_memory))
    panels = {axis.get_title(loc="left"): axis for axis in drawn[0].axes}
    assert {"learning rate", "grad norm", "tokens per second", "peak memory (GiB)"} <= set(panels)
    assert not {"global batch size", "lm loss", "eta (s)", "consumed_samples"} & set(panels)
    assert len(panels["learning rate"].lines) == 2
    assert len(panels["kd loss"].lines) == 1
    assert panels["grad norm"].get_yscale() == "log"


def test_the_first_losses_do_not_press_the_rest_together(tmp_path, drawn):
    run_curves.training_loss(groups(write_run(tmp_path / "a")))
    low, high = drawn[0].axes[0].get_ylim()
    assert low < 3.01 < high < 3.2


def test_a_line_that_a_kill_cut_does_not_count_and_any_other_that_is_cut_is_refused(tmp_path):
    path = write_run(tmp_path / "a") / "metrics.jsonl"
    assert len(run_curves.read_history(tmp_path / "a", "a").steps["lm loss"]) == 40
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2 is not JSON"):
        run_curves.read_history(tmp_path / "a", "a")


@pytest.mark.parametrize("content", [None, "", '{"iteration": 1, "consumed_samples": 1}\n'])
def test_a_run_without_a_loss_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(run_curves.NothingLoggedError, match="has this run logged anything"):
        run_curves.read_history(tmp_path, "x")
    with pytest.raises(DataError, match="nowhere is no folder"):
        run_curves.read_history(tmp_path / "nowhere", "x")


def test_an_update_left_out_has_its_cost_and_no_loss_and_a_mean_passes_over_it(tmp_path, drawn):
    path = write_run(tmp_path / "a") / "metrics.jsonl"
    lines = path.read_text().split("\n")
    row = json.loads(lines[30])
    del row["lm loss"]
    path.write_text("\n".join([*lines[:30], json.dumps(row), *lines[31:]]))
    found = run_curves.read_history(tmp_path / "a", "a")
    assert found.costs["hours"][-1] == pytest.approx(2 * 400 / 3600)
    run_curves.training_loss({"a": [found]})
    for line in drawn[0].axes[0].lines:
        assert len(line.get_ydata()) == 39
        assert np.isfinite(line.get_ydata()).all()


def test_beyond_seven_labels_curves_differ_in_lines_and_all_labels_are_drawn(tmp_path, drawn):
    run = run_curves.read_history(write_run(tmp_path / "a", steps=10), "a")
    labels = [f"l{number}" for number in range(60)]
    run_curves.training_loss({label: [run] for label in labels})
    axis = drawn[0].axes[0]
    means = {line.get_label(): line for line in axis.lines if line.get_linewidth() == 2}
    assert list(means) == labels
    looks = [(means[each].get_color(), means[each].get_linestyle()) for each in labels[:28]]
    assert len(set(looks)) == 28


def test_smoothing_keeps_a_constant_and_the_mean_of_a_line_and_reduces_noise():
    np.testing.assert_allclose(run_curves.smooth(np.full(50, 3.0), 7), 3.0)
    line = np.arange(50.0)
    np.testing.assert_allclose(run_curves.smooth(line, 7)[3:-3], line[3:-3])
    noise = np.random.default_rng(0).normal(size=400)
    assert run_curves.smooth(noise).std() < 0.5 * noise.std()
    assert len(run_curves.smooth(noise[:1])) == 1


def test_seeds_are_one_line_of_their_mean_up_to_the_end_of_the_shortest():
    _, (axis,) = new_figure(1)
    ends = [(205.0, 1.0), (200.0, 1.2)]
    seeds = [(np.array([100.0, end]), np.array([3.0, loss])) for end, loss in ends]
    run_curves.draw_curve(axis, seeds, label="a", style=next(styles()))
    (mean,) = (line for line in axis.lines if line.get_linewidth() == 2)
    assert mean.get_label() == "a (2 seeds)"
    np.testing.assert_allclose(mean.get_xdata(), [100, 200])
    assert mean.get_ydata()[-1] == pytest.approx(1.1, abs=0.1)


def test_report_of_runs_that_go_on_is_one_page_with_its_pictures_beside_it(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a", "<b>")]
    output = tmp_path / "report"
    words = ["report", "--runs", *map(str, folders), "--output", str(output)]
    assert main(words) == 0
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "&lt;b&gt;" in page
    assert "<b>" not in page.partition("<section>")[2]
    assert {path.name for path in output.glob("*.png")} == {
        "curves.png", "validation.png", "metrics.png",
    }  # fmt: skip
    assert main(words) == 2  # what is there is not overwritten


def test_overwriting_leaves_no_picture_of_the_earlier_report_and_what_others_put_there(
    tmp_path, drawn
):
    run, output = write_run(tmp_path / "a"), tmp_path / "report"
    assert main(["report", "--runs", str(run), "--output", str(output)]) == 0
    assert (output / "validation.png").exists()
    (output / "mine.png").touch()
    lines = (run / "metrics.jsonl").read_text().split("\n")
    (run / "metrics.jsonl").write_text("\n".join(x for x in lines if "validation" not in x))
    assert main(["report", "--runs", str(run), "--output", str(output), "--overwrite"]) == 0
    names = {path.name for path in output.glob("*.png")}
    assert names == {"curves.png", "metrics.png", "mine.png"}


def test_a_proxy_has_a_curve_of_its_own_and_a_folder_without_a_log_is_named(
    tmp_path, drawn, capsys
):
    student, proxy = write_run(tmp_path / "student"), write_run(tmp_path / "proxy")
    metrics = proxy / "metrics.jsonl"
    rows = [x for x in metrics.read_text().split("\n") if "validation" not in x]
    metrics.write_text("\n".join(rows).replace("lm loss", "regression loss"))
    (tmp_path / "converted").mkdir()
    output = tmp_path / "report"
    words = ["report", "--output", str(output), "--runs"]
    assert main([*words, str(tmp_path / "converted"), str(student), str(proxy)]) == 0
    losses, of_proxy, _, other = drawn
    assert losses.axes[0].get_ylabel() == "training loss (nats per token)"
    assert of_proxy.axes[0].get_ylabel() == "regression loss"
    assert len(of_proxy.axes) == len(run_curves.COSTS)
    panels = {axis.get_title(loc="left") for axis in other.axes}
    assert not {"regression loss", "lm loss", "world size"} & panels
    page = (output / "report.html").read_text()
    assert "Training: regression loss" in page
    assert page.count("nothing logged yet") == 1
    assert main([*words, str(tmp_path / "converted"), "--overwrite"]) == 2
    assert "has this run logged anything" in " ".join(capsys.readouterr().err.split())


def test_runs_of_one_folder_name_are_told_apart_and_none_counts_twice(
    tmp_path, drawn, capsys, monkeypatch
):
    for parent in "ab":
        (tmp_path / parent).mkdir()
        write_run(tmp_path / parent / "student")
    write_run(tmp_path / "other")
    monkeypatch.chdir(tmp_path / "other")
    words = ["report", "--output", str(tmp_path / "report"), "--runs"]
    assert main([*words, "../a/student", "../b/student", "."]) == 0
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.texts] == ["a/student", "b/student", "other"]
    assert "(n=2)" not in (tmp_path / "report/report.html").read_text()
    assert main([*words, ".", "../other", "--overwrite"]) == 2
    assert "twice" in " ".join(capsys.readouterr().err.split())
