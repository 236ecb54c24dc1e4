"""Jeffreys divergence: forward plus reverse KL, the symmetric one of the two directions."""

from __future__ import annotations

import torch

from megatron_miniplm.objectives.kd_losses import KD_LOSSES


@KD_LOSSES.register("jeffreys")
def jeffreys(
    student_CV: torch.Tensor, teacher_CV: torch.Tensor, labels_C: torch.Tensor
) -> torch.Tensor:
    """Sum over the vocabulary of (q - p) (log q - log p), nats, [C]."""
    log_p, log_q = student_CV.log_softmax(-1), teacher_CV.log_softmax(-1)
    return ((log_q.exp() - log_p.exp()) * (log_q - log_p)).sum(-1)
