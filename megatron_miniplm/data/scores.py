"""How likely one model finds every instance of one corpus: see `data.columns` for the folder.

``sum_nll.npy`` (float32[N], nats) and ``num_tokens.npy`` (int32[N]).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.data.columns import ColumnWriter, ScoredColumns

ScoreNormalization = Literal["mean", "sum"]
"""Of a token on average, or of the whole instance (Eq. 4)."""


def check_finite(
    sum_nll: np.ndarray, num_tokens: np.ndarray, *, what: str, first_row: int = 0
) -> None:
    """Refuse NaN, infinite and negative sums, and negative counts, naming the first bad row."""
    bad = np.flatnonzero(~np.isfinite(sum_nll) | (sum_nll < 0) | (num_tokens < 0))
    if len(bad):
        at = bad[0]
        raise DataError(
            f"{what}: row {first_row + at} has sum_nll {sum_nll[at]} over {num_tokens[at]} tokens, "
            f"and {len(bad) - 1} more rows are broken: look at the model and its precision, and "
            f"score again"
        )


class Scores(ScoredColumns):
    """Finished scores."""

    kind = "scores"
    dtypes = {"sum_nll": np.dtype(np.float32), "num_tokens": np.dtype(np.int32)}  # noqa: RUF012

    @property
    def sum_nll(self) -> np.ndarray:
        """float32[N], nats."""
        return self.columns["sum_nll"]

    @property
    def num_tokens(self) -> np.ndarray:
        """int32[N]."""
        return self.columns["num_tokens"]

    def mean_nll(self) -> np.ndarray:
        """float64[N], nats a token; 0 for an instance without a scored token."""
        return self.sum_nll.astype(np.float64) / np.maximum(self.num_tokens, 1)

    @staticmethod
    def refuse_broken(columns: Mapping[str, np.ndarray], *, what: str, first_row: int = 0) -> None:
        """See `check_finite`."""
        check_finite(columns["sum_nll"], columns["num_tokens"], what=what, first_row=first_row)


class ScoreWriter(ColumnWriter):
    """Fills a folder of scores: windows of (sum of NLL in nats, number of tokens)."""

    made = Scores

    def _check(self, columns: Mapping[str, np.ndarray], rows: range, what: str) -> None:
        counts, most = columns["num_tokens"], self._corpus.lengths[rows.start : rows.stop] - 1
        if (counts > most).any():
            at = int(np.argmax(counts > most))
            raise DataError(f"{what}: row {at} counts {counts[at]} tokens, it predicts {most[at]}")

    def _facts(self, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
        total = int(columns["num_tokens"].sum(dtype=np.int64))
        return {
            "num_tokens": total,
            "mean_nll": float(columns["sum_nll"].sum(dtype=np.float64) / max(total, 1)),
        }
