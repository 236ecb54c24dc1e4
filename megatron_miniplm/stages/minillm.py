"""``minillm``: corpus and teacher -> student that was trained on what it writes itself.

It is `pretrain --objective minillm --teacher online` under a name of its own: each goes on with a
run of the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.stages import pretrain
from megatron_miniplm.training.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Train a student on what it writes itself (MiniLLM); the same command continues a run."""

    objective: str = "minillm"
    """minillm; for others, use `pretrain`."""
    teacher: str | None = "online"
    """online: the teacher mixes with the student as it writes, and judges what was written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective != "minillm":
            raise ConfigError(f"--objective {self.objective}: use `miniplm pretrain` for that")


run = pretrain.run
