"""The environment variable that says who computes token losses, and its values."""

from __future__ import annotations

import os
from typing import Literal, cast, get_args

from megatron_miniplm.core.errors import ConfigError

VARIABLE = "MINIPLM_KERNELS"
Choice = Literal[
    "auto",  # the fastest that runs
    "reference",  # plain torch
    # The kernel of a GPU where one rank has the whole vocabulary; over several, there is one way.
    "triton-one-read",
    "triton-two-pass",
]


def chosen() -> Choice:
    """The value of the variable; "auto" without one."""
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in get_args(Choice):
        raise ConfigError(f"{VARIABLE}={choice} must be one of {', '.join(get_args(Choice))}")
    return cast(Choice, choice)
