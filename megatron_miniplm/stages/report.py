"""``report``: training runs, finished or going on -> one page about them, and PNG files.

Curves, final losses and a scaling law; what `evaluate` found; of every selected subset that a run
was trained on, what was kept and dropped; where everything came from.

Runs with one label are seeds of one method: the table and the curves show their mean and spread.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_miniplm.core.config import write_run
from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import atomic_file, read_json, write_json
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.evaluation.final_losses import final_losses
from megatron_miniplm.evaluation.origins import (
    Selected,
    lineage_of,
    lineage_section,
    selections_of,
)
from megatron_miniplm.evaluation.report import (
    Plot,
    Section,
    Table,
    mean_and_spread,
    render_page,
)
from megatron_miniplm.evaluation.results_tables import evaluated, results_sections
from megatron_miniplm.evaluation.run_curves import (
    LOSS,
    Groups,
    History,
    NothingLoggedError,
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
    scaling_sections,
    student_size,
)
from megatron_miniplm.evaluation.selection_report import examples_section, selection_section
from megatron_miniplm.selection.population import judges, open_population

_BAND = "Where a label has several runs: their mean, and a band of one standard deviation."


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write up training runs as one HTML page: curves, evaluations, selections, lineage."""

    runs: tuple[Path, ...]
    """--save folders of the runs (each holds metrics.jsonl)."""
    labels: tuple[str, ...] = ()
    """Method of each run, in the same order; equal labels are seeds. Default: folder names, with as
    much of their paths as tells runs apart."""
    evaluations: tuple[Path, ...] = ()
    """results.json files of `evaluate`, beside those within the runs' folders. Losses by
    --checkpoints count as validations; models of no run have rows of their own."""
    examples: int = 4
    """Instances to show as text of each selected subset, each of the highest, the lowest and those
    nearest to the threshold; 0: none, and no scores are read."""
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
        places = [folder.resolve() for folder in self.runs]
        for number, folder in enumerate(self.runs):
            if places[number] in places[:number]:
                raise ConfigError(
                    f"--runs has {folder} twice, and it would count as two seeds: give it once"
                )
        if self.examples < 0:
            raise ConfigError(f"--examples {self.examples} must be at least 0")
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
    names = _names(config.runs)
    labels = config.labels or names
    logged = _histories(config, labels)
    runs = list(logged.values())
    sections = [*_curves(runs)]
    if config.scaling.scaling_law:
        sizes = [student_size(folder) for folder in logged]
        laws, facts = scaling_sections(curves_of(runs, sizes, config.scaling), config.scaling)
        write_json(config.output / "scaling_law.json", facts)
        sections += laws
    sections += results_sections(evaluated(config.runs, labels, config.evaluations))
    lineages = [lineage_of(folder) for folder in config.runs]
    sections += _selections(selections_of(lineages), config.examples)
    sections += [lineage_section(names, lineages), _sources(config.runs, labels, logged)]
    pictures = {f"{each.name}.png": each.png for section in sections for each in section.plots}
    _begin(config, [*pictures, *(["scaling_law.json"] if config.scaling.scaling_law else [])])
    for name, png in pictures.items():
        with atomic_file(config.output / name) as file:
            file.write(png)
    with atomic_file(page) as file:
        file.write(render_page(config.title, sections).encode())
    get_logger().info("wrote %s", page)


def _begin(config: Config, files: Sequence[str]) -> None:
    """Write run.json with the `files` beside the page, and remove others of an earlier report."""
    path = config.output / "run.json"
    earlier = read_json(path).get("files", ()) if path.exists() else ()
    write_run(path, "report", config, files=files)
    for name in set(earlier) - set(files):
        (config.output / Path(name).name).unlink(missing_ok=True)


def _names(folders: Sequence[Path]) -> list[str]:
    """What to call each: the shortest end of its path that no other one has."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    return [
        next("/".join(own[-n:]) for n in range(1, len(own) + 1)
             if sum(own[-n:] == other[-n:] for other in paths) == 1)
        for own in paths
    ]  # fmt: skip


def _histories(config: Config, labels: Sequence[str]) -> dict[Path, History]:
    """Of the runs that have logged something; refuses to have none."""
    found, nothing = {}, []
    for folder, label in zip(config.runs, labels, strict=True):
        try:
            history = read_history(folder, label)
        except NothingLoggedError as error:
            nothing.append(str(error))
        else:
            found[folder] = with_evaluations(history, folder, config.evaluations)
    if not found:
        raise DataError("\n".join(nothing))
    return found


def _curves(runs: Sequence[History]) -> Iterator[Section]:
    """A card for each kind of picture that there is."""
    for number, loss in enumerate(dict.fromkeys(each.loss for each in runs)):
        alike = grouped([each for each in runs if each.loss == loss])
        plot = Plot(
            name=f"curves_{number + 1}" if number else "curves", png=training_loss(alike),
            wide=True,
            caption="By updates, tokens, compute and time: as logged (faint) and its running mean "
            "over a twentieth of the run; the first losses leave the panels at the top. Compute "
            "and time are of all devices; compute counts a teacher's forward pass, time counts "
            f"updates only. {_BAND}",
        )  # fmt: skip
        title = "Training loss" if loss == LOSS else f"Training: {loss}"
        yield Section(title=title, table=_table(alike), plots=[plot])
    groups = grouped(runs)
    plots = []
    if (png := validation_losses(groups)) is not None:
        caption = f"Losses on held-out data. {_BAND}"
        plots.append(Plot(name="validation", png=png, caption=caption, wide=True))
    if (png := final_losses(groups)) is not None:
        caption = "The last ones, best on top; a bar spans the seeds."
        plots.append(Plot(name="final", png=png, caption=caption))
    if plots:
        yield Section(title="Validation", plots=plots)
    if (png := other_metrics(groups)) is not None:
        plot = Plot(name="metrics", png=png, caption=f"As logged. {_BAND}", wide=True)
        yield Section(title="Everything else", plots=[plot])


def _selections(subsets: Sequence[Selected], count: int) -> Iterator[Section]:
    """What was kept for each subset, and `count` instances of each kind as text."""
    for number, subset in enumerate(subsets, 1):
        name = subset.prefix.name
        yield selection_section(subset.facts, f"What was kept: {name}", name=f"selection_{number}")
        folders = judges(subset.manifest, subset.manifest_path)
        if count == 0 or not any(folders.values()):
            continue
        title = f"Kept and dropped text: {name}"
        try:
            corpus = Corpus.open(subset.prefix)
            population = open_population(corpus, folders, seed=subset.facts["seed"])
            yield examples_section(population, title, count=count)
        except (DataError, LineageError) as error:  # curves are worth a page without its pool
            yield Section(title=title, text=f"It cannot be shown: {error}")


def _table(groups: Groups) -> Table:
    """Last training and validation losses by label."""
    validated = list(
        dict.fromkeys(n for group in groups.values() for each in group for n in each.validations)
    )
    rows = []
    for label, seeds in groups.items():
        last = [_end(each) for each in seeds]
        cells = [label, f"{np.mean([r.steps['consumed_tokens'][-1] for r in seeds]):,.0f}"]
        cells.append(mean_and_spread(last))
        for name in validated:
            found = [float(r.validations[name][1][-1]) for r in seeds if name in r.validations]
            cells.append(mean_and_spread(found) if found else "not measured")
        rows.append(tuple(cells))
    header = ["run", "tokens", "training loss (last 5 %)", *(f"held out: {n}" for n in validated)]
    return Table(header=header, rows=rows)


def _end(run: History) -> float:
    _, losses = run.curve(run.loss, "iterations")
    return float(losses[-max(1, len(losses) // 20) :].mean())


def _sources(
    folders: Sequence[Path], labels: Sequence[str], logged: Mapping[Path, History]
) -> Section:
    rows = [
        (label, str(folder),
         f"{logged[folder].last_iteration:,}" if folder in logged else "nothing logged yet")
        for label, folder in zip(labels, folders, strict=True)
    ]  # fmt: skip
    return Section(title="Runs", table=Table(header=("label", "folder", "iterations"), rows=rows))
