"""What the quickstart found, from its artifacts: report.json, report.html, a table.

Nothing is kept between the run and its report but the artifacts, so a report can be made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as TextTable
from scipy import stats

from megatron_miniplm.core.manifest import atomic_file, provenance, read_json, write_json
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.evaluation import report
from megatron_miniplm.evaluation.run_curves import (
    History,
    grouped,
    read_history,
    training_loss,
    validation_losses,
)
from megatron_miniplm.evaluation.selection_report import examples_section, selection_section
from megatron_miniplm.selection.population import judges, open_population


@dataclass(frozen=True)
class Method:
    """How a student is trained."""

    label: str
    corpus: str
    """Half of the pool that it sees."""
    with_teacher: bool = False
    """Whether the teacher is in its training step (Vanilla KD)."""


METHODS = {
    "miniplm": Method("MiniPLM", "miniplm"),
    "miniplm-kd": Method("MiniPLM + Vanilla KD", "miniplm", with_teacher=True),
    "kd": Method("Vanilla KD", "random", with_teacher=True),
    "random": Method("random selection", "random"),
}
SUBSETS = ("miniplm", "random")
BASELINE = "random"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where the artifacts of one quickstart are, and what was asked for."""

    root: Path
    seeds: int
    settings: Mapping[str, Any]
    """Everything that was chosen: flags, shapes of the roles, precision."""

    def save(self, name: str) -> Path:
        """Folder of the training run of that name."""
        return self.root / name.replace(" ", "-")

    def students(self, method: str) -> list[Path]:
        """Folders of the students of one method, by seed."""
        return [self.save(f"student {method} {seed}") for seed in range(1, self.seeds + 1)]

    def runs(self, method: str) -> list[History]:
        """Training curves of the students of one method."""
        return [read_history(folder, METHODS[method].label) for folder in self.students(method)]

    def corpus(self, name: str) -> Corpus:
        """One corpus or subset."""
        return Corpus.open(self.root / "data" / name)


def write_report(study: Study, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Write report.json and report.html; returns what is in report.json."""
    found = results(study, seconds)
    write_json(study.root / "report.json", found)
    chosen = study.corpus("miniplm")
    facts = chosen.manifest.content["selection"]
    folders = judges(chosen.manifest, chosen.manifest_path)
    population = open_population(chosen, folders, seed=facts["seed"])
    page = report.render_page(
        "MiniPLM on the Python standard library",
        [
            _losses(study, found),
            selection_section(facts, "What difference sampling kept"),
            examples_section(population, "Kept and dropped text", count=4),
            _time(found),
        ],
        lead=verdict(found["heldout_loss"]),
        facts=_facts(found),
    )
    with atomic_file(study.root / "report.html") as file:
        file.write(page.encode())
    return found


def results(study: Study, seconds: Mapping[str, float]) -> dict[str, Any]:
    """All numbers of the run: what report.json holds. Losses are nats per token."""
    heldout = {method: [_evaluated(save) for save in study.students(method)] for method in METHODS}
    tokens = {
        method: [int(run.steps["consumed_tokens"][-1]) for run in study.runs(method)]
        for method in METHODS
    }
    return {
        "heldout_loss": {m: [row["instance_mean"] for row in rows] for m, rows in heldout.items()},
        "train_tokens": tokens,
        "kept_fraction": len(study.corpus("miniplm")) / len(study.corpus("pool")),
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "heldout": heldout,
        "settings": study.settings,
        **provenance(),
    }


def verdict(losses: Mapping[str, Sequence[float]]) -> str:
    """Which students did better on held-out text than those of the baseline, if the seeds can tell.

    Students of one seed start from the same weights, so methods are compared seed by seed: mean of
    the differences, and Student's 95 % interval for it.
    """
    known = [method for method in METHODS if method in losses]
    said = ", ".join(f"{METHODS[m].label} {report.mean_and_spread(losses[m])}" for m in known)
    lead = f"Held-out loss of students of equal compute (nats per token, mean ± sd): {said}."
    return " ".join([lead, *(_compared(method, losses) for method in known if method != BASELINE)])


def _compared(method: str, losses: Mapping[str, Sequence[float]]) -> str:
    """One method against the baseline."""
    label, baseline = METHODS[method].label, METHODS[BASELINE].label
    gaps = np.subtract(losses[BASELINE], losses[method])
    if len(gaps) < 2:
        return (
            f"{baseline.capitalize()} minus {label} is {gaps[0]:+.4f}; one seed cannot say which "
            "is better."
        )
    gap, error = float(gaps.mean()), float(gaps.std(ddof=1) / np.sqrt(len(gaps)))
    reach = float(stats.t.ppf(0.975, len(gaps) - 1)) * error
    said = (
        f"{baseline.capitalize()} minus {label}, seed by seed: "
        f"{', '.join(f'{x:+.4f}' for x in gaps)}; mean {gap:+.4f}, 95 % interval "
        f"{gap - reach:+.4f} to {gap + reach:+.4f}."
    )
    if abs(gap) <= reach:
        return f"{said} {len(gaps)} seeds do not tell the two apart."
    return f"{said} {label if gap > 0 else baseline} is better."


def print_table(found: Mapping[str, Any], console: Console) -> None:
    """The result, for people at a terminal."""
    table = TextTable(title="held-out loss, nats per token")
    for name in ("students", "mean ± sd", "each seed"):
        table.add_column(name)
    for method, how in METHODS.items():
        losses = found["heldout_loss"][method]
        table.add_row(
            how.label, report.mean_and_spread(losses), " ".join(f"{x:.4f}" for x in losses)
        )
    console.print(table)
    console.print(verdict(found["heldout_loss"]))


def _evaluated(save: Path) -> dict[str, Any]:
    """What `evaluate` found for one student on the held-out corpus."""
    (row,) = read_json(save / "heldout/results.json")["lm_loss"].values()
    return row


def _losses(study: Study, found: Mapping[str, Any]) -> report.Section:
    rows = [
        (
            METHODS[method].label,
            report.mean_and_spread(found["heldout_loss"][method]),
            f"{np.mean([row['bits_per_byte'] for row in found['heldout'][method]]):.4f}",
            f"{np.mean(found['train_tokens'][method]):,.0f}",
        )
        for method in METHODS
    ]
    students = [run for method in METHODS for run in study.runs(method)]
    others = [read_history(study.save(name), name) for name in ("teacher", "reference")]
    return report.Section(
        title="Held-out loss",
        text=(
            "The students differ in which half of the pool they see, and in whether the teacher is "
            "in their training (Vanilla KD: half of the loss is the divergence). Beside the "
            "teacher they take fewer updates, so that the FLOPs are equal, its forward pass "
            "included. Every seed is another initialisation and another order. Teacher, reference "
            "and students are trained on disjoint text, and the held-out modules, with their "
            "docstrings and tests, are in none of it."
        ),
        table=report.Table(
            header=("students", "held-out loss", "bits per byte", "training tokens"),
            rows=rows,
        ),
        plots=[
            *_curves("Students, the band is one standard deviation over seeds", students),
            *_curves("Teacher and reference", others),
        ],
    )


def _curves(who: str, runs: Sequence[History]) -> list[report.Plot]:
    """Losses on held-out text, and those of training by what they cost."""
    groups = grouped(runs)
    found = {
        "on a part of the held-out text": validation_losses(groups),
        "in training, each on its own data": training_loss(groups),
    }
    return [
        report.Plot(png=png, caption=f"{who}: losses {where}.", wide=True)
        for where, png in found.items()
        if png is not None
    ]


def _time(found: Mapping[str, Any]) -> report.Section:
    rows = [(stage, f"{value:,.0f}") for stage, value in found["seconds"].items()]
    return report.Section(
        title="Time",
        text=(
            "Seconds of each stage, added over its processes; they ran side by side. "
            '"wall" is the time from start to end, over all runs that it took.'
        ),
        table=report.Table(header=("stage", "seconds"), rows=rows),
    )


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    """Small print of the page."""
    settings = found["settings"]
    facts = {
        role: f"{settings['parameters'][role] / 1e6:.2f}M parameters"
        for role in settings["parameters"]
    }
    facts["kept"] = f"{100 * found['kept_fraction']:.1f} % of the pool"
    facts["precision"] = "bf16" if settings["bf16"] else "fp32"
    facts["Python"] = found["versions"]["python"]
    facts["commit"] = (found["git_commit"] or "none")[:12]
    return facts
