"""What a selector is: a pure function from scores to one key an instance; higher keys are kept.

How many are kept, ties and non-finite keys are the same for all of them: `top_k`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.registry import Registry


@dataclass(frozen=True, kw_only=True)
class SelectorInput:
    """What a selector may look at; all arrays have one row an instance, in one order."""

    ids: np.ndarray
    """int64[N], instance ids in the root corpus."""
    seed: int
    """Seed of selectors that draw."""
    teacher_scores: np.ndarray | None = None
    """float64[N], the teacher's negative log-likelihoods in nats (`inputs`)."""
    reference_scores: np.ndarray | None = None
    """float64[N], the same under the reference."""
    proxy_scores: np.ndarray | None = None
    """float64[N], the difference of these two in nats, as a proxy predicts it."""

    @property
    def predicted_difference(self) -> np.ndarray:
        """The proxy's column; refuses to go on without it."""
        return _required(self.proxy_scores, "--proxy-scores", "`score --head proxy` makes them")

    @property
    def teacher_nll(self) -> np.ndarray:
        """The teacher's column; refuses to go on without it."""
        return _required(self.teacher_scores, "--teacher-scores")

    @property
    def reference_nll(self) -> np.ndarray:
        """The reference's column; refuses to go on without it."""
        return _required(self.reference_scores, "--reference-scores")


Selector = Callable[[SelectorInput], np.ndarray]
SELECTORS: Registry[Selector] = Registry("selector")


def _required(
    column: np.ndarray | None, flag: str, remedy: str = "`score` makes them"
) -> np.ndarray:
    if column is None:
        raise ConfigError(f"this selector needs {flag}; {remedy}")
    return column
