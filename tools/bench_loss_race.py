"""Races of losses: the time of each contestant, its error against fp64, and the memory it needs.

What cannot run for want of memory is left out, and said. On a GPU a figure is the median of several
runs between two events each.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_core import Bench, Clocked, Contestant, Timing

_GPU_RUNS = 10  # a round

OURS = "ours"


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One way to a loss and its gradients."""

    run: Callable[[], Any]
    """What is timed; gives the gradients."""
    prepare: Callable[[], None]
    """What it overwrites is put back, and what it gave last is gone."""
    results: int = 0
    """Bytes of gradients that it allocates and hands over: not what it needs beside them."""


def race_losses(
    bench: Bench,
    device: str,
    entrants: dict[str, Entrant],
    *,
    limit: str,
    error: Callable[[Any], float],
    work: str,
    memory: str,
    unranked: Collection[str] = (),
) -> None:
    """Rows of time, error and memory: `OURS` against all others, beside the entrant `limit`.

    `error` tells how wrong gradients are, `memory` is the name of that metric. What is `unranked`
    gives no gradient that could be wrong, as the limit does.
    """
    errors, extra = {}, {}
    for name, entrant in entrants.items():  # compiles, warms up, and is checked
        entrant.prepare()
        try:
            gradients, peak = _with_peak(entrant.run, device)
        except torch.OutOfMemoryError:
            if name in (OURS, limit):
                raise
            gradients = None
        if gradients is None:  # here, the error's frames no longer hold its tensors
            bench.skip(f"{name}: does not fit in the memory of the GPU")
            _free()
            continue
        if name not in (limit, *unranked):
            errors[name] = error(gradients)
        extra[name] = max(0.0, peak - entrant.results)
        del gradients
    contestants = [
        Contestant(
            name=name,
            run=_clocked(entrants[name], device),
            prepare=[entrants[name].prepare],
        )
        for name in extra
    ]
    timings = bench.race(*contestants, work=work)
    _write_rows(bench, timings, limit, errors, (memory, extra))


def _write_rows(
    bench: Bench,
    timings: dict[str, Timing],
    limit: str,
    errors: dict[str, float],
    memory: tuple[str, dict[str, float]],
) -> None:
    def milliseconds(name: str) -> float:
        return timings[name].median * 1e3

    metric, extra = memory
    for name in timings:
        if name in (OURS, limit):
            continue
        bench.row(
            "loss and gradient", "ms",
            ours=milliseconds(OURS), peer=(name, milliseconds(name)),
            limit=(limit, milliseconds(limit)), lower_is_better=True,
            error_ours=errors[OURS], error_peer=errors.get(name),
        )  # fmt: skip
        bench.row(
            metric, "MB",
            ours=extra[OURS] / 1e6, peer=(name, extra[name] / 1e6), lower_is_better=True,
        )  # fmt: skip


def _clocked(entrant: Entrant, device: str) -> Callable[[], Any]:
    """On a GPU: the median of several runs between events, prepared and not waited for."""
    if device == "cpu":
        return entrant.run

    def timed() -> Clocked:
        seconds = []
        for _ in range(_GPU_RUNS):
            entrant.prepare()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = entrant.run()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        return Clocked(statistics.median(seconds), result)

    return timed


def _with_peak(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    """The result, and bytes that were needed at once beside what was there before."""
    if device == "cuda":
        _free()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, float(torch.cuda.max_memory_allocated() - before)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak (Linux)
    resident = _status_bytes("VmRSS")
    result = run()
    return result, float(max(0, _status_bytes("VmHWM") - resident))


def _free() -> None:
    """Nothing that is gone occupies the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
