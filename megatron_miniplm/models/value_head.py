"""A number for each instance: a linear head on the mean of its final hidden states.

    v(x) = w . (1 / n) sum_j mask_j h_j + b        h: output of the final norm, n: positions of mask

Under sequence parallelism a rank has a part of the positions: w . sum of its part is summed over
the ranks, one number an instance, and the gradient of w with those of the norms. Otherwise every
tensor-parallel rank has all positions and the same gradient. w and b start at 0, as the targets of
training are standardised (`TargetScale`): the first prediction is their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig

from megatron_miniplm.data.scores import ScoreNormalization

VALUE_HEAD = "value_head."
"""How the names of its parameters begin."""


@dataclass(frozen=True, kw_only=True)
class TargetScale:
    """What the numbers of a head mean: r = mean + sd * number, nats."""

    mean: float
    """Of the targets that it was trained on."""
    sd: float
    """Their standard deviation, above 0."""
    score_normalization: ScoreNormalization
    """Whether a target is of a token on average, or of the whole instance."""

    def standardised(self, nats: torch.Tensor) -> torch.Tensor:
        """Targets as the head is trained on them."""
        return (nats - self.mean) / self.sd

    def nats(self, numbers: np.ndarray) -> np.ndarray:
        """What numbers of the head say, float64."""
        return self.mean + self.sd * numbers.astype(np.float64)


class ValueHead(torch.nn.Module):
    """The head's parameters, on the last pipeline stage; every tensor-parallel rank has a copy."""

    def __init__(self, config: TransformerConfig, *, tp_rank: int) -> None:
        super().__init__()
        self.tp_rank, self.divided = tp_rank, config.sequence_parallel
        self.weight = torch.nn.Parameter(
            torch.zeros(1, config.hidden_size, dtype=config.params_dtype)
        )
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        self.weight.sequence_parallel = self.divided  # type: ignore[attr-defined]

    def forward(self, hidden_sbh: torch.Tensor, mask_bs: torch.Tensor) -> torch.Tensor:
        """[b] numbers, fp32 (fp64 of fp64); b where no position is in the mask.

        `hidden_sbh`: this rank's positions; `mask_bs`: which of all positions count.
        """
        length = hidden_sbh.shape[0]
        first = self.tp_rank * length if self.divided else 0
        mine_sb = mask_bs.t()[first : first + length]
        dtype = torch.promote_types(hidden_sbh.dtype, torch.float32)
        # Hidden states that do not count may be anything.
        total_bh = torch.where(mine_sb[..., None], hidden_sbh, 0).sum(0, dtype=dtype)
        total_b = total_bh @ self.weight[0].to(dtype)
        if self.divided:
            total_b = reduce_from_tensor_model_parallel_region(total_b)
        return total_b / mask_bs.sum(1).clamp(min=1) + self.bias.to(dtype)
