"""Language modeling: next-token cross entropy, and the per-instance NLL that scoring keeps.

    nll_i = sum_j mask_ij * (-log q(label_ij | input_i,<=j))      nats

The same rows give the same bits whatever the data-parallel size (`models.forward.forward_rows`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.data.sparse_logits import PaddedLogits
from megatron_miniplm.kernels.token_loss import TokenLoss
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.forward import forward_rows
from megatron_miniplm.models.head import Head, Positions
from megatron_miniplm.models.logit_loss import KernelLoss
from megatron_miniplm.models.signal import TeacherSignal
from megatron_miniplm.objectives.objective import (
    OBJECTIVES,
    LossConfig,
    LossOutput,
    Objective,
    mean_by_definition,
    token_weights,
)
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import Topology

_SUMMARY_WINDOW = 256  # rows a data-parallel rank takes at a time; not a function of their number


@OBJECTIVES.register("lm")
class LanguageModeling(Objective):
    """Cross entropy with the next token (Eq. 5 with the default normalization)."""

    metric_names = ("lm loss",)

    def __init__(self, common: LossConfig, config: None = None) -> None:
        self.common = common
        self.kind = KernelLoss(TokenLoss(z_loss=common.z_loss_weight))

    def __call__(
        self, head: Head, batch: Batch, teacher: TeacherSignal | None = None
    ) -> LossOutput:
        """The summed loss of one micro-batch."""
        weights_bs, count = token_weights(batch, self.common.loss_normalization)
        loss_sum, values = head.loss(
            self.kind, Positions(labels_bs=batch.labels_bs, ce_weight=weights_bs)
        )
        total = (values.ce * weights_bs).sum(dtype=torch.float64)
        metrics = {"lm loss": torch.stack([total, count.double()])}
        return LossOutput(loss_sum=loss_sum, count=count, metrics=metrics)

    def reference(
        self,
        logits_bsV: torch.Tensor,
        batch: Batch,
        teacher: torch.Tensor | PaddedLogits | None = None,
    ) -> torch.Tensor:
        """Mean cross entropy (and z-loss), by torch's own."""
        flat = logits_bsV.flatten(0, 1)
        losses = F.cross_entropy(flat, batch.labels_bs.flatten(), reduction="none")
        losses = losses + self.common.z_loss_weight * flat.logsumexp(-1).square()
        losses_bs = losses.view(batch.labels_bs.shape)
        return mean_by_definition(losses_bs, batch, self.common.loss_normalization)


def instance_nll(head: Head, batch: Batch) -> list[list[float]]:
    """[sum of NLL in nats, number of scored tokens] of each row."""
    mask = batch.mask_bs
    _, values = head.loss(
        KernelLoss(), Positions(labels_bs=batch.labels_bs, ce_weight=mask.float())
    )
    sums = values.ce.double().sum(1)
    return torch.stack([sums, mask.sum(1).double()], dim=1).tolist()


def score_rows(
    model: ModelChunks, corpus: Corpus, rows: np.ndarray, *, micro_batch_size: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """(sum_nll float64, num_tokens int64) of `rows`, in their order; None off the last stage."""
    scored = forward_rows(model, corpus, rows, instance_nll, micro_batch_size=micro_batch_size)
    if scored is None:
        return None
    sums, counts = np.array(scored).T
    return sums, counts.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class LossSummary:
    """Losses over a set of instances, nats."""

    instance_mean: float
    """Mean over instances of the mean over tokens: the number that the paper reports."""
    token_mean: float
    """Mean over all scored tokens."""
    num_instances: int
    num_tokens: int
    """Scored positions."""


def summarize_rows(
    model: ModelChunks,
    corpus: Corpus,
    rows: np.ndarray,
    *,
    micro_batch_size: int,
    topology: Topology,
) -> LossSummary:
    """Losses over `rows`; data-parallel ranks share them and every rank gets the answer."""
    totals = torch.zeros(4, dtype=torch.float64, device=platform.device())
    for number, start in enumerate(range(0, len(rows), _SUMMARY_WINDOW)):
        if number % topology.dp_size != topology.dp_rank:
            continue
        window = rows[start : start + _SUMMARY_WINDOW]
        scored = score_rows(model, corpus, window, micro_batch_size=micro_batch_size)
        if scored is not None:
            sums, counts = scored
            means = sums / np.maximum(counts, 1)
            part = [means.sum(), (counts > 0).sum(), sums.sum(), counts.sum()]
            totals += torch.tensor(part, dtype=torch.float64, device=totals.device)
    if topology.is_last_stage:
        dist.all_reduce(totals, group=topology.dp_group)
    mean_sum, instances, nll_sum, tokens = topology.from_last_stage(totals).tolist()
    if not math.isfinite(nll_sum):
        raise DataError(
            f"the loss over {corpus.prefix} is {nll_sum}: the model's weights or its precision are "
            "broken; evaluate an earlier checkpoint, or without --bf16"
        )
    return LossSummary(
        instance_mean=mean_sum / max(instances, 1),
        token_mean=nll_sum / max(tokens, 1),
        num_instances=int(instances),
        num_tokens=int(tokens),
    )
