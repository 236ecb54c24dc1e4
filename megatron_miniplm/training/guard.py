"""The look at losses and gradients before an update: what is not a number never reaches weights.

It costs a pass over the gradients in memory and one small all-reduce. Who, what and where are
asked for only once something is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.parallel.topology import Topology

_SAID = 8
"""Ranks that a message names."""


class NotFiniteError(DataError):
    """Too many updates are not finite: raised on every rank, so that they stop in good order."""


@dataclass(kw_only=True)
class UpdateGuard:
    """Decides whether an update may be taken, the same on every rank."""

    topology: Topology
    may_skip: int = 0
    """Updates in a row that may be left out; the next one stops the run."""
    skipped: int = 0
    """Updates in a row that were left out."""
    say_rows: Callable[[np.ndarray], str]
    """Rows of the training data in words."""

    def allows(
        self,
        reports: Sequence[Mapping[str, torch.Tensor]],
        batches: Sequence[Batch],
        wrapped: Sequence[DistributedDataParallel],
    ) -> bool:
        """False: leave this update out. Raises `NotFiniteError` when there were too many.

        `reports`: (sum, count) of every metric of each micro-batch of this rank, not yet reduced.
        """
        sums = [value[0] for report in reports for value in report.values()]
        # On a CPU nine times faster than the infinity norm; both are NaN where one gradient is.
        extremes = [
            extreme.double()
            for chunk in wrapped
            for buffer in chunk.buffers
            for extreme in torch.aminmax(buffer.grad_data)
        ]
        # One wait for the device, whatever the number of micro-batches.
        if not self.topology.any_rank(not bool(torch.stack(sums + extremes).isfinite().all())):
            self.skipped = 0
            return True
        said = self._everywhere(_words(reports, batches, wrapped, self.say_rows))
        if self.skipped >= self.may_skip:
            after = f", after {self.skipped} updates that were left out" if self.skipped else ""
            raise NotFiniteError(
                f"{said}: stopped before the update{after}; look at the rows with `miniplm inspect "
                "--rows`, go on with --on-nan-skip, which leaves such updates out, or start a run "
                "of a lower --lr from a checkpoint (--load --finetune and another --save)"
            )
        self.skipped += 1
        get_logger().warning(
            "%s: this update is left out (%d in a row, at most %d)",
            said, self.skipped, self.may_skip,
        )  # fmt: skip
        return False

    def _everywhere(self, mine: str) -> str:
        """What every rank has to say, where there is anything."""
        every = [f"rank {rank}: {text}" for rank, text in enumerate(self.topology.gather(mine))]
        found = [text for text in every if not text.endswith(": ")]
        more = f" and on {len(found) - _SAID} more ranks" if len(found) > _SAID else ""
        return "; ".join(found[:_SAID]) + more


def _finite(value: torch.Tensor) -> bool:
    return bool(value.isfinite().all())


def _words(
    reports: Sequence[Mapping[str, torch.Tensor]],
    batches: Sequence[Batch],
    wrapped: Sequence[DistributedDataParallel],
    say_rows: Callable[[np.ndarray], str],
) -> str:
    """What is wrong on this rank; empty if nothing is."""
    parts = []
    bad = [at for at, report in enumerate(reports) if not all(map(_finite, report.values()))]
    for at in bad[:1]:
        name, value = next((name, v) for name, v in reports[at].items() if not _finite(v))
        parts.append(
            f"{name} is {float(value[0])} on {say_rows(batches[at].rows_b.cpu().numpy())}"
            + (f" and {len(bad) - 1} more micro-batches" if len(bad) > 1 else "")
        )
    parameters = [
        (name.replace("module.", ""), parameter)
        for chunk in wrapped
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad
    ]
    for what, broken in (
        ("weight", [name for name, weight in parameters if not _finite(weight.data)]),
        ("gradient of", [name for name, weight in parameters if not _finite(weight.main_grad)]),
    ):
        if broken:
            parts.append(f"the {what} {broken[0]} (of {len(broken)} parameters) is not finite")
    return ", ".join(parts)
