"""Benchmarks against peers and physical limits: ``python tools/benchmark.py SUITE --json FILE``.

``data``: text to selected corpus; ``kernels``: logits to loss and gradient; ``logits``: a teacher's
logits on disk; ``training``, ``scoring``: tokens a second of `pretrain` and of `score`;
``generation``: tokens a second of a teacher's continuations; ``evaluation``: examples a second of
zero-shot tasks. `bench_core` says how a race is run, and ``benchmarks/README.md`` how to read the
figures.
"""

from __future__ import annotations

import datetime
import logging
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import bench_data
import bench_evaluation
import bench_generation
import bench_kernels
import bench_logits
import bench_scoring
import bench_training
import tyro
from bench_core import LOG, Bench, CaseFunction, Row, Sizes, Suite
from bench_machine import git_commit, hardware, versions
from rich.console import Console
from rich.table import Table

from megatron_miniplm.core.config import parse_flags
from megatron_miniplm.core.errors import ConfigError, MiniPLMError
from megatron_miniplm.core.log import get_logger, setup_logging
from megatron_miniplm.core.manifest import write_json

_ROOMS = (
    bench_data, bench_kernels, bench_logits, bench_training, bench_scoring, bench_generation,
    bench_evaluation,
)  # fmt: skip
SUITES = {room.SUITE.name: room.SUITE for room in _ROOMS}
_WITH_MODEL = {room.SUITE.name for room in (bench_scoring, bench_generation, bench_evaluation)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time this program against its peers and against what the machine can do."""

    suite: Annotated[str, tyro.conf.Positional]
    """What to time: data, kernels, logits, training, scoring, generation or evaluation."""
    json: Path | None = None
    """File for the figures, machine and versions included; replaced if it is there."""
    quick: bool = False
    """Tiny sizes, a few seconds: shows that everything runs; its figures mean nothing."""
    full: bool = False
    """Also the cases that need minutes and tens of gigabytes of disk."""
    case: tuple[str, ...] = ()
    """Only these cases."""
    rounds: int = 5
    """Rounds of a race; slow peers run in one."""
    scratch: Path = Path(tempfile.gettempdir())
    """Where inputs and outputs go for the time of a case; its disk is part of what is timed."""
    text: Path | None = None
    """Folder of corpus/train-*.jsonl.xz and tokenizers/*.tar.xz, for the suites data and training;
    default: shared/data beside the project, or the sources of Python's library (with --quick)."""
    store: Path | None = None
    """A logit store with 32 bits a log-prob, for the suite logits; default: random logits."""
    hf: Path | None = None
    """Hugging Face folder of a model, for the suites scoring, generation and evaluation; without
    it, the first two take SmolLM2-135M where its package is installed."""
    task_data: Path | None = None
    """Folder of the tasks' examples, as `evaluate --task-data`, for the suite evaluation."""

    def __post_init__(self) -> None:
        if self.hf is not None and self.suite not in _WITH_MODEL:
            raise ConfigError(
                f"--hf is for {', '.join(sorted(_WITH_MODEL))}; {self.suite} reads no model"
            )
        if self.task_data is not None and self.suite != bench_evaluation.SUITE.name:
            raise ConfigError(f"--task-data is for the suite evaluation; {self.suite} reads none")
        if self.text is not None and self.suite not in ("data", "training"):
            raise ConfigError(f"--text is for data and training; {self.suite} reads none")
        if self.store is not None and self.suite != bench_logits.SUITE.name:
            raise ConfigError(f"--store is for the suite logits; {self.suite} reads none")
        if self.rounds < 1:
            raise ConfigError(f"--rounds {self.rounds} must be at least 1")
        if self.quick and self.full:
            raise ConfigError("--quick and --full are opposites: give one of them")


def run(config: Config) -> dict[str, Any]:
    """Run the cases, write the JSON file, and return what it holds."""
    suite = _suite(config.suite)
    cases = suite.chosen(config.case)
    sizes = Sizes(
        quick=config.quick, full=config.full, rounds=1 if config.quick else config.rounds,
        text=config.text, store=config.store, hf=config.hf, task_data=config.task_data,
    )  # fmt: skip
    report: dict[str, Any] = {
        "suite": suite.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "quick": config.quick,
        "full": config.full,
        "hardware": hardware(config.scratch),
        "versions": versions(),
        "rows": [],
        "timings": [],
        "skipped": [],
    }
    for number, (name, function) in enumerate(cases.items(), start=1):
        LOG.info("case %d of %d: %s", number, len(cases), name)
        bench = _run_case(suite, name, function, sizes, config.scratch)
        report["rows"] += [row.as_json() for row in bench.rows]
        report["timings"] += bench.timings
        report["skipped"] += bench.skipped
        if bench.rows:
            print_rows(bench.rows)
        if config.json is not None:  # after every case: an interrupt loses no figure
            write_json(config.json, {key: v for key, v in report.items() if v is not None})
    return report


def _run_case(
    suite: Suite, name: str, function: CaseFunction, sizes: Sizes, scratch: Path
) -> Bench:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"benchmark-{name}-", dir=scratch) as folder:
        bench = Bench(suite.name, name, Path(folder), sizes)
        function(bench)
    for skipped in bench.skipped:
        LOG.info("left out: %s", skipped)
    LOG.info("%s took %.1f s", name, time.perf_counter() - start)
    return bench


def print_rows(rows: list[Row]) -> None:
    """The rows as a table on stdout."""
    headings = ("case", "metric", "unit", "ours", "peer", "ratio", "limit", "of limit", "errors")
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:3] else "right")
    for row in rows:
        errors = [_figure(each) for each in (row.error_ours, row.error_peer) if each is not None]
        table.add_row(
            row.case, row.metric, row.unit, _figure(row.ours),
            _named(row.peer, row.peer_name), _figure(row.ratio),
            _named(row.limit, row.limit_name), _figure(row.fraction_of_limit),
            " / ".join(errors),
        )  # fmt: skip
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(table)


def _suite(name: str) -> Suite:
    if name not in SUITES:
        raise ConfigError(f"there is no suite {name!r}; there is: {', '.join(SUITES)}")
    return SUITES[name]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _named(value: float | None, name: str | None) -> str:
    return "" if value is None else f"{_figure(value)}\n{name}"


def main(words: list[str]) -> int:
    """Run with command-line words; returns the exit code."""
    setup_logging(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no scratch folder behind
    LOG.setLevel(logging.INFO)
    try:
        run(parse_flags(Config, words, prog="benchmark.py"))
    except MiniPLMError as error:
        get_logger().error("error: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
