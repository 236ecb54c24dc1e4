"""What a proxy predicts for every instance of one corpus: see `data.columns` for the folder.

``difference.npy`` (float32[N], nats): r = log p - log p_ref as it would come from two models'
scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.data.columns import ColumnWriter, ScoredColumns


class Predictions(ScoredColumns):
    """Finished predictions."""

    kind = "predictions"
    dtypes = {"difference": np.dtype(np.float32)}  # noqa: RUF012

    @property
    def difference(self) -> np.ndarray:
        """float32[N], nats."""
        return self.columns["difference"]

    @staticmethod
    def refuse_broken(columns: Mapping[str, np.ndarray], *, what: str, first_row: int = 0) -> None:
        """Refuse NaN and infinite predictions."""
        bad = np.flatnonzero(~np.isfinite(columns["difference"]))
        if len(bad):
            raise DataError(
                f"{what}: the prediction for row {first_row + bad[0]} is "
                f"{columns['difference'][bad[0]]}, and {len(bad) - 1} more are not finite: look at "
                "the proxy and its precision, and score again"
            )


class PredictionWriter(ColumnWriter):
    """Fills a folder of predictions: windows of differences in nats."""

    made = Predictions

    def _facts(self, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {"mean_difference": float(columns["difference"].mean(dtype=np.float64))}
