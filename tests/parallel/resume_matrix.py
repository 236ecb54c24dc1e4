"""Save in one layout, go on in another: how far the losses are from the uninterrupted run's.

python -m tests.parallel.resume_matrix CORPUS        # prints the whole table, as Markdown
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from megatron_miniplm.models.checkpoint import LATEST
from tests.pool import RankPool
from tests.runs import INTERLEAVED, PP2, TP2, curve, pretrain_flags

ZERO = "--use-distributed-optimizer"
STEPS = 10
"""Updates before the save, and again after it."""

# name -> (ranks, flags), all with the distributed optimizer
LAYOUTS = {
    "one process": (1, ZERO),
    "TP2": (2, f"{TP2} {ZERO}"),
    "TP2 + SP": (2, f"{TP2} --sequence-parallel {ZERO}"),
    "PP2": (2, f"{PP2} {ZERO}"),
    "PP2 interleaved": (2, f"{INTERLEAVED} {ZERO}"),
    "DP2": (2, ZERO),
    "TP2 x DP2": (4, f"{TP2} {ZERO}"),
    "TP2 x PP2": (4, f"{TP2} {PP2} {ZERO}"),
}


@dataclass
class Runs:
    """Runs of one corpus, each made once."""

    pool: RankPool
    corpus: Path
    folder: Path
    made: dict[tuple[int, str], tuple[Path, Path]] = field(default_factory=dict)

    def __call__(self, world: int, flags: str) -> tuple[Path, Path]:
        """(uninterrupted run, the same as it was when it had saved half way) of a layout."""
        if (world, flags) not in self.made:
            whole = self.folder / f"whole{len(self.made)}"
            self._train(whole, world, f"{flags} --save-interval {STEPS}")
            half = self.folder / f"half{len(self.made)}"
            shutil.copytree(whole, half, ignore=shutil.ignore_patterns(f"iter_*{2 * STEPS}"))
            (half / LATEST).write_text(f"{STEPS}\n")
            rows = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
            (half / "metrics.jsonl").write_text("".join(rows[:STEPS]))
            self.made[world, flags] = whole, half
        return self.made[world, flags]

    def move(self, source: tuple[int, str], target: tuple[int, str]) -> tuple[float, bool]:
        """Over the updates after the save: (largest difference of a loss, no bit differs).

        The updates before it must be the same.
        """
        whole, half = self(*source)
        run = self.folder / "moved"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(half, run)
        self._train(run, *target)
        found, expected = ([_exact(row) for row in curve(path)] for path in (run, whole))
        assert len(found) == len(expected) == 2 * STEPS
        assert found[:STEPS] == expected[:STEPS]
        worst = max(abs(a[0] - b[0]) for a, b in zip(found, expected, strict=True))
        return worst, found == expected

    def _train(self, save: Path, world: int, flags: str) -> None:
        words = pretrain_flags(self.corpus, save, *flags.split(), iterations=2 * STEPS)
        self.pool.run(words, world)


def _exact(row: dict) -> tuple[float, float]:
    return row["lm loss"], row["grad norm"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    corpus = parser.parse_args().corpus
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(4, Path(folder))
        try:
            runs = Runs(pool, corpus, Path(folder))
            print(
                "| saved in | " + " | ".join(LAYOUTS) + " |\n" + "|---" * (len(LAYOUTS) + 1) + "|"
            )
            for name, source in LAYOUTS.items():
                found = [runs.move(source, target) for target in LAYOUTS.values()]
                cells = ["bitwise" if same else f"{worst:.1e}" for worst, same in found]
                print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        finally:
            pool.close()


if __name__ == "__main__":
    main()
