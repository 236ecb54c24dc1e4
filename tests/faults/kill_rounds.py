"""A training run that is killed again and again, and what became of it.

    python -m tests.faults.kill_rounds CORPUS FOLDER --rounds 25 --ranks 2      # prints a line

A round starts the same command, alternately saving in the background, and kills it with SIGKILL:
one in four during start-up, the others at a random moment of the updates after it, a third of which
are followed by a save. Nothing else is done between rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_miniplm.core.manifest import read_json
from megatron_miniplm.models.checkpoint import latest_checkpoint
from tests.runs import TINY, curve, pretrain_flags
from tests.torchrun import kill_all, start_command

EXACT = (
    "iteration", "consumed_samples", "consumed_tokens", "lm loss", "grad norm", "learning rate",
    "global batch size",
)  # fmt: skip
AHEAD = 12
"""A kill comes at most so many updates after the start of a round."""


@dataclass
class Killed:
    """A run that is started and killed, or left alone."""

    corpus: Path
    save: Path
    ranks: int
    iterations: int
    hits: Counter = field(default_factory=Counter)
    """What was killed -> how often."""
    startup_s: float = 10.0
    read: int = 0
    """Bytes of the log that were looked at."""
    updates: int = 0

    def flags(self, *more: str) -> list[str]:
        own = [
            *TINY,
            "--use-distributed-optimizer",
            "--save-interval",
            "3",
            "--save-keep-last",
            "2",
        ]
        return pretrain_flags(self.corpus, self.save, *own, *more, iterations=self.iterations)

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        log = self.save.with_suffix(".log")
        return start_command(self.flags(*more), ranks=self.ranks, log=log)

    def finish(self) -> None:
        """Let it run to its end."""
        code = self.start().wait(timeout=900)
        assert code == 0, self.save.with_suffix(".log").read_text()[-3000:]

    def round(self, number: int, dice: random.Random) -> bool:
        """Start it, and kill it at a random moment; False if it was complete before that."""
        background = number % 2 == 1
        process = self.start(*(["--async-save"] if background else []))
        began, before = time.monotonic(), self._said()
        if dice.random() < 0.25:
            time.sleep(dice.uniform(0, self.startup_s))
        else:
            self._wait_for(process, before + 1)
            self.startup_s = time.monotonic() - began
            first = time.monotonic()
            self._wait_for(process, before + 1 + dice.randint(1, AHEAD))
            updates = max(self._said() - before - 1, 1)
            time.sleep(dice.uniform(0, 2 * (time.monotonic() - first) / updates))
        if process.poll() is not None:
            assert process.returncode == 0, self.save.with_suffix(".log").read_text()[-3000:]
            return False
        writing = bool(list(self.save.glob(".iter_*.tmp")))
        started = self._said() > before
        kill_all(process)
        moment = "in start-up" if not started else "in training"
        if started and writing:
            moment = "while it saved in the background" if background else "while it saved"
        self.hits[moment] += 1
        return True

    def _said(self) -> int:
        """Updates that were logged in all rounds."""
        log = self.save.with_suffix(".log")
        if log.exists():
            with log.open("rb") as file:
                file.seek(self.read)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self.read += len(whole)
            self.updates += whole.count(b"elapsed time per iteration")
        return self.updates

    def _wait_for(self, process: subprocess.Popen[bytes], count: int) -> None:
        deadline = time.monotonic() + 300
        while self._said() < count and process.poll() is None:
            assert time.monotonic() < deadline, "no update in time"
            time.sleep(0.01)


def outcome(save: Path) -> dict[str, Any]:
    """What a finished run has: its rows but for times, and the checksums of its last weights."""
    folder = latest_checkpoint(save)
    assert folder is not None
    files = read_json(folder / "manifest.json")["content"]["files"]
    return {
        "rows": [{name: row.get(name) for name in EXACT} for row in curve(save)],
        "shards": {n: fact["hash"] for n, fact in files.items() if n.endswith(".distcp")},
        "left": sorted(path.name for path in save.glob(".iter_*")),
    }


def left_alone(corpus: Path, folder: Path, *, ranks: int, iterations: int) -> Killed:
    """The run that is not killed."""
    return Killed(corpus, folder / f"whole{ranks}", ranks, iterations)


def survive(
    corpus: Path, folder: Path, *, rounds: int, ranks: int, iterations: int, seed: int = 0
) -> dict[str, int]:
    """Kill runs `rounds` times; each must end like one left alone. What was hit, how often.

    That one is made if it is not there. A run that is complete is followed by another.
    """
    whole = left_alone(corpus, folder, ranks=ranks, iterations=iterations)
    if not whole.save.exists():
        whole.finish()
    hits: Counter = Counter()
    dice = random.Random(seed)
    for life in itertools.count():
        run = Killed(corpus, folder / f"killed{ranks}.{life}", ranks, iterations)
        while hits.total() + run.hits.total() < rounds:
            if not run.round(hits.total() + run.hits.total(), dice):
                break
        else:
            run.finish()
        hits += run.hits
        assert outcome(run.save) == outcome(whole.save)
        if hits.total() == rounds:
            return dict(hits)
    raise AssertionError("unreachable")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(tempfile.mkdtemp()))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.monotonic()
    hits = survive(
        given.corpus, given.folder, rounds=given.rounds, ranks=given.ranks,
        iterations=given.iterations, seed=given.seed,
    )  # fmt: skip
    seconds = round(time.monotonic() - started)
    print(json.dumps({"ranks": given.ranks, "rounds": given.rounds, **hits, "seconds": seconds}))
