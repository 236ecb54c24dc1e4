"""Random columns of a distribution over a divided vocabulary.

The R draws of a token are stratified: draw r inverts the distribution function at (r + u_r) / R, of
independent u_r. A column is still drawn R pi times on average, so what is weighted by its draws is
unbiased, with a smaller variance than of independent draws.

Shapes: C tokens, v columns of this rank, R draws, W ranks.
"""

from __future__ import annotations

import torch

from megatron_miniplm.data.sparse_logits import NO_ENTRY
from megatron_miniplm.parallel.vocab import VocabShard, gather_shards

_FP64_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
"""Memory of the distribution functions that are drawn from at once."""


def draw(
    real_Cv: torch.Tensor,
    uniform_CR: torch.Tensor,
    maximum_C: torch.Tensor,
    shard: VocabShard,
    power: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """R columns of every token by pi ~ exp(power * logit), the same on all ranks.

    Logits of real columns, `uniform_CR` in [0, 1) and `maximum_C` at least all logits. Gives global
    ids (one that is drawn several times is there once, the others are `NO_ENTRY`, as all are where
    every logit is -1e30), their logits, and log (share of the draws / pi), [C, R] each; fp64.
    """
    step = max(1, _FP64_BYTES[real_Cv.device.type] // (8 * shard.size))
    parts = []
    for start in range(0, real_Cv.shape[0], step):
        part = slice(start, start + step)
        parts.append(_draw(real_Cv[part], uniform_CR[part], maximum_C[part], shard, power))
    ids_CR, logits_CR, log_total_C = (torch.cat(found) for found in zip(*parts, strict=True))
    draws = ids_CR.shape[1]
    # Draws come in the order of columns, equal ones side by side: the first stands for them all.
    first_CR = ids_CR != ids_CR.roll(1, 1)
    first_CR[:, 0] = True
    number_R = torch.arange(draws, device=ids_CR.device)
    run_CR = torch.where(first_CR, number_R, 0).cummax(1).values
    count_CR = torch.zeros_like(ids_CR).scatter_add_(1, run_CR, torch.ones_like(ids_CR))
    log_pi_CR = power * (logits_CR - maximum_C[:, None]) - log_total_C[:, None]
    ids_CR = torch.where(first_CR, ids_CR, NO_ENTRY)
    return ids_CR, logits_CR, (count_CR / draws).log() - log_pi_CR


def _draw(
    real_Cv: torch.Tensor,
    uniform_CR: torch.Tensor,
    maximum_C: torch.Tensor,
    shard: VocabShard,
    power: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws of some rows: (ids [C, R], their logits, log of the sum of all weights [C])."""
    draws = uniform_CR.shape[1]
    to_here_Cv = (power * (real_Cv.double() - maximum_C[:, None])).exp_().cumsum_(1)
    mine_C = to_here_Cv[:, -1] if real_Cv.shape[1] else torch.zeros_like(maximum_C)
    ends_WC = gather_shards(mine_C, shard).cumsum(0)
    total_C, number_R = ends_WC[-1], torch.arange(draws, device=real_Cv.device)
    below = 1 - 2.0**-52  # a target is below the end of what it is sought in, rounded or not
    target_CR = (number_R + uniform_CR) / draws * total_C[:, None] * below
    rank_CR = torch.searchsorted(ends_WC.t().contiguous(), target_CR, right=True)
    starts_WC = torch.cat([torch.zeros_like(ends_WC[:1]), ends_WC])
    ids_CR = torch.zeros_like(target_CR, dtype=torch.int64)
    logits_CR = torch.zeros_like(target_CR)
    here = rank_CR == shard.first // shard.size
    if real_Cv.shape[1]:
        start_C = starts_WC[shard.first // shard.size]
        inside_CR = torch.minimum(target_CR - start_C[:, None], mine_C[:, None] * below)
        column_CR = torch.searchsorted(to_here_Cv, inside_CR, right=True)
        column_CR = column_CR.clamp_max(real_Cv.shape[1] - 1)
        ids_CR = torch.where(here, column_CR + shard.first, 0)
        logits_CR = torch.where(here, real_Cv.gather(1, column_CR).double(), 0)
    ids_CR, logits_CR = gather_shards(ids_CR, shard).sum(0), gather_shards(logits_CR, shard).sum(0)
    return ids_CR.masked_fill(total_C[:, None] <= 0, NO_ENTRY), logits_CR, total_C.log()
