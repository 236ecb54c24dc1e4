"""The table of `examples/all_methods.sh`: what every method cost, and how its students did.

FLOPs are `evaluation.cost`'s, of the models' parameters, from the tokens that students were really
trained on, those of a warm start as plain training; losses are those of each student's
``heldout/results.json``, whatever their order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_miniplm.core.config import parse_flags
from megatron_miniplm.core.errors import MiniPLMError
from megatron_miniplm.core.log import get_logger, setup_logging
from megatron_miniplm.core.manifest import provenance, read_json, write_json
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.evaluation.cost import METHODS, Model, PlanSetting
from megatron_miniplm.evaluation.report import mean_and_spread
from megatron_miniplm.evaluation.run_curves import read_history


@dataclass(frozen=True)
class Students:
    """Where the students of a method are, and what it began from; below the quickstart's folder."""

    folder: str
    """Without ``-SEED``."""
    corpus: str
    """What was selected from, continued or cached, as a whole."""


STUDENTS: Mapping[str, Students] = {
    "pretrain": Students("student-random", "data/random"),
    "vanilla-kd": Students("student-kd", "data/random"),
    "seqkd": Students("methods/student-seqkd", "data/random"),
    "minillm": Students("methods/student-minillm", "data/random"),
    "miniplm": Students("student-miniplm", "data/pool"),
    "miniplm-proxy": Students("methods/student-miniplm-proxy", "data/pool"),
    "miniplm+vanilla-kd": Students("student-miniplm-kd", "data/pool"),
    "pd-offline": Students("methods/student-pd-offline", "data/random"),
}
"""By the names of `evaluation.cost`."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Put the students of all methods side by side."""

    quickstart: Path = Path("runs/quickstart")
    """Folder of the quickstart, with what examples/proxy.sh and examples/all_methods.sh added."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the students."""


def table(config: Config) -> list[dict[str, Any]]:
    """A row for each method, the lowest held-out loss first."""
    setting = _setting(config.quickstart)
    found = [_row(config, method, students, setting) for method, students in STUDENTS.items()]
    return sorted(found, key=lambda row: float(np.mean(row["heldout_loss"])))


def _row(config: Config, method: str, students: Students, setting: PlanSetting) -> dict[str, Any]:
    folders = [config.quickstart / f"{students.folder}-{seed}" for seed in config.seeds]
    judged = [_only(read_json(each / "heldout/results.json")["lm_loss"]) for each in folders]
    tokens, warm = (_mean(amount(each) for each in folders) for amount in (_tokens, _warm_tokens))
    corpus = _size(config.quickstart / students.corpus)
    setting, warmed = (
        replace(setting, tokens=count, corpus_tokens=corpus) for count in (tokens, warm)
    )
    own = replace(setting, tokens=tokens - warm)
    return {
        "method": method,
        "training_tokens": tokens,
        "training_flops": METHODS["pretrain"].training(warmed) + METHODS[method].training(own),
        "offline_flops": sum(METHODS[method].jobs(setting).values()),
        "heldout_loss": [each["instance_mean"] for each in judged],
        "bits_per_byte": [each["bits_per_byte"] for each in judged],
    }


def _setting(quickstart: Path) -> PlanSetting:
    """Models and amounts of everything that was done but the students' training."""
    settings = read_json(quickstart / "settings.json")
    student, teacher, reference = (
        Model.of_size(settings["parameters"][role], role)
        for role in ("student", "teacher", "reference")
    )
    sample = _size(quickstart / "proxy/data/sample")
    return PlanSetting(
        student=student, teacher=teacher, reference=reference, tokens=0, corpus_tokens=0,
        selection_ratio=settings["selection_ratio"],
        reference_tokens=_tokens(quickstart / "reference"), proxy_tokens=sample,
        proxy_epochs=_tokens(quickstart / "proxy/model") / sample,
        seq_length=settings["seq_length"], vocabulary=settings["vocab_size"],
    )  # fmt: skip


def _tokens(run: Path) -> int:
    """That a run was trained on, repetitions included."""
    return int(read_history(run, run.name).steps["consumed_tokens"][-1])


def _warm_tokens(run: Path) -> int:
    """Those of them that came before what the student wrote: of MiniLLM's warm start."""
    config = read_json(run / "run.json")["config"]
    size = config["global_batch_size"]
    samples = -(-config.get("warm_start_samples", 0) // size) * size  # whole updates
    steps = read_history(run, run.name).steps
    seen, tokens = (np.append(0, steps[f"consumed_{what}"]) for what in ("samples", "tokens"))
    return round(float(np.interp(samples, seen, tokens)))


def _mean(amounts: Iterable[int]) -> int:
    return round(float(np.mean(list(amounts))))


def _size(corpus: Path) -> int:
    return int(Corpus.open(corpus).manifest.content["num_tokens"])


def _only(losses: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the one set that was evaluated on."""
    (found,) = losses.values()
    return found


def show(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for people."""
    seeds = len(rows[0]["heldout_loss"])
    shown = Table(title=f"Held-out loss (nats a token), mean ± sd of {seeds} seeds")
    for name in ("method", "training GFLOP", "GFLOP before", "held-out loss", "bits per byte"):
        shown.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        shown.add_row(
            row["method"], f"{row['training_flops'] / 1e9:,.0f}",
            f"{row['offline_flops'] / 1e9:,.0f}", mean_and_spread(row["heldout_loss"]),
            mean_and_spread(row["bits_per_byte"]),
        )  # fmt: skip
    return shown


def main() -> int:
    """Print the table, and write it as QUICKSTART/methods/table.json."""
    setup_logging()
    try:
        config = parse_flags(Config, sys.argv[1:], prog="methods_table")
        found = table(config)
    except MiniPLMError as error:
        get_logger().error("methods_table: %s: %s", type(error).__name__, error)
        return 2
    write_json(config.quickstart / "methods/table.json", {"rows": found, **provenance()})
    Console(width=None if sys.stdout.isatty() else 100).print(show(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
