"""What a model became over a run: evaluations of its checkpoints, by tokens and by FLOPs.

    results.json    {"curves": [{"run": ..., "parameters": N,
                                 "points": [{"iteration": ..., "tokens": D, "flops": 6 N D, ...}]}]}
    curves.csv      the losses of the same, one line for each checkpoint and set
    points.json     what is found until all are, from which the same command goes on

A teacher in the step and what the student samples count among the FLOPs, by parameters, as in
`pretrain --align-flops-to`. Tokens are the run's own count, from its metrics.jsonl.
"""

from __future__ import annotations

import csv
import glob
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_miniplm.core.errors import CheckpointError
from megatron_miniplm.core.manifest import hash_parts, read_json, write_json
from megatron_miniplm.evaluation.run_curves import History, tokens_at, training_flops
from megatron_miniplm.models.checkpoint import latest_checkpoint

Facts = Mapping[str, Any]
POINTS = "points.json"
_LOSSES = ("instance_mean", "token_mean", "bits_per_byte")


def find_checkpoints(patterns: Sequence[str]) -> dict[Path, list[Path]]:
    """--save folder -> its checkpoints among those asked for, in order of iteration.

    A pattern is a folder or a glob of folders, of single iterations or of whole runs; a run means
    all of its complete checkpoints, and what else is in its folder is passed over.
    """
    found: set[Path] = set()
    for pattern in patterns:
        paths = [Path(each) for each in sorted(glob.glob(pattern))]
        own = {each for path in paths for each in (path, *path.glob("iter_*")) if _complete(each)}
        if not own:
            raise CheckpointError(
                f"--checkpoints {pattern} matches no complete checkpoint (iter_NNNNNNN with its "
                "manifest.json) and no --save folder with one"
            )
        found |= own
    runs: dict[Path, list[Path]] = {}
    for path in sorted(found):
        runs.setdefault(path.parent, []).append(path)
    return runs


def _complete(path: Path) -> bool:
    return path.name.startswith("iter_") and latest_checkpoint(path) == path


class Points:
    """What was found of checkpoints so far, in OUTPUT/points.json (without OUTPUT, nowhere).

    `identity`: all that decides a result but the model, JSON-ready; what was found by another is
    left aside. Rank 0 opens it for all, and adds.
    """

    def __init__(self, output: str | None, identity: Facts) -> None:
        self._path = Path(output) / POINTS if output else None
        self._identity = hash_parts(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS))
        self._found: list[Facts] = []
        if self._path and self._path.exists():
            kept = read_json(self._path)
            self._found = kept["found"] if kept["identity"] == self._identity else []

    def of(self, model: Facts) -> Facts | None:
        """The results of this model (path and fingerprint), None if there are none yet."""
        return next((each for each in self._found if each["model"] == model), None)

    def add(self, results: Facts) -> None:
        """Keep them."""
        self._found.append(results)
        if self._path:
            write_json(self._path, {"identity": self._identity, "found": self._found})


def curve(history: History, save: Path, size: int, results: Mapping[int, Facts]) -> dict[str, Any]:
    """Results by iteration, with what each checkpoint of a model of that size cost."""
    iterations = np.array(list(results), np.float64)
    millions = tokens_at(history, iterations)
    spent = zip(millions * 1e6, training_flops(history, size, millions), strict=True)
    points = [
        {"iteration": at, "tokens": round(tokens), "flops": float(flops), **found}
        for (at, found), (tokens, flops) in zip(results.items(), spent, strict=True)
    ]
    return {"run": str(save), "parameters": size, "points": points}


def table(curves: Sequence[Mapping[str, Any]]) -> bytes:
    """The losses as CSV."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["run", "parameters", "iteration", "tokens", "flops", "set", *_LOSSES])
    for each in curves:
        for point in each["points"]:
            spent = [point[name] for name in ("iteration", "tokens", "flops")]
            for name, losses in point["lm_loss"].items():
                values = [losses[kind] for kind in _LOSSES]
                writer.writerow([each["run"], each["parameters"], *spent, name, *values])
    return text.getvalue().encode()
