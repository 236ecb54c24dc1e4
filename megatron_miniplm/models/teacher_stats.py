"""How sure a teacher is of each token, out of its logits: what adaptive temperatures look at.

Under TP one all-gather of seven floats a token; everything is relative to the maximum.

Shapes: C tokens, v columns of this rank, V real columns over all W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_miniplm.kernels.record import NO_COLUMN
from megatron_miniplm.models.logit_loss import rows_at_once
from megatron_miniplm.parallel.vocab import VocabShard, gather_shards


@dataclass(frozen=True, kw_only=True)
class TeacherStats:
    """Of each token, at temperature 1, over the real vocabulary; any one shape."""

    entropy: torch.Tensor
    """Nats."""
    logit_std: torch.Tensor
    """Standard deviation of the logits, by V - 1 as `torch.std` has it."""
    power_sum: torch.Tensor
    """Sum of q^power: 1 at power 1."""


def dense_stats(logits_Cv: torch.Tensor, shard: VocabShard, *, power: float) -> TeacherStats:
    """Of a chunk of a teacher's logits; all [C], fp32 (fp64 of fp64). The same on all ranks."""
    step = rows_at_once(logits_Cv, shard)
    records = [_record(part, shard, power) for part in logits_Cv.split(step)]
    maximum, total, sum_xe, powers, count, mean, square = gather_shards(
        torch.cat(records), shard
    ).unbind(-1)
    top = maximum.amax(0)
    below = maximum - top
    weight = below.exp()
    # e^x x with x relative to the new maximum.
    sum_xe = (weight * (sum_xe + total * below)).sum(0)
    total = (weight * total).sum(0)
    powers = ((power * below).exp() * powers).sum(0)
    columns = count.sum(0)
    means = torch.where(count > 0, mean + below, 0)
    overall = (count * means).sum(0) / columns
    square = (square + count * (means - overall).square()).sum(0)
    return TeacherStats(
        entropy=total.log() - sum_xe / total,
        logit_std=(square / (columns - 1).clamp_min(1)).sqrt(),
        power_sum=powers * total.pow(-power),
    )


def _record(logits_Cv: torch.Tensor, shard: VocabShard, power: float) -> torch.Tensor:
    """[C, 7]: maximum; sums of e^x, x e^x, e^(power x); number, mean, squared deviations of x."""
    wide = torch.float64 if logits_Cv.dtype == torch.float64 else torch.float32
    x = logits_Cv[:, : shard.local_valid].to(wide, copy=True)
    if not shard.local_valid:
        nothing = x.new_zeros((len(x), 7))
        nothing[:, 0] = NO_COLUMN
        return nothing
    maximum = x.amax(-1)
    x -= maximum[:, None]
    exp = x.exp()
    mean = x.mean(-1)
    parts = (
        maximum, exp.sum(-1), (x * exp).sum(-1), (power * x).exp().sum(-1),
        torch.full_like(mean, x.shape[1]), mean, (x - mean[:, None]).square().sum(-1),
    )  # fmt: skip
    return torch.stack(parts, dim=-1)
