"""``report``: training runs, finished or going on -> one page with their curves, and PNG files.

Runs with one label are seeds of one method: the table and the curves show their mean and spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_miniplm.core.config import write_run
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import atomic_file, write_json
from megatron_miniplm.evaluation.final_losses import final_losses
from megatron_miniplm.evaluation.report import (
    Array,
    Plot,
    Section,
    Table,
    mean_and_spread,
    render_page,
)
from megatron_miniplm.evaluation.run_curves import (
    LOSS,
    Groups,
    History,
    grouped,
    other_metrics,
    read_history,
    training_loss,
    validation_losses,
    with_evaluations,
)
from megatron_miniplm.evaluation.scaling_report import (
    ScalingConfig,
    curves_of,
    scaling_section,
    student_size,
)

_BAND = "Where a label has several runs: their mean, and a band of one standard deviation."


@dataclass(frozen=True, kw_only=True)
class Config:
    """Draw what training runs logged, on common axes, and write it up as one HTML page."""

    runs: tuple[Path, ...]
    """--save folders of the runs (each holds metrics.jsonl)."""
    labels: tuple[str, ...] = ()
    """Method of each run, in the same order; equal labels are seeds. Default: folder names."""
    evaluations: tuple[Path, ...] = ()
    """results.json of `evaluate --checkpoints` over these runs: its losses count as validations."""
    title: str = "Training runs"
    """Heading of the page."""
    output: Path
    """Folder for report.html, its pictures as PNG files and run.json."""
    overwrite: bool = False
    """Replace the report that is there."""
    scaling: ScalingConfig = field(default_factory=ScalingConfig)

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("--runs needs at least one --save folder")
        if self.labels and len(self.labels) != len(self.runs):
            raise ConfigError(
                f"--labels names {len(self.labels)} runs but --runs has {len(self.runs)}; "
                "give one label for every run, or none"
            )


def run(config: Config) -> None:
    """Write the report; refuses runs without metrics and an output that is already there."""
    page = config.output / "report.html"
    if page.exists() and not config.overwrite:
        raise ConfigError(f"{page} is already there: pass --overwrite, or another --output")
    labels = config.labels or tuple(folder.name for folder in config.runs)
    runs = [
        with_evaluations(read_history(folder, label), folder, config.evaluations)
        for folder, label in zip(config.runs, labels, strict=True)
    ]
    groups = grouped(runs)
    pictures = {
        "curves.png": training_loss(groups),
        "validation.png": validation_losses(groups),
        "final.png": final_losses(groups),
        "metrics.png": other_metrics(groups),
    }
    sections = _sections(groups, pictures)
    if config.scaling.scaling_law:
        sizes = [student_size(folder) for folder in config.runs]
        curves = curves_of(runs, sizes, config.scaling)
        section, pictures["scaling_law.png"], facts = scaling_section(curves, config.scaling)
        write_json(config.output / "scaling_law.json", facts)
        sections.append(section)
    for name, png in pictures.items():
        if png is not None:
            with atomic_file(config.output / name) as file:
                file.write(png)
    write_run(config.output / "run.json", "report", config)
    with atomic_file(page) as file:
        sections.append(_sources(config.runs, runs))
        file.write(render_page(config.title, sections).encode())
    get_logger().info("wrote %s", page)


def _sections(groups: Groups, pictures: Mapping[str, bytes | None]) -> list[Section]:
    """A card for each picture that there is."""
    captions = {
        "curves.png": (
            "Training loss",
            "By updates, tokens, compute and time: as logged (faint) and its running mean over a "
            "twentieth of the run; the first losses leave the panels at the top. Compute counts a "
            f"teacher's forward pass, time counts updates only. {_BAND}",
        ),
        "validation.png": ("Validation", f"Losses on held-out data. {_BAND}"),
        "metrics.png": ("Everything else", f"As logged. {_BAND}"),
    }
    sections: list[Section] = []
    for name, (title, caption) in captions.items():
        if (png := pictures[name]) is not None:
            table = _table(groups) if not sections else None
            plot = Plot(png=png, caption=caption, wide=True)
            sections.append(Section(title=title, table=table, plots=[plot]))
    return sections


def _table(groups: Groups) -> Table:
    """Last training and validation losses by label."""
    validated = list(
        dict.fromkeys(n for group in groups.values() for each in group for n in each.validations)
    )
    rows = []
    for label, seeds in groups.items():
        last = [_end(each.steps[LOSS]) for each in seeds]
        cells = [label, f"{np.mean([r.steps['consumed_tokens'][-1] for r in seeds]):,.0f}"]
        cells.append(mean_and_spread(last))
        for name in validated:
            found = [float(r.validations[name][1][-1]) for r in seeds if name in r.validations]
            cells.append(mean_and_spread(found) if found else "not measured")
        rows.append(tuple(cells))
    header = ["run", "tokens", "training loss (last 5 %)", *(f"held out: {n}" for n in validated)]
    return Table(header=header, rows=rows)


def _end(losses: Array) -> float:
    return float(np.nanmean(losses[-max(1, len(losses) // 20) :]))


def _sources(folders: Sequence[Path], runs: Sequence[History]) -> Section:
    rows = [
        (run.label, str(folder), f"{run.last_iteration:,}")
        for run, folder in zip(runs, folders, strict=True)
    ]
    return Section(title="Runs", table=Table(header=("label", "folder", "iterations"), rows=rows))
