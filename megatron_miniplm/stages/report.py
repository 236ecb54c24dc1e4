"""``report``: training runs -> one page with their curves, and the curves as a PNG.

Runs with one label are seeds of one method: the table and the curves show their mean and spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_miniplm.core.config import write_run
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import atomic_file
from megatron_miniplm.evaluation.report import (
    Plot,
    Run,
    Section,
    Table,
    by_label,
    loss_curves,
    mean_and_spread,
    read_run,
    render_page,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Plot the loss curves of training runs and write them up as one HTML page."""

    runs: tuple[Path, ...]
    """--save folders of the runs (each holds metrics.jsonl)."""
    labels: tuple[str, ...] = ()
    """Method of each run, in the same order; equal labels are seeds. Default: folder names."""
    title: str = "Training runs"
    """Heading of the page."""
    output: Path
    """Folder for report.html, curves.png and run.json."""
    overwrite: bool = False
    """Replace the report that is there."""

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
    runs = [read_run(folder, label) for folder, label in zip(config.runs, labels, strict=True)]
    curves = loss_curves(runs)
    caption = "Left: training loss (running mean). The band is one standard deviation over seeds."
    section = Section(
        title="Loss", table=_table(runs), plots=[Plot(png=curves, caption=caption, wide=True)]
    )  # fmt: skip
    sources = Section(title="Runs", table=_sources(config.runs, labels))
    with atomic_file(config.output / "curves.png") as file:
        file.write(curves)
    write_run(config.output / "run.json", "report", config)
    with atomic_file(page) as file:
        file.write(render_page(config.title, [section, sources]).encode())
    get_logger().info("wrote %s", page)


def _table(runs: Sequence[Run]) -> Table:
    """Last training and validation losses by label."""
    rows = []
    for label, seeds in by_label(runs).items():
        validations = [float(r.validation_loss[-1]) for r in seeds if r.validation_loss.size]
        last = [float(np.mean(r.loss[-max(1, len(r.loss) // 20) :])) for r in seeds]
        rows.append(
            (
                label,
                f"{np.mean([r.tokens[-1] for r in seeds]):,.0f}",
                mean_and_spread(last),
                mean_and_spread(validations) if validations else "not measured",
            )
        )
    header = ("run", "tokens", "training loss (last 5 %)", "last validation loss")
    return Table(header=header, rows=rows)


def _sources(folders: Sequence[Path], labels: Sequence[str]) -> Table:
    rows = [(label, str(folder)) for label, folder in zip(labels, folders, strict=True)]
    return Table(header=("label", "folder"), rows=rows)
