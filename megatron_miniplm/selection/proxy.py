"""What a proxy predicts of the difference, in the place of two models' scores (MiniPLM-proxy).

The prediction ranks all instances, also those that the proxy was trained on and whose exact
difference is known (arXiv 2410.17215, appendix C.3).
"""

from __future__ import annotations

import numpy as np

from megatron_miniplm.selection.registry import SELECTORS, SelectorInput


@SELECTORS.register("proxy")
def proxy(inputs: SelectorInput) -> np.ndarray:
    """float64[N]: the predicted difference, nats."""
    return inputs.predicted_difference.copy()
