"""What a teacher says of each token as a whole, out of its logits: how sure it is, among others.

By the records of the token losses (`kernels.record`), so one or two reads of the logits, and under
TP an all-gather of 16 floats a token for each.

Shapes: C tokens, K columns of each, v columns of this rank, V real columns over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_miniplm.kernels import backend_for
from megatron_miniplm.kernels.record import Field, merge, unpack
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens
from megatron_miniplm.parallel.vocab import VocabShard, gather_shards


@dataclass(frozen=True, kw_only=True)
class TeacherStats:
    """What adaptive temperatures look at, at temperature 1, over the real vocabulary; any shape."""

    entropy: torch.Tensor
    """Nats."""
    logit_std: torch.Tensor
    """Standard deviation of the logits, by V - 1 as `torch.std` has it."""
    power_sum: torch.Tensor
    """Sum of q^(1/T), where somebody asks for it; else 1."""


def dense_stats(
    logits_Cv: torch.Tensor, shard: VocabShard, *, temperature: float | None
) -> TeacherStats:
    """Of a chunk of a teacher's logits; all [C], fp64, the same on all ranks.

    `temperature`: T of the power sum; None: nobody asks for it.
    """
    labels_C = torch.zeros(len(logits_Cv), dtype=torch.int64, device=logits_Cv.device)
    asked = [] if temperature is None else [temperature]
    whole = Whole.of(logits_Cv, labels_C, shard, asked)
    powers = [log_sum.exp() for log_sum in whole.log_partitions.values()]
    return TeacherStats(
        entropy=whole.entropy,
        logit_std=whole.logit_std,
        power_sum=powers[0] if powers else torch.ones_like(whole.entropy),
    )


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What all real columns of a token come to; [C] fp64, the same on all ranks."""

    maximum: torch.Tensor
    log_sum: torch.Tensor
    """Log-sum-exp less the maximum."""
    gold_log_prob: torch.Tensor
    entropy: torch.Tensor
    logit_std: torch.Tensor
    log_partitions: dict[float, torch.Tensor]

    @classmethod
    def of(
        cls,
        logits_Cv: torch.Tensor,
        labels_C: torch.Tensor,
        shard: VocabShard,
        temperatures: Sequence[float],
    ) -> Whole:
        """By the records of the token losses, of the logits against themselves.

        At scales 2 and 1, the difference of "student" and "teacher" is the logits: its squared
        deviations are their variance.
        """
        part = _record(logits_Cv, labels_C, shard, scale=2.0)
        log_sum = part[Field.SUM_T].log()
        at = {
            tau: _record(logits_Cv, labels_C, shard, scale=1 / tau)[Field.SUM_S].log()
            for tau in temperatures
        }
        return cls(
            maximum=part[Field.MAX_T],
            log_sum=log_sum,
            gold_log_prob=part[Field.GOLD_T] - part[Field.MAX_T] - log_sum,
            entropy=log_sum - part[Field.ENTROPY] / part[Field.SUM_T],
            logit_std=(part[Field.SQUARE_D] / (part[Field.COLUMNS] - 1).clamp_min(1)).sqrt(),
            log_partitions={tau: z - log_sum / tau for tau, z in at.items()},
        )

    def log_probs(self, logits_CK: torch.Tensor) -> torch.Tensor:
        """Of logits of the same tokens, fp64."""
        return logits_CK.double() - self.maximum[:, None] - self.log_sum[:, None]

    def mass_left(
        self, logits_Cv: torch.Tensor, labels_C: torch.Tensor, shard: VocabShard
    ) -> torch.Tensor:
        """Probability of the columns that nobody has removed."""
        part = _record(logits_Cv, labels_C, shard)
        left_C = part[Field.MAX_S] - self.maximum + part[Field.SUM_S].log() - self.log_sum
        return left_C.exp()


def _record(
    logits_Cv: torch.Tensor,
    labels_C: torch.Tensor,
    shard: VocabShard,
    *,
    scale: float | None = None,
) -> dict[Field, torch.Tensor]:
    """The record of all columns; with a scale, of the logits at it against themselves. fp64."""
    loss = TokenLoss(divergence=None if scale is None else "mse_centered")
    tokens = Tokens.of(
        labels_C, ce_weight=1.0, student_scale=scale or 1.0, first=shard.first,
        valid=shard.local_valid,
    )  # fmt: skip
    teacher_Cv = None if scale is None else logits_Cv
    record_CR = backend_for(logits_Cv).stats(loss, logits_Cv, teacher_Cv, tokens)
    return unpack(merge(gather_shards(record_CR, shard), tokens).double())
