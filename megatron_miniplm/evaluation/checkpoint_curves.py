"""What a model became over a run: evaluations of its checkpoints, by tokens and by FLOPs.

    results.json    {"curves": [{"run": ..., "parameters": N,
                                 "points": [{"iteration": ..., "tokens": D, "flops": 6 N D, ...}]}]}
    curves.csv      the losses of the same, one line for each checkpoint and set

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

from megatron_miniplm.core.errors import CheckpointError
from megatron_miniplm.evaluation.run_curves import read_history, tokens_at, training_flops
from megatron_miniplm.models.checkpoint import latest_checkpoint

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


def curve(save: Path, size: int, results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Results by iteration, with what each checkpoint of a model of that size cost."""
    history = read_history(save, save.name)
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
