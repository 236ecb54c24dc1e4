"""What `evaluate` found for runs, from its results.json files: tasks and held-out losses as tables.

A result belongs to the run whose checkpoint has the fingerprint of its model, or lies where its
model lay: runs may be moved, and checkpoints deleted. Of several checkpoints of a run, the newest
counts, and of one's results those over the most examples. A column is of the same examples in all
rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.core.manifest import read_json
from megatron_miniplm.evaluation.origins import models_of
from megatron_miniplm.evaluation.report import Section, Table, mean_and_spread

Facts = Mapping[str, Any]
_NONE = "not measured"


class Measure(NamedTuple):
    """What a column is of."""

    name: str
    """Of a task or a held-out set."""
    examples: str
    """Hash of the file, or fingerprint of the corpus."""
    number: int
    """How many of them, from the first."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One model."""

    label: str
    """Method; models with one label are its seeds."""
    tasks: Mapping[Measure, Facts]
    """What results.json says of each."""
    losses: Mapping[Measure, Facts]
    """The same of held-out sets."""


def evaluated(
    saves: Sequence[Path], labels: Sequence[str], given: Sequence[Path]
) -> list[Evaluated]:
    """What is known of each run, from the files (or folders) `given` and those in its own folder.

    Models of no run stand on their own, after the runs; curves of other runs are left aside, as
    they are among the validations.
    """
    models: list[Facts] = []
    strangers: dict[int, Facts] = {}
    for path in given:
        file = path / "results.json" if path.is_dir() else path
        results = read_json(file)
        models += (found := _models(results))
        if not found:
            raise DataError(f"{file} says nothing of a model: make it by `evaluate --output`")
        if "curves" not in results:
            strangers[id(results)] = results
    rows = []
    for save, label in zip(saves, labels, strict=True):
        files = sorted({*save.glob("results.json"), *save.glob("*/results.json")})
        inside = [each for file in files for each in _models(read_json(file))]
        is_own = models_of(save)
        own = [each for each in (*inside, *models) if is_own(each["model"])]
        rows.append(_merged(label, own))
        for each in own:
            strangers.pop(id(each), None)
    return [*rows, *(_merged(_name(each), [each]) for each in strangers.values())]


def _models(results: Facts) -> list[Facts]:
    """What results.json says of each model: one, or the checkpoints of some runs."""
    if "curves" in results:
        return [point for curve in results["curves"] for point in curve["points"]]
    return [results] if "model" in results else []


def _iteration(found: Facts) -> int:
    number = re.fullmatch(r"iter_(\d+)", Path(found["model"]["path"]).name)
    return int(number[1]) if number else 0


def _name(found: Facts) -> str:
    path = Path(found["model"]["path"])
    return path.parent.name if path.name.startswith("iter_") else path.name


def _merged(label: str, found: Sequence[Facts]) -> Evaluated:
    def chosen(what: str, measure: Callable[[str, Facts], Measure]) -> dict[Measure, Facts]:
        every = [
            (_iteration(each), measure(name, facts), facts)
            for each in found for name, facts in each.get(what, {}).items()
        ]  # fmt: skip
        newest = max((at for at, *_ in every), default=0)  # a row is of one checkpoint
        # An export has no iteration: it counts where the newest checkpoint says nothing.
        counted = [each for each in every if each[0] in (0, newest)]
        counted.sort(key=lambda item: (item[0], item[1].number))
        return dict({column.name: (column, facts) for _, column, facts in counted}.values())

    return Evaluated(
        label=label,
        tasks=chosen("tasks", lambda n, f: Measure(n, f["data"]["hash"], f["examples"])),
        losses=chosen("lm_loss", lambda n, f: Measure(n, f["corpus"], f["num_instances"])),
    )


def results_sections(models: Sequence[Evaluated]) -> list[Section]:
    """A card for tasks and one for held-out losses, where any model has some."""
    groups: dict[str, list[Evaluated]] = {}
    for each in models:
        groups.setdefault(each.label, []).append(each)
    sections = []
    if (table := _tasks(groups)).rows:
        text = (
            "Share of examples that are right. Behind ±: of one model its standard error over the "
            "examples, of several seeds their standard deviation. The mean is that of the tasks, "
            "without weights."
        )
        sections.append(Section(title="Zero-shot tasks", text=text, table=table))
    if (table := _losses(groups)).rows:
        sections.append(Section(title="Losses by evaluate", table=table))
    return sections


Groups = Mapping[str, Sequence[Evaluated]]


def _titles(titles: Mapping[Measure, str]) -> list[str]:
    """Those of columns, which say of what they are where several are of one name."""
    names = [measure.name for measure in titles]
    return [
        title if names.count(each.name) == 1 else f"{title}, {each.number:,} of {each.examples[:8]}"
        for each, title in titles.items()
    ]


def _tasks(groups: Groups) -> Table:
    columns = {
        name: f"{facts['label']} ({facts['metric']})"
        for seeds in groups.values() for each in seeds for name, facts in each.tasks.items()
    }  # fmt: skip
    rows = []
    for label, seeds in groups.items():
        found = [[each.tasks[name] for each in seeds if name in each.tasks] for name in columns]
        if not any(found):
            continue
        whole = [
            float(np.mean([facts["value"] for facts in each.tasks.values()]))
            for each in seeds if each.tasks.keys() == columns.keys()
        ]  # fmt: skip
        mean = mean_and_spread(whole, digits=3) if whole else "of other tasks"
        rows.append([label, *map(_accuracy, found), mean])
    return Table(header=["model", *_titles(columns), "mean"], rows=rows)


def _accuracy(found: Sequence[Facts]) -> str:
    if len(found) == 1 and (error := found[0]["stderr"]) is not None:
        return f"{found[0]['value']:.3f} ± {error:.3f}"
    return mean_and_spread([each["value"] for each in found], digits=3) if found else _NONE


def _losses(groups: Groups) -> Table:
    names = list(
        dict.fromkeys(n for seeds in groups.values() for each in seeds for n in each.losses)
    )
    rows = []
    for label, seeds in groups.items():
        cells = [label]
        for name in names:
            found = [each.losses[name] for each in seeds if name in each.losses]
            for what in ("instance_mean", "bits_per_byte"):
                values = [each[what] for each in found if each.get(what) is not None]
                cells.append(mean_and_spread(values) if values else _NONE)
        if any(each.losses for each in seeds):
            rows.append(cells)
    titles = _titles({measure: measure.name for measure in names})
    header = [cell for title in titles for cell in (f"{title}: nats per token", "bits per byte")]
    return Table(header=["model", *header], rows=rows)
