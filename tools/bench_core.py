"""Races: several ways to do one thing, timed against each other in one run.

A *case* makes its input once, in a scratch folder that goes away with it, and races contestants:
ours, peers, and the physical limit. They run in turns (round 1 of all, then round 2 of all, the
order reversed each time), so that a busy or throttled machine slows all of them alike; the median
counts. Every result is checked: `Bench.rate` takes errors, and a case raises `WrongResultError`
where a result has to be equal and is not, so a fast wrong contestant cannot win.

A row holds the figures of one metric against one peer (`Row`). A figure that was not measured is
not in it. ``ratio`` above 1 means that ours is better, whatever the metric's direction.
"""

from __future__ import annotations

import gc
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megatron_miniplm.core.errors import ConfigError, MiniPLMError
from megatron_miniplm.core.log import LOGGER_NAME

# Below the package's logger, and told to speak where the stages that are timed are told not to.
LOG = logging.getLogger(f"{LOGGER_NAME}.benchmark")
_SAY_EVERY_S = 10.0


class WrongResultError(MiniPLMError):
    """A contestant computed something else than the others."""


@dataclass(frozen=True)
class Clocked:
    """Result of a contestant that took its own time (a child process without its start-up)."""

    seconds: float
    result: Any


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to do it."""

    name: str
    run: Callable[[], Any]
    """What is timed; the last result is kept for the check."""
    prepare: Sequence[Callable[[], object]] = ()
    """Called before every round, not timed: removes what the last round left."""
    most_rounds: int | None = None
    """Timed in so many rounds at most: a peer that takes minutes."""

    def runs_in(self, number: int) -> bool:
        """Whether it takes part in round `number`, from 0."""
        return self.most_rounds is None or number < self.most_rounds


@dataclass
class Timing:
    """Seconds of one contestant, a figure a round."""

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Of all its threads and ended children, start-up of children included."""
    result: Any = None

    @property
    def median(self) -> float:
        """Median of the rounds, seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of one case against one peer; see the module's docstring."""

    suite: str
    case: str
    metric: str
    unit: str
    ours: float | None = None
    peer: float | None = None
    peer_name: str | None = None
    ratio: float | None = None
    limit: float | None = None
    limit_name: str | None = None
    fraction_of_limit: float | None = None
    error_ours: float | None = None
    error_peer: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Without the figures that were not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Bench:
    """What a case is given: its scratch folder and sizes, and where its rows go."""

    def __init__(self, suite: str, case: str, scratch: Path, sizes: Sizes) -> None:
        self.suite, self.case, self.scratch, self.sizes = suite, case, scratch, sizes
        self.rows: list[Row] = []
        self.timings: list[dict[str, Any]] = []
        self.skipped: list[str] = []

    def race(self, *contestants: Contestant, work: str) -> dict[str, Timing]:
        """Time the contestants in turns; `work` says what one run does (for the record)."""
        rounds = self.sizes.rounds
        timings = {each.name: Timing(each.name) for each in contestants}
        total = sum(each.runs_in(number) for each in contestants for number in range(rounds))
        pace = _Pace(f"{self.case}: {work}", total)
        before = _cores_of_others()
        for number in range(rounds):
            for each in contestants[:: 1 if number % 2 == 0 else -1]:
                if each.runs_in(number):
                    _run_once(each, timings[each.name], settle=not self.sizes.quick)
                    pace.advance(f"round {number + 1} of {rounds}, {each.name}")
        after = _cores_of_others()
        busy = (after[0] - before[0]) / max(after[1] - before[1], 1e-9)
        for timing in timings.values():
            self._record(timing, work, busy)
        return timings

    def rate(
        self,
        metric: str,
        unit: str,
        amount: float,
        *,
        ours: Timing,
        peers: Sequence[Timing] = (),
        limit: Timing | None = None,
        error_ours: float | None = None,
        errors: Mapping[str, float] | None = None,
    ) -> None:
        """Rows of a speed, `amount` units a run: one for each peer (one without, if none).

        `errors` maps a peer's name to how far its result is from the reference's.
        """
        for peer in peers or (None,):
            self.row(
                metric, unit,
                ours=amount / ours.median,
                peer=None if peer is None else (peer.name, amount / peer.median),
                limit=None if limit is None else (limit.name, amount / limit.median),
                error_ours=error_ours,
                error_peer=(errors or {}).get(peer.name) if peer is not None else None,
            )  # fmt: skip

    def row(
        self,
        metric: str,
        unit: str,
        *,
        ours: float,
        peer: tuple[str, float] | None = None,
        limit: tuple[str, float] | None = None,
        lower_is_better: bool = False,
        error_ours: float | None = None,
        error_peer: float | None = None,
    ) -> None:
        """One row of measured figures; `peer` and `limit` are (name, figure in `unit`)."""
        self.rows.append(
            Row(
                suite=self.suite, case=self.case, metric=metric, unit=unit, ours=ours,
                peer=peer[1] if peer else None, peer_name=peer[0] if peer else None,
                ratio=_better(ours, peer[1], lower_is_better) if peer else None,
                limit=limit[1] if limit else None, limit_name=limit[0] if limit else None,
                fraction_of_limit=_better(ours, limit[1], lower_is_better) if limit else None,
                error_ours=error_ours, error_peer=error_peer,
            )
        )  # fmt: skip

    def skip(self, what: str) -> None:
        """Note what this run leaves out, and why."""
        self.skipped.append(f"{self.case}: {what}")

    def _record(self, timing: Timing, work: str, busy: float) -> None:
        self.timings.append(
            {
                "case": self.case,
                "contestant": timing.name,
                "work": work,
                "rounds": len(timing.seconds),
                "median_s": timing.median,
                "min_s": min(timing.seconds),
                "max_s": max(timing.seconds),
                "median_cpu_s": statistics.median(timing.cpu_seconds),
                "min_cpu_s": min(timing.cpu_seconds),
                "max_cpu_s": max(timing.cpu_seconds),
                "cores_busy_with_other_programs": round(max(busy, 0.0), 2),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything: a run of seconds (quick), of minutes, or with the largest cases."""

    quick: bool = False
    full: bool = False
    rounds: int = 5
    text: Path | None = None
    """Real text and tokenizers, for the suites that read some."""
    store: Path | None = None
    """Logits of a real teacher, for the suite that measures their encodings."""
    hf: Path | None = None
    """A real model, for the suites that ask one."""
    task_data: Path | None = None
    """Examples of the tasks that one of them runs."""

    def pick(self, quick: int, normal: int) -> int:
        """The size for this run."""
        return quick if self.quick else normal


CaseFunction = Callable[[Bench], None]


@dataclass(frozen=True)
class Suite:
    """Cases by name, in the order in which they run."""

    name: str
    cases: Mapping[str, CaseFunction]

    def chosen(self, names: Sequence[str]) -> dict[str, CaseFunction]:
        """The named cases (all if none is named); refuses unknown names."""
        unknown = sorted(set(names) - self.cases.keys())
        if unknown:
            raise ConfigError(
                f"suite {self.name} has no case {', '.join(unknown)}; it has "
                f"{', '.join(self.cases)}"
            )
        return {name: self.cases[name] for name in self.cases if not names or name in names}


def require_equal(contestant: str, equal: bool, what: str) -> None:
    """Stop the benchmark where a result is not what it has to be."""
    if not equal:
        raise WrongResultError(f"{contestant}: {what}; its time means nothing")


def _run_once(contestant: Contestant, timing: Timing, *, settle: bool) -> None:
    for step in contestant.prepare:
        step()
    timing.result = None  # a result may be large: never two of them at once
    if settle:
        gc.collect()
        os.sync()  # nobody pays for the writes of the contestant before
    start, cpu = time.perf_counter(), _own_cpu_seconds()
    result = contestant.run()
    seconds = time.perf_counter() - start
    timing.cpu_seconds.append(_own_cpu_seconds() - cpu)
    if isinstance(result, Clocked):
        seconds, result = result.seconds, result.result
    timing.seconds.append(seconds)
    timing.result = result


class _Pace:
    """Says now and then how far a race is. Lines only: what is timed may draw a bar of its own."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.start = self.said = time.monotonic()
        LOG.info("%s; %d runs", title, total)

    def advance(self, what: str) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.said < _SAY_EVERY_S or self.done == self.total:
            return
        self.said = now
        left = (now - self.start) / self.done * (self.total - self.done)
        LOG.info("%s: %d/%d runs (%s), ETA %.0f s", self.title, self.done, self.total, what, left)


def _cores_of_others() -> tuple[float, float]:
    """CPU seconds that other programs took since the machine started, and the clock."""
    machine = psutil.cpu_times()
    busy = machine.user + machine.nice + machine.system
    return busy - _own_cpu_seconds(), time.monotonic()


def _own_cpu_seconds() -> float:
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system


def _better(ours: float, other: float, lower_is_better: bool) -> float | None:
    over, under = (other, ours) if lower_is_better else (ours, other)
    return over / under if under else None
