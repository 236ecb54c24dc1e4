"""Where two trainings part: ``python tools/compare_runs.py A B``.

A and B are --save folders (their metrics are compared step by step) or two checkpoints
(``SAVE/iter_0000100``: their tensors are). Or the same training is run twice first:

    compare_runs.py --commits HEAD~1 HEAD -- --train-data-path data/pile --train-iters 20 ...
    compare_runs.py --layouts "" "--tensor-model-parallel-size 2" -- --train-data-path ...

For each metric: the first logged step that differs by more than the tolerance, both values, and the
largest difference; a step or a metric that only one of them has is a difference. What the clock or
the machine says (times, rates, memory) is not compared.
Exit code 0 if nothing differs, 1 if something does, 2 if there is nothing to compare.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed.checkpoint as dcp
import tyro
from compare_launch import check_flags, run_commit, run_layout
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_miniplm.core.config import parse_flags
from megatron_miniplm.core.errors import ConfigError, DataError, MiniPLMError
from megatron_miniplm.core.lines import read_objects
from megatron_miniplm.core.log import get_logger, setup_logging
from megatron_miniplm.core.manifest import read_json

Row = dict[str, Any]
_OF_THE_MACHINE = re.compile(
    r"\btimes?\b|per second|throughput|\bmfu\b|\beta\b|memory|wait|hours|world size"
    r"|\((ms|s|[MG]i?B|bytes)\)",
    re.IGNORECASE,
)
_PLACES = ("save", "overwrite", "tensorboard_dir")
_LAYOUT_TOLERANCE = 1e-5  # sums in another order, fp32: as tests/parallel allow


@dataclass(frozen=True, kw_only=True)
class Config:
    """Say at which step two trainings part, and by how much."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Two --save folders, or two checkpoints (iter_... folders)."""
    commits: tuple[str, ...] = ()
    """Two commits to run the flags after -- with; . is the working tree."""
    layouts: tuple[str, ...] = ()
    """Two sets of flags to run beside those after --, each a quoted word; --nproc-per-node N in it
    says how many ranks (default: tensor x pipeline ranks)."""
    tolerance: float | None = None
    """Largest difference that counts as none: absolute below 1, relative above. Default: 1e-5 for
    --layouts, else 0, bit for bit."""
    output: Path | None = None
    """New folder where the two runs are kept; default: a temporary one."""

    def __post_init__(self) -> None:
        given = [pair for pair in (self.runs, self.commits, self.layouts) if pair]
        if len(given) != 1 or len(given[0]) != 2:
            raise ConfigError("give two runs, or two --commits, or two --layouts")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ConfigError(f"--tolerance {self.tolerance} must not be negative")
        if self.output is not None and self.runs:
            raise ConfigError(f"--output {self.output} has no effect on runs that exist")
        if self.output is not None and self.output.exists():
            # A run that is finished there would be compared instead of the one asked for.
            raise ConfigError(
                f"--output {self.output} exists already: remove it or name another folder, or "
                "compare the runs in it by name"
            )

    @property
    def most(self) -> float:
        """The tolerance."""
        if self.tolerance is not None:
            return self.tolerance
        return _LAYOUT_TOLERANCE if self.layouts else 0.0


@dataclass(kw_only=True)
class Difference:
    """Of one metric or tensor."""

    name: str
    compared: int = 0
    largest: float = 0.0
    """Of all that was compared; not a number where only one is one."""
    largest_at: str = ""
    first: str = ""
    """Where it first exceeded the tolerance, both values, or one run lacked it; empty: nowhere."""
    alone: int = 0
    """How often only one run had it."""

    def see(self, at: str, one: float, other: float, most: float) -> None:
        """Count a pair of values in."""
        self.compared += 1
        if one == other or (math.isnan(one) and math.isnan(other)):
            return
        apart = abs(one - other)
        if math.isnan(apart) or apart > self.largest:
            self.largest, self.largest_at = apart, at
        # Counts have no rounding; and what is not a number is nowhere near one that is.
        exact = isinstance(one, int) and isinstance(other, int)
        close = apart <= most * max(1.0, abs(one), abs(other)) and not exact
        if not close and not self.first:
            self.first = f"{at}: {one!r} and {other!r}"

    def miss(self, at: str, owner: Path) -> None:
        """Count a value in that only one run has."""
        self.alone += 1
        self.first = self.first or f"{at}: only in {owner}"

    @property
    def said(self) -> str:
        """`first`, and how often only one run had it."""
        alone = f" (in one of the two only: {self.alone:,})" if self.alone else ""
        return f"{self.first or 'none'}{alone}"


def compare_metrics(one: Path, other: Path, most: float) -> list[Difference]:
    """Every metric that one of them logged, and "logged steps" where only one logged a step.

    Refuses runs without common steps.
    """
    mine, theirs = read_metrics(one), read_metrics(other)
    if not mine.keys() & theirs.keys():
        raise DataError(f"{one} and {other} have no logged step in common: {_steps(mine, theirs)}")
    found: dict[str, Difference] = {}

    def of(name: str) -> Difference:
        return found.setdefault(name, Difference(name=name))

    for step, kind in sorted(mine.keys() | theirs.keys()):
        at, values, others = f"iteration {step}", mine.get((step, kind)), theirs.get((step, kind))
        if values is None or others is None:
            of(f"logged steps, {kind}").miss(at, one if others is None else other)
            continue
        for name in values.keys() | others.keys():
            if name in values and name in others:
                of(name).see(at, values[name], others[name], most)
            else:
                of(name).miss(at, one if name in values else other)
    return [found[name] for name in sorted(found)]


def read_metrics(folder: Path) -> dict[tuple[int, str], dict[str, float]]:
    """(iteration, kind of row) -> metrics that training alone decides."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise DataError(f"{path} does not exist: is this the --save folder of a run?")
    rows: dict[tuple[int, str], dict[str, float]] = {}
    for row in read_objects(path):
        kind = "validation" if "validation" in row else "training"
        key = row["iteration"], kind
        rows[key] = {**rows.get(key, {}), **dict(_numbers(row))}
    return rows


def _numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if name == "iteration" or _OF_THE_MACHINE.search(name):
            continue
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}: ")
        elif _is_number(value):
            yield f"{prefix}{name}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _steps(*runs: Mapping[tuple[int, str], Any]) -> str:
    spans = [sorted(step for step, _ in run) for run in runs]
    return " and ".join(f"{s[0]} to {s[-1]}" if s else "none" for s in spans)


def compare_checkpoints(one: Path, other: Path, most: float) -> list[Difference]:
    """Every tensor that both hold, whole, whatever the layouts that they were saved in."""
    readers = [dcp.FileSystemReader(folder) for folder in (one, other)]
    try:
        tensors = [_tensors(reader) for reader in readers]
    except (OSError, dcp.api.CheckpointException) as error:
        raise DataError(f"{one} and {other} are not two checkpoints: {error}") from error
    found = []
    for name in sorted(tensors[0].keys() & tensors[1].keys()):
        shapes = [each[name].size for each in tensors]
        difference = Difference(name=name)
        if shapes[0] != shapes[1]:
            difference.first = f"shape {tuple(shapes[0])} and {tuple(shapes[1])}"
        else:
            values = [
                _load(folder, name, t[name])
                for folder, t in zip((one, other), tensors, strict=True)
            ]
            _see_tensors(difference, values[0], values[1], most)
        found.append(difference)
    if not found:
        raise DataError(f"{one} and {other} have no tensor in common")
    return found


def _tensors(reader: dcp.FileSystemReader) -> dict[str, TensorStorageMetadata]:
    described = reader.read_metadata().state_dict_metadata
    return {k: v for k, v in described.items() if isinstance(v, TensorStorageMetadata)}


def _load(folder: Path, name: str, what: TensorStorageMetadata) -> torch.Tensor:
    state = {name: torch.empty(what.size, dtype=what.properties.dtype)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return state[name]


def _see_tensors(
    difference: Difference, one: torch.Tensor, other: torch.Tensor, most: float
) -> None:
    """The element that is furthest off stands for the tensor."""
    one, other = one.double().flatten(), other.double().flatten()
    if one.numel():
        apart = (one - other).abs().masked_fill(one.isnan() & other.isnan(), 0.0)
        at = int(apart.nan_to_num(torch.inf).argmax())
        difference.see(f"element {at}", float(one[at]), float(other[at]), most)
    difference.compared = one.numel()


def differing_settings(one: Path, other: Path) -> list[tuple[str, Any, Any]]:
    """(flag, value, other value) of two runs' configurations; places are left out."""
    configs = []
    for folder in (one, other):
        home = folder.parent if folder.name.startswith("iter_") else folder
        path = home / "run.json"
        configs.append(read_json(path).get("config", {}) if path.exists() else {})
    names = [name for name in {**configs[0], **configs[1]} if name not in _PLACES]
    pairs = [(name, configs[0].get(name), configs[1].get(name)) for name in names]
    return [
        (f"--{name.replace('_', '-')}", mine, theirs) for name, mine, theirs in pairs
        if mine != theirs
    ]  # fmt: skip


def compare(one: Path, other: Path, most: float) -> bool:
    """Print how two trainings differ; True if none of it exceeds the tolerance."""
    checkpoints = [folder.name.startswith("iter_") for folder in (one, other)]
    if checkpoints[0] != checkpoints[1]:
        raise ConfigError(f"{one} and {other}: one is a checkpoint, the other a run")
    of: Callable[..., list[Difference]] = compare_checkpoints if checkpoints[0] else compare_metrics
    found = of(one, other, most)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for flag, mine, theirs in differing_settings(one, other):
        console.print(f"{flag}: {mine} and {theirs}", markup=False)
    table = Table("tensor" if checkpoints[0] else "metric", "compared", "largest difference",
                  "first beyond the tolerance")  # fmt: skip
    for each in found:
        largest = f"{each.largest:.3e}, {each.largest_at}" if each.largest_at else "0"
        table.add_row(each.name, f"{each.compared:,}", largest, each.said)
    console.print(table)
    parted = [each for each in found if each.first]
    console.print(_verdict(parted, most), markup=False)
    return not parted


def _verdict(parted: Sequence[Difference], most: float) -> str:
    within = f"within {most:g}" if most else "bit for bit"
    if not parted:
        return f"the same {within}"
    steps = [int(m[1]) for d in parted if (m := re.match(r"iteration (\d+)", d.first))]
    names = ", ".join(each.name for each in parted[:5])
    where = f"first at iteration {min(steps)}" if steps else f"in {len(parted)} tensors"
    more = f" and {len(parted) - 5} more" if len(parted) > 5 else ""
    return f"not the same {within}, {where}: {names}{more}"


def run(config: Config, words: Sequence[str]) -> bool:
    """Run what has to be run, then compare; True if the two are the same."""
    if config.runs:
        if words:
            raise ConfigError(f"flags after -- ({words[0]} ...) need --commits or --layouts")
        return compare(config.runs[0], config.runs[1], config.most)
    check_flags(words)
    launch = run_commit if config.commits else run_layout
    pair = config.commits or config.layouts
    names = [_folder_name(number, each) for number, each in enumerate(pair)]
    with tempfile.TemporaryDirectory(prefix="compare-runs-") as scratch:
        folder = config.output or Path(scratch)
        for name, what in zip(names, pair, strict=True):
            get_logger().info("running %s", what or "the flags as they are")
            launch(what, words, folder.resolve() / name)
        return compare(folder / names[0], folder / names[1], config.most)


def _folder_name(number: int, what: str) -> str:
    return "-".join(["ab"[number], *re.findall(r"[\w.]+", what)])[:80]


def main(words: list[str]) -> int:
    """Compare; flags after ``--`` are those of `pretrain`."""
    setup_logging()
    at = words.index("--") if "--" in words else len(words)
    # A quoted layout begins like a flag; a space in front keeps it a value.
    own = [f" {word}" if re.match(r"--[\w-]+ ", word) else word for word in words[:at]]
    try:
        same = run(parse_flags(Config, own, prog="compare_runs.py"), words[at + 1 :])
    except MiniPLMError as error:
        get_logger().error("error: %s", error)
        return 2
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
