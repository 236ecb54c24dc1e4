"""The four ways a run can be refused, named by whose fault it is.

A message has three parts: what is wrong, both values, what to do.
"""

from __future__ import annotations


class MiniPLMError(Exception):
    """Base of every error that is shown to the user without a traceback."""


class ConfigError(MiniPLMError):
    """The flags are wrong: unknown, contradictory, or out of range."""


class DataError(MiniPLMError):
    """Bytes are wrong: a truncated, corrupt, malformed or non-finite input."""


class LineageError(MiniPLMError):
    """Artifacts are each fine but do not belong together."""


class CheckpointError(MiniPLMError):
    """A checkpoint or model folder is incomplete, corrupt, or of another shape."""
