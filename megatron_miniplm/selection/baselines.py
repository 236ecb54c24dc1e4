"""Selectors to compare with: each half of the difference alone, and chance."""

from __future__ import annotations

import numpy as np

from megatron_miniplm.selection.registry import SELECTORS, SelectorInput
from megatron_miniplm.selection.split import uniform_keys

RANDOM_PURPOSE = "random selector"


@SELECTORS.register("teacher")
def teacher(inputs: SelectorInput) -> np.ndarray:
    """float64[N]: log p, so that what the teacher finds likeliest is kept."""
    return -inputs.teacher_nll


@SELECTORS.register("reference")
def reference(inputs: SelectorInput) -> np.ndarray:
    """float64[N]: -log p_ref, so that what the reference finds hardest is kept."""
    return inputs.reference_nll.copy()


@SELECTORS.register("random")
def random(inputs: SelectorInput) -> np.ndarray:
    """float64[N] in [0, 1): a draw for each instance id, whatever corpus it is met in."""
    return uniform_keys(inputs.ids, inputs.seed, purpose=RANDOM_PURPOSE)
