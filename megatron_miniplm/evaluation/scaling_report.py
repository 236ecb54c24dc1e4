"""Scaling laws of training runs: from their logged losses to a table, a plot and JSON.

A curve is the runs of one label and one student size. It is fitted by Eq. 16 of `scaling_law` over
training compute, C = 6 N D, times what a teacher and sampling in the step add to it, counted as
`pretrain --align-flops-to` does; labels with three sizes or more also by Eq. 15. Losses at D tokens
are those at C = 6 N D, so all methods are compared at equal training FLOPs: beside a teacher that
is fewer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.evaluation.figures import Style, new_figure, plain, styles, to_png
from megatron_miniplm.evaluation.report import Plot, Section, Table
from megatron_miniplm.evaluation.run_curves import (
    TRAINING,
    Array,
    History,
    training_flops,
    validation,
)
from megatron_miniplm.evaluation.scaling_law import (
    Fit,
    Law,
    compute_ratio,
    fit,
    unique_tokens,
)
from megatron_miniplm.models.checkpoint import latest_checkpoint, read_trained_model
from megatron_miniplm.models.flops import count_parameters

if TYPE_CHECKING:
    from megatron_miniplm.evaluation.figures import Axes

_RESAMPLES = 200
_BLOCK = 3
"""Neighbouring validations of a run whose errors are redrawn together."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Fit of a scaling law to the validations of the runs."""

    scaling_law: bool = False
    """Fit loss = limit + A / compute^alpha to every label, say what it is at more tokens, and how
    much less compute each label takes than the first."""
    scaling_loss: str = "lm loss"
    """Name of the validation to fit, as metrics.jsonl has it."""
    scaling_points: Literal["all", "final"] = "all"
    """Every validation, or the last one of each run (a run's earlier ones are not annealed: they
    lie above what a shorter run would reach)."""
    scaling_skip: float = 0.05
    """Share of a run, from its beginning, whose validations are left out (warm-up)."""
    scaling_tokens: tuple[float, ...] = (1e12, 1e13)
    """Tokens to extrapolate to."""
    scaling_repeats: float = 1
    """Times that a token may be trained on and count as new, for the data that the first label
    would need: the paper takes 4."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not self.scaling_law and value != item.default:
                flag = item.name.replace("_", "-")
                raise ConfigError(f"--{flag} {value} has no effect without --scaling-law")
        if not 0 <= self.scaling_skip < 1:
            raise ConfigError(f"--scaling-skip {self.scaling_skip} must be at least 0 and below 1")
        for name in ("scaling_tokens", "scaling_repeats"):
            value = getattr(self, name)
            if not all(each > 0 for each in (value if isinstance(value, tuple) else (value,))):
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be above 0")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What is fitted: losses of one label and size at what they cost, in order of cost."""

    label: str
    parameters: int
    flops: Array
    loss: Array
    runs: int
    """Whose points these are."""

    @property
    def name(self) -> str:
        """For tables and legends."""
        return f"{self.label}, {self.parameters / 1e6:,.4g} M"

    def flops_of(self, tokens: float) -> float:
        """Of training without a teacher on so many tokens."""
        return TRAINING * self.parameters * tokens


def student_size(save: Path) -> int:
    """Parameters of the model in the latest checkpoint of a run."""
    folder = latest_checkpoint(save)
    if folder is None:
        raise DataError(f"--scaling-law needs the size of the model, but {save} has no checkpoint")
    return count_parameters(read_trained_model(folder)[1].config)


def curves_of(runs: Sequence[History], sizes: Sequence[int], config: ScalingConfig) -> list[Curve]:
    """The curves of runs with so many parameters each; refuses runs without that validation."""
    groups: dict[tuple[str, int], list[History]] = {}
    for run, size in zip(runs, sizes, strict=True):
        groups.setdefault((run.label, size), []).append(run)
    curves = []
    for (label, size), seeds in groups.items():
        points = [_points(each, size, config) for each in seeds]
        flops, loss = (np.concatenate(column) for column in zip(*points, strict=True))
        order = np.argsort(flops, kind="stable")
        curves.append(Curve(label=label, parameters=size, flops=flops[order], loss=loss[order],
                            runs=len(seeds)))  # fmt: skip
    return curves


def _points(run: History, size: int, config: ScalingConfig) -> tuple[Array, Array]:
    """(FLOPs, losses) of a run's validations that count."""
    if config.scaling_loss not in run.validations:
        known = ", ".join(run.validations) or "none"
        raise DataError(
            f"{run.label} has no validation {config.scaling_loss!r} (it has: {known}): train with "
            "--valid-data-path, give report --evaluations, or pass --scaling-loss"
        )
    millions, losses = validation(run, config.scaling_loss)
    flops = training_flops(run, size, millions)
    first = config.scaling_skip * run.costs["tokens"][-1]
    counts = millions >= first if config.scaling_points == "all" else slice(-1, None)
    return flops[counts], losses[counts]


def scaling_sections(
    curves: Sequence[Curve], config: ScalingConfig
) -> tuple[list[Section], dict[str, Any]]:
    """The cards of a page, and the same numbers for machines."""
    fits = [
        fit(
            curve.flops, curve.loss, resamples=_RESAMPLES, seed=number, block=_block(curve, config)
        )
        for number, curve in enumerate(curves)
    ]  # fmt: skip
    over_sizes = _over_sizes(curves, config)
    facts = {
        "loss": config.scaling_loss,
        "curves": [
            _facts(curve, found, config, *_first_of_size(curve, curves, fits))
            for curve, found in zip(curves, fits, strict=True)
        ],
        "of size and tokens": over_sizes,
    }
    caption = (
        f"Validations ({config.scaling_loss}), the fitted laws, and their 95 % intervals under "
        "noise. That the law holds beyond the points is an assumption; intervals do not cover it."
    )
    of_compute = Section(
        title="Scaling law",
        text="Loss = limit + A / compute^alpha, fitted by the Huber loss of log loss. Columns of "
        "tokens are at the training FLOPs of so many tokens without a teacher.",
        table=_table(facts, config),
        plots=[
            Plot(png=_plot(curves, fits, config), caption=caption, wide=True, name="scaling_law")
        ],
    )
    return [of_compute, *_size_section(over_sizes)], facts


def _block(curve: Curve, config: ScalingConfig) -> int:
    """Points of a curve, in order of cost, that hold neighbours of each of its runs."""
    return _BLOCK * curve.runs if config.scaling_points == "all" else 1


def _first_of_size(curve: Curve, curves: Sequence[Curve], fits: Sequence[Fit]) -> tuple[Curve, Fit]:
    """What a curve is compared with: the first one of its size."""
    at = next(at for at, each in enumerate(curves) if each.parameters == curve.parameters)
    return curves[at], fits[at]


def _facts(
    curve: Curve, found: Fit, config: ScalingConfig, base: Curve, base_fit: Fit
) -> dict[str, Any]:
    """Constants, extrapolations and comparisons of one curve."""
    end, base_end = float(curve.flops[-1]), float(base.flops[-1])
    reached = found.law.loss(end)
    needed = unique_tokens(base_fit.law, reached, repeats=config.scaling_repeats)
    return {
        "label": curve.label, "parameters": curve.parameters, "points": len(curve.loss),
        "limit": found.law.limit, "limit_interval": found.interval(lambda law: law.limit),
        "amplitude": found.law.terms[0].amplitude,
        "exponent": found.law.terms[0].exponent,
        "exponent_interval": found.interval(lambda law: law.terms[0].exponent),
        "largest_error": float(np.abs(np.expm1(found.residuals) * curve.loss).max()),
        "losses": [
            {"tokens": tokens, "flops": flops, "loss": found.law.loss(flops),
             "interval": found.interval(lambda law, at=flops: law.loss(at))}  # type: ignore[misc]
            for tokens in config.scaling_tokens
            for flops in (curve.flops_of(tokens),)
        ],
        "compared_with": base.label,
        "times_less_compute": _finite(compute_ratio(found.law, base_fit.law, at=base_end)),
        "times_less_compute_interval": [
            _finite(end)
            for end in found.interval_beside(
                base_fit, lambda law, other: compute_ratio(law, other, at=base_end)
            )
        ],
        "unique_tokens_of_the_other": _finite(needed / curve.flops_of(1)),
    }  # fmt: skip


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _over_sizes(curves: Sequence[Curve], config: ScalingConfig) -> dict[str, Any]:
    """Label -> Eq. 15, where a label has sizes enough; tokens are those of plain training."""
    found = {}
    for label in dict.fromkeys(curve.label for curve in curves):
        mine = [curve for curve in curves if curve.label == label]
        if len(mine) < 3:
            continue
        at = np.concatenate([
            np.column_stack([np.full(len(c.loss), c.parameters), c.flops / c.flops_of(1)])
            for c in mine
        ])  # fmt: skip
        over = fit(
            at, np.concatenate([curve.loss for curve in mine]), resamples=_RESAMPLES,
            block=max(_block(curve, config) for curve in mine),
        )  # fmt: skip
        size, tokens = over.law.terms
        found[label] = {
            "limit": over.law.limit, "limit_interval": over.interval(lambda law: law.limit),
            "amplitude_size": size.amplitude, "exponent_size": size.exponent,
            "exponent_size_interval": over.interval(lambda law: law.terms[0].exponent),
            "amplitude_tokens": tokens.amplitude, "exponent_tokens": tokens.exponent,
            "exponent_tokens_interval": over.interval(lambda law: law.terms[1].exponent),
        }  # fmt: skip
    return found


def _table(facts: Mapping[str, Any], config: ScalingConfig) -> Table:
    header = ["curve", "points", "limit", "alpha"]
    header += [f"loss at {tokens:.3g} tokens" for tokens in config.scaling_tokens]
    header += ["compute to where the first of its size gets", "tokens that one would need"]
    rows = []
    for each in facts["curves"]:
        cells = [f"{each['label']}, {each['parameters'] / 1e6:,.4g} M", str(each["points"])]
        cells.append(_with_interval(each["limit"], each["limit_interval"]))
        cells.append(_with_interval(each["exponent"], each["exponent_interval"]))
        cells += [_with_interval(at["loss"], at["interval"]) for at in each["losses"]]
        ratio, needed = each["times_less_compute"], each["unique_tokens_of_the_other"]
        low, high = map(_times_less, each["times_less_compute_interval"])
        cells.append(f"{_times_less(ratio)} ({low} to {high})")
        cells.append("more than there can be" if needed is None else f"{needed:.3g}")
        rows.append(cells)
    return Table(header=header, rows=rows)


def _times_less(ratio: float | None) -> str:
    if ratio is None:
        return "always below it"
    if ratio == 0:
        return "never gets there"
    times, what = (ratio, "less") if ratio >= 0.995 else (1 / ratio, "more")
    return f"{times:.2f}x {what}" if times < 1000 else f"over 1,000x {what}"


def _size_section(laws: Mapping[str, Mapping[str, Any]]) -> Iterator[Section]:
    """Eq. 15 of the labels that have it, if any has."""
    if not laws:
        return
    columns = {"limit": "limit", "alpha of size": "exponent_size",
               "alpha of tokens": "exponent_tokens"}  # fmt: skip
    rows = [
        [label, *(_with_interval(law[key], law[f"{key}_interval"]) for key in columns.values())]
        for label, law in laws.items()
    ]
    yield Section(
        title="Scaling law of size and tokens",
        text="Loss = limit + A / parameters^alpha + B / tokens^alpha, over all sizes of a label. "
        "Tokens are those that plain training sees at the same FLOPs: more than a run beside a "
        "teacher saw.",
        table=Table(header=["label", *columns], rows=rows),
    )


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _plot(curves: Sequence[Curve], fits: Sequence[Fit], config: ScalingConfig) -> bytes:
    figure, (axis,) = new_figure(1, columns=1, height=4.6)
    for style, curve, found in zip(styles(), curves, fits, strict=False):
        _draw(axis, curve, found, max(map(curve.flops_of, config.scaling_tokens)), style)
    axis.set_xscale("log")
    axis.set_xlabel("training FLOPs: 6 N D, and a teacher's")
    axis.set_ylabel(f"{plain(config.scaling_loss)} (nats per token)")
    axis.legend(frameon=False)
    return to_png(figure, "")


def _draw(axis: Axes, curve: Curve, found: Fit, end: float, style: Style) -> None:
    """Points, the law over them, and dashed beyond them with a band of its intervals."""
    last = float(curve.flops[-1])
    seen = np.geomspace(curve.flops[0], last, 60)
    beyond = np.geomspace(last, max(end, last), 60)
    axis.plot(curve.flops, curve.loss, style.marker, ms=3, color=style.color, alpha=0.6)
    name = f" {curve.name}" if curve.name.startswith("_") else curve.name
    axis.plot(
        seen, _along(found.law, seen), color=style.color, ls=style.line, lw=2, label=plain(name)
    )
    axis.plot(beyond, _along(found.law, beyond), color=style.color, lw=1.4, ls="--")
    every = np.stack([_along(law, beyond) for law in found.resampled])
    low, high = np.quantile(every, [0.025, 0.975], axis=0)
    axis.fill_between(beyond, low, high, color=style.color, alpha=0.15, lw=0)


def _along(law: Law, at: Array) -> Array:
    return np.array([law.loss(float(x)) for x in at])
