"""How many instances an update takes: a constant, or ramped up as Megatron does it.

With ``--rampup-batch-size START INCREMENT SAMPLES`` the size after c consumed samples is

    START + INCREMENT * int(c / (SAMPLES / steps))      steps = (global size - START) / INCREMENT

until c exceeds SAMPLES. So the size is a function of the consumed samples, like the data order.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

from megatron_miniplm.core.errors import ConfigError


class _Stage(NamedTuple):
    """Updates of one size."""

    update: int
    """The first one, from 0."""
    consumed: int
    """Samples before it."""
    size: int


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Instances of a forward pass and of an update, and who reads them."""

    micro_batch_size: int = 8
    """Instances of one forward pass on one rank."""
    global_batch_size: int = 512
    """Instances of one update, over all ranks and micro-batches."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """START INCREMENT SAMPLES: begin with updates of START instances and go up to
    --global-batch-size by INCREMENT, in equal steps over the first SAMPLES instances."""
    num_workers: int = 2
    """Threads of a rank that read batches ahead, each one update; 0: read when it is needed."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ConfigError(f"--num-workers {self.num_workers} must not be negative")
        if self.rampup_batch_size is None:
            return
        start, increment, samples = self.rampup_batch_size
        said = f"--rampup-batch-size {start} {increment} {samples}"
        if min(self.rampup_batch_size) < 1:
            raise ConfigError(f"{said}: all three must be at least 1")
        if start >= self.global_batch_size or (self.global_batch_size - start) % increment:
            raise ConfigError(
                f"{said} does not lead from {start} to --global-batch-size "
                f"{self.global_batch_size} in whole steps of {increment}"
            )

    def size_after(self, consumed: int) -> int:
        """Instances of the update that follows after so many consumed samples."""
        if self.rampup_batch_size is None:
            return self.global_batch_size
        start, increment, samples = self.rampup_batch_size
        if consumed > samples:
            return self.global_batch_size
        # Megatron's very expression: in exact arithmetic a step could come an update apart.
        steps = (self.global_batch_size - start) // increment
        return start + increment * int(consumed / (samples / steps))

    def samples_after(self, updates: int) -> int:
        """Samples that the first so many updates consume."""
        stage = self._stages[bisect_right(self._stages, updates, key=lambda s: s.update) - 1]
        return stage.consumed + (updates - stage.update) * stage.size

    def updates_of(self, samples: int | Fraction) -> Fraction:
        """Updates that consume so many samples, counting the last one in part."""
        stage = self._stages[bisect_right(self._stages, samples, key=lambda s: s.consumed) - 1]
        return stage.update + Fraction(samples - stage.consumed) / stage.size

    def samples_begun(self, samples: int) -> int:
        """Samples of the updates that begin within the first so many."""
        return self.samples_after(math.ceil(self.updates_of(samples)))

    @property
    def batch_sizes(self) -> list[int]:
        """Every size that an update has."""
        return [stage.size for stage in self._stages]

    @cached_property
    def _stages(self) -> list[_Stage]:
        """The sizes in order, and where each begins."""
        stages = [_Stage(0, 0, self.size_after(0))]
        while self.rampup_batch_size and stages[-1].size < self.global_batch_size:
            update, consumed, size = stages[-1]
            most = self.rampup_batch_size[2] // size + 2
            count = 1 + bisect_right(
                range(1, most), size, key=lambda n: self.size_after(consumed + n * size)
            )
            consumed += count * size
            stages.append(_Stage(update + count, consumed, self.size_after(consumed)))
        return stages
