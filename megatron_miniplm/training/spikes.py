"""Loss spikes: an update whose loss stands out from the last ones is said, with rows, or left out.

The rule is OLMo's: more than some standard deviations above the mean of the last 128 losses. Every
loss joins them, also that of an update that was left out, so a run whose loss has moved to another
level goes on.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.parallel.ranks import ONE_RANK, Ranks

WINDOW = 128
_ENOUGH = WINDOW // 2


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """What happens at a loss spike."""

    loss_spike_stds: float = 6.0
    """A loss is a spike from so many standard deviations above the mean of the last 128 updates
    on."""
    on_loss_spike: Literal["warn", "skip", "ignore"] = "warn"
    """At a spike, say the rows of its worst micro-batch; skip: and leave the update out."""

    def __post_init__(self) -> None:
        if self.loss_spike_stds <= 0:
            raise ConfigError(f"--loss-spike-stds {self.loss_spike_stds} must be above 0")


@dataclass(kw_only=True)
class SpikeDetector:
    """Looks at the loss of every update, the same on every rank."""

    config: SpikeConfig
    say_rows: Callable[[np.ndarray], str]
    """Rows of the training data in words."""
    ranks: Ranks = ONE_RANK
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """The last losses, oldest first: a part of the state of a run."""

    def allows(
        self,
        name: str,
        loss: float,
        reports: Sequence[Mapping[str, torch.Tensor]],
        batches: Sequence[Batch],
    ) -> bool:
        """False: leave this update out. `loss`: of the global batch, the metric `name`.

        `reports`: (sum, count) of every metric of each micro-batch of this rank.
        """
        recent = list(self.recent)
        self.recent.append(loss)
        if self.config.on_loss_spike == "ignore" or len(recent) < _ENOUGH:
            return True
        mean, deviation = statistics.fmean(recent), statistics.stdev(recent)
        if loss <= mean + self.config.loss_spike_stds * deviation:
            return True
        mine = max(
            (
                (float(report[name][0] / report[name][1]), batch.rows_b.tolist())
                for report, batch in zip(reports, batches, strict=False)
            ),
            default=(-1.0, []),
        )
        every = self.ranks.gather(mine)
        rank = max(range(len(every)), key=lambda at: every[at][0])
        worst, rows = every[rank]
        skip = self.config.on_loss_spike == "skip"
        if self.ranks.rank != 0:
            return not skip
        get_logger().warning(
            "%s %.4f is a spike, %.1f standard deviations above the mean %.4f of the last %d "
            "updates%s; it is %.4f on %s (rank %d; `miniplm inspect --rows` shows them)",
            name, loss, (loss - mean) / deviation if deviation else float("inf"), mean,
            len(recent), ": this update is left out" if skip else "", worst,
            self.say_rows(np.array(rows, np.int64)), rank,
        )  # fmt: skip
        return not skip
