"""Curves of training runs: losses by what they cost, and everything else that a run logs.

A `History` is ``SAVE/metrics.jsonl`` as columns, of a finished run or of one that goes on. A metric
is a panel, a label is a colour; runs with one label are seeds of one method: curves show their
mean, and the band around it is one standard deviation. A single run's training loss is drawn twice:
as logged, faint, and as a running mean.

What a run cost is counted over its logged steps: hours of updates alone (validations and saves are
in nobody's step) times devices, and FLOPs by Megatron's formula, a teacher's included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.core.lines import read_objects
from megatron_miniplm.core.manifest import read_json
from megatron_miniplm.evaluation.figures import (
    INK,
    Style,
    few_marks,
    new_figure,
    plain,
    styles,
    to_png,
)
from megatron_miniplm.evaluation.origins import models_of

if TYPE_CHECKING:
    from megatron_miniplm.evaluation.figures import Axes

Array = npt.NDArray[np.float64]
LOSS = "lm loss"
_TIMES_PLAIN = "FLOPs (x 6 N D)"
_DEVICES = "world size"
_RATE, _WITH_TEACHER = "throughput (TFLOP/s/GPU)", "throughput with teacher (TFLOP/s/GPU)"
COSTS = {
    "iterations": "iteration",
    "tokens": "training tokens (millions)",
    "flops": "training PFLOP",
    "hours": "GPU-hours of updates",
}
"""What a loss is drawn against -> its name on the axis."""
TRAINING = 6
"""FLOPs of a parameter and token."""
_UNDRAWN = {
    "iteration", "consumed_samples", "consumed_tokens", "eta (s)", "iteration time (ms)",
    "GPU-hours", "skipped iterations", _TIMES_PLAIN, _DEVICES,
}  # fmt: skip
"""Numbers of a row that are axes, say nothing as a curve, or have a figure of their own."""
_LOGARITHMIC = {"grad norm"}
_FIRST = ("learning rate", "grad norm", "tokens per second", _RATE)
_SETTLED = 0.1
"""Share of a run after which the losses decide how high a panel reaches."""


@dataclass(frozen=True, kw_only=True)
class History:
    """What one run logged, as columns; float64."""

    label: str
    loss: str
    """The metric that it trains on: `lm loss`, or else the first loss that it logs."""
    steps: Mapping[str, Array]
    """Metric -> value at each logged step; NaN where a step has none."""
    costs: Mapping[str, Array]
    """Name in `COSTS` -> what was spent up to each logged step."""
    validations: Mapping[str, tuple[Array, Array]]
    """Name -> (iterations, losses)."""

    @property
    def last_iteration(self) -> int:
        """Of the last logged step."""
        return int(self.steps["iteration"][-1])

    def curve(self, metric: str, cost: str) -> tuple[Array, Array]:
        """(what was spent, values), where there are values: an update left out has no loss."""
        there = np.isfinite(self.steps[metric])
        return self.costs[cost][there], self.steps[metric][there]


class NothingLoggedError(DataError):
    """A run that has not logged a loss yet, or a folder that no training wrote."""


def read_history(folder: Path, label: str) -> History:
    """Read ``folder/metrics.jsonl``; refuses one without a step that has a loss."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: give the --save folder of a run")
    rows = read_objects(folder / "metrics.jsonl")
    steps = [row for row in rows if "validation" not in row]
    names = dict.fromkeys(name for row in steps for name, value in row.items() if _number(value))
    losses = [name for name in names if name.endswith(" loss")]
    if not losses:
        raise NothingLoggedError(
            f"{folder}/metrics.jsonl holds no step with a loss: has this run logged anything?"
        )
    columns = {
        name: np.array([row.get(name, np.nan) for row in steps], dtype=np.float64)
        for name in names
    }  # fmt: skip
    validations: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.get("validation", {}).items():
            validations.setdefault(name, []).append((row["iteration"], value))
    return History(
        label=label,
        loss=LOSS if LOSS in losses else losses[0],
        steps=columns,
        costs=_costs(columns),
        validations={
            name: (np.array([at for at, _ in seen], np.float64), np.array([v for _, v in seen]))
            for name, seen in validations.items()
        },
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _costs(steps: Mapping[str, Array]) -> dict[str, Array]:
    costs = {"iterations": steps["iteration"], "tokens": steps["consumed_tokens"] / 1e6}
    if {"iteration time (ms)", _DEVICES} <= steps.keys() and np.isfinite(steps[_DEVICES]).all():
        updates = np.diff(steps["iteration"], prepend=0)
        seconds = np.nan_to_num(updates * steps["iteration time (ms)"] / 1e3) * steps[_DEVICES]
        costs["hours"] = seconds.cumsum() / 3600
        rate = steps.get(_WITH_TEACHER, steps.get(_RATE))
        if rate is not None:
            costs["flops"] = (np.nan_to_num(rate) * seconds).cumsum() / 1e3
    return costs


def training_flops(run: History, size: int, millions: Array) -> Array:
    """Of the first so many millions of tokens: 6 N D, times what a teacher and sampling add to it.

    Refuses logs of a version that did not say how much that is.
    """
    plain = TRAINING * size * 1e6
    if _TIMES_PLAIN not in run.steps:
        if _WITH_TEACHER in run.steps:
            raise DataError(
                f"{run.label}: its metrics.jsonl has a teacher's throughput but no "
                f"{_TIMES_PLAIN!r}: an earlier version logged it, whose FLOPs are not known"
            )
        return plain * millions
    tokens, times = run.costs["tokens"], run.steps[_TIMES_PLAIN]
    work = (np.diff(tokens, prepend=0.0) * times).cumsum()
    inside = np.interp(millions, np.append(0.0, tokens), np.append(0.0, work))
    return plain * (inside + times[-1] * np.clip(millions - tokens[-1], 0, None))


Groups = Mapping[str, Sequence[History]]
"""Label -> its seeds."""


def grouped(histories: Sequence[History]) -> dict[str, list[History]]:
    """Histories of each label, in order of first appearance."""
    groups: dict[str, list[History]] = {}
    for each in histories:
        groups.setdefault(each.label, []).append(each)
    return groups


def training_loss(groups: Groups) -> bytes:
    """What runs train on (all of them on one) against each cost that every run knows: a PNG."""
    every = [each for group in groups.values() for each in group]
    (loss,) = {each.loss for each in every}
    costs = [name for name in COSTS if all(name in each.costs for each in every)]
    figure, axes = new_figure(len(costs), columns=2)
    for axis, cost in zip(axes, costs, strict=True):
        for style, (label, seeds) in zip(styles(), groups.items(), strict=False):
            if len(seeds) == 1:
                axis.plot(*seeds[0].curve(loss, cost), color=style.color, lw=0.8, alpha=0.35)
            curves = [(x, smooth(y)) for x, y in (each.curve(loss, cost) for each in seeds)]
            draw_curve(axis, curves, label=label, style=style)
        axis.set_xlabel(COSTS[cost])
        axis.set_ylabel("training loss (nats per token)" if loss == LOSS else plain(loss))
        axis.set_xlim(left=0)
        _limit(axis, [each.steps[loss] for each in every])
    _legend(figure, axes[0])
    return to_png(figure, "")


def validation_losses(groups: Groups) -> bytes | None:
    """A panel for each set and mean that any run validated on, against tokens; None without."""
    names = list(
        dict.fromkeys(n for group in groups.values() for each in group for n in each.validations)
    )
    if not names:
        return None
    figure, axes = new_figure(len(names), columns=min(3, len(names)), height=3.4)
    for axis, name in zip(axes, names, strict=True):
        found = []
        for style, (label, seeds) in zip(styles(), groups.items(), strict=False):
            curves = [validation(each, name) for each in seeds if name in each.validations]
            draw_curve(axis, curves, label=label, style=style, marker=style.marker)
            found += [losses for _, losses in curves]
        axis.set_title(plain(name), loc="left", fontsize=10, color=INK)
        axis.set_xlabel(COSTS["tokens"])
        axis.set_ylabel("nats per token")
        axis.set_xlim(left=0)
        _limit(axis, found)
    _legend(figure, axes[0], every=axes)
    return to_png(figure, "")


def validation(history: History, name: str) -> tuple[Array, Array]:
    """(millions of tokens, losses) of a validation."""
    at, losses = history.validations[name]
    return tokens_at(history, at), losses


def tokens_at(history: History, iterations: Array) -> Array:
    """Millions of tokens up to these iterations: between logged steps they grow evenly.

    After the last one they go on as before it: a run may end, and save, between two.
    """
    at, tokens = np.r_[0.0, history.steps["iteration"]], np.r_[0.0, history.costs["tokens"]]
    rate = (tokens[-1] - tokens[-2]) / (at[-1] - at[-2])
    return np.interp(iterations, at, tokens) + rate * np.clip(iterations - at[-1], 0, None)


def with_evaluations(history: History, save: Path, results: Sequence[Path]) -> History:
    """The run of `save`, and what ``evaluate --checkpoints`` said of it, as validations.

    `results`: its results.json files, or their folders; those of other runs, and of single models,
    are left aside.
    """
    validations = dict(history.validations)
    is_own = models_of(save)
    for path in results:
        file = path / "results.json" if path.is_dir() else path
        points = {
            point["iteration"]: point
            for curve in read_json(file).get("curves", ())
            for point in curve["points"]
            if is_own(point["model"])
        }.values()
        for name in dict.fromkeys(n for point in points for n in point.get("lm_loss", ())):
            if name in validations:
                raise DataError(
                    f"{save} has two validations {name!r}, one of them in {file}: evaluate with "
                    "--lm-loss NAME=PREFIX"
                )
            own = [point for point in points if name in point.get("lm_loss", ())]
            validations[name] = (
                np.array([point["iteration"] for point in own], np.float64),
                np.array([point["lm_loss"][name]["instance_mean"] for point in own]),
            )
    return replace(history, validations=validations)


def other_metrics(groups: Groups) -> bytes | None:
    """A panel for everything else that any run logs, against iterations; None without."""
    logged = dict.fromkeys(n for group in groups.values() for each in group for n in each.steps)
    names = [name for name in _FIRST if name in logged]
    apart = {*_UNDRAWN, *_FIRST, *(each.loss for group in groups.values() for each in group)}
    names += [name for name in logged if name not in apart]
    names = [name for name in names if not _constant_and_common(groups, name)]
    if not names:
        return None
    end = 1.02 * max(each.last_iteration for group in groups.values() for each in group)
    figure, axes = new_figure(len(names), columns=min(3, len(names)), height=2.7)
    for axis, name in zip(axes, names, strict=True):
        for style, (label, seeds) in zip(styles(), groups.items(), strict=False):
            curves = [each.curve(name, "iterations") for each in seeds if name in each.steps]
            draw_curve(axis, curves, label=label, style=style, width=1.4)
        if name in _LOGARITHMIC and axis.lines:
            axis.set_yscale("log")
        few_marks(axis)
        axis.set_title(plain(name), loc="left", fontsize=10, color=INK)
        axis.set_xlabel(COSTS["iterations"])
        axis.set_xlim(0, end)
    _legend(figure, axes[0], every=axes)
    return to_png(figure, "")


def _constant_and_common(groups: Groups, name: str) -> bool:
    """Whether a metric (the global batch size, say) is one number in all runs."""
    if name in _FIRST:
        return False
    values = [each.steps[name] for group in groups.values() for each in group if name in each.steps]
    joined = np.concatenate(values)
    return name == "global batch size" and bool((joined == joined[0]).all())


def smooth(values: Array, span: int = 0) -> Array:
    """Centred running mean over `span` points (0: a twentieth of them); ends use what is there."""
    span = max(1, min(span or len(values) // 20, len(values)))
    total = np.convolve(values, np.ones(span), mode="same")
    return total / np.convolve(np.ones(len(values)), np.ones(span), mode="same")


def draw_curve(
    axis: Axes,
    curves: Sequence[tuple[Array, Array]],
    *,
    label: str,
    style: Style,
    marker: str = "",
    width: float = 2,
) -> None:
    """Mean of several curves on the first one's grid, a band of one deviation, thin single ones."""
    curves = [(x, y) for x, y in curves if len(x)]
    if not curves:
        return
    end = min(x[-1] for x, _ in curves)
    grid = np.unique(np.minimum(curves[0][0], end))  # seeds of one length differ by a few tokens
    stack = np.stack([np.interp(grid, x, y) for x, y in curves])
    mean = stack.mean(axis=0)
    axis.plot(
        grid, mean, color=style.color, ls=style.line, lw=width, marker=marker, ms=4,
        label=_name(label, len(curves)),
    )  # fmt: skip
    if len(curves) > 1:
        spread = stack.std(axis=0, ddof=1)
        axis.fill_between(grid, mean - spread, mean + spread, color=style.color, alpha=0.18, lw=0)
        for x, y in curves:
            axis.plot(x, y, color=style.color, lw=0.6, alpha=0.5)


def _name(label: str, seeds: int) -> str:
    """A label in a legend: not read as a formula, nor left out for an underscore in front."""
    shown = plain(label)
    shown = f" {shown}" if shown.startswith("_") else shown
    return f"{shown} ({seeds} seeds)" if seeds > 1 else shown


def _limit(axis: Axes, losses: Sequence[Array]) -> None:
    """Let the first losses leave at the top, where they would press the rest together."""
    settled = [each[int(_SETTLED * len(each)) :] for each in losses]
    values = np.concatenate([each[np.isfinite(each)] for each in settled] or [np.empty(0)])
    if len(values) < 2 or values.min() == values.max():
        return
    margin = 0.04 * (values.max() - values.min())
    axis.set_ylim(values.min() - margin, values.max() + margin)


def _legend(figure: Any, axis: Axes, *, every: Sequence[Axes] = ()) -> None:
    """One for all panels, above them."""
    handles = {
        line.get_label(): line
        for each in every or (axis,)
        for line in each.lines
        if not str(line.get_label()).startswith("_")
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", ncols=min(4, len(handles)),
        frameon=False, fontsize=10,
    )  # fmt: skip
