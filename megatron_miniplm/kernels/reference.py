"""Cross entropy on one shard of logits, in plain torch: the definition of the loss.

    nll = logsumexp(z over real columns) - z_gold
    dnll/dz = softmax(z) - onehot(gold),  0 in columns that are not real

Shapes: N tokens, v columns of this shard. Labels are global ids; a label outside the shard
contributes nothing here. Floats are those of `logits_Nv` (fp32 in training; fp64 in tests).
"""

from __future__ import annotations

import torch

_NO_COLUMN = -1e30  # maximum of a shard without a real column: finite, so that no NaN arises


def softmax_record(
    logits_Nv: torch.Tensor, labels_N: torch.Tensor, *, first: int, valid: int
) -> torch.Tensor:
    """(max, sum exp(z - max), z_gold or 0) of the first `valid` columns: [N, 3]."""
    if valid == 0:
        record = logits_Nv.new_zeros((logits_Nv.shape[0], 3))
        record[:, 0] = _NO_COLUMN
        return record
    real_Nv = logits_Nv[:, :valid]
    maximum = real_Nv.amax(-1)
    total = (real_Nv - maximum[:, None]).exp_().sum(-1)
    owned, column = _own_column(labels_N, first, valid)
    gold = torch.where(owned, real_Nv.gather(-1, column[:, None])[:, 0], 0.0)
    return torch.stack([maximum, total, gold], dim=-1)


def cross_entropy_grad_(
    logits_Nv: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    lse_N: torch.Tensor,
    weight_N: torch.Tensor,
    first: int,
    valid: int,
) -> torch.Tensor:
    """Overwrite logits by weight * (softmax - onehot); columns from `valid` on become 0."""
    logits_Nv[:, valid:] = 0
    if valid == 0:
        return logits_Nv
    real_Nv = logits_Nv[:, :valid]
    real_Nv.sub_(lse_N[:, None]).exp_()
    owned, column = _own_column(labels_N, first, valid)
    real_Nv.scatter_add_(-1, column[:, None], -owned[:, None].to(real_Nv.dtype))
    return logits_Nv.mul_(weight_N[:, None])


def _own_column(
    labels_N: torch.Tensor, first: int, valid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    local = labels_N - first
    owned = (local >= 0) & (local < valid)
    return owned, torch.where(owned, local, 0)
