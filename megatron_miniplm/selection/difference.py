"""Difference sampling, the selector of MiniPLM (paper Eq. 4; spec: r is a difference of logs).

    r(x) = log p(x) - log p_ref(x) = nll_reference(x) - nll_teacher(x)

High r: the teacher knows what the reference does not, hard and valuable. r near 0 with both sure:
easy. Low r: noise. (The README of the released code writes a ratio of the logs; ranking by that
would keep the noise.)
"""

from __future__ import annotations

import numpy as np

from megatron_miniplm.selection.registry import SELECTORS, SelectorInput


@SELECTORS.register("difference")
def difference(inputs: SelectorInput) -> np.ndarray:
    """float64[N]: reference NLL minus teacher NLL, nats."""
    return inputs.reference_nll - inputs.teacher_nll
