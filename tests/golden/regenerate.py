"""Write the golden numbers anew: ``python -m tests.golden.regenerate``; say why in the commit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.golden.pipeline import GOLDEN, run_pipeline
from tests.pool import RankPool


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(1, Path(folder))
        try:
            numbers = run_pipeline(pool, Path(folder) / "pipeline")
        finally:
            pool.close()
    GOLDEN.write_text(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
