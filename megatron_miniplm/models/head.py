"""Final hidden states x output matrix -> loss, without the [N, V] logits of a whole batch.

Tokens go through the head in chunks; the gradients of a chunk are computed in the forward pass
while its logits exist, so memory is bounded by one chunk whatever the batch:

    logits_Cv = hidden_Ch @ weight_vh^T
    loss      = sum_n w_n (lse_n - z_n,gold)
    g_Cv      = w (softmax - onehot);   dhidden = g @ weight,   dweight += g^T @ hidden

Under TP every rank holds v = V / TP rows of the output matrix; the only collective of the loss is
`merge_softmax`. dhidden is this rank's partial sum; megatron.core's region functions reduce it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_miniplm.kernels.reference import cross_entropy_grad_, softmax_record
from megatron_miniplm.parallel.vocab import VocabShard, merge_softmax

# fp32 logits of one chunk: small enough for a CPU's cache levels to help, large enough for a GPU's
# matrix units to be full.
_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}


@dataclass(frozen=True, kw_only=True)
class Head:
    """What the last pipeline stage holds of one micro-batch."""

    hidden_sbh: torch.Tensor
    """Final hidden states; under sequence parallelism this rank's part of the sequence."""
    weight_vh: torch.Tensor
    """This rank's rows of the output matrix."""
    shard: VocabShard
    sequence_parallel: bool = False

    def cross_entropy(
        self, labels_bs: torch.Tensor, weights_bs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of weight * nll, differentiable scalar; nll_bs in fp32, detached), nats.

        Positions of weight 0 cost nothing in value or gradient.
        """
        hidden = self._whole_hidden()
        loss, nll = _LinearCrossEntropy.apply(
            hidden.flatten(0, 1),
            self.weight_vh,
            labels_bs.t().flatten(),
            weights_bs.t().flatten().float(),
            self.shard,
        )
        return loss, nll.view(labels_bs.t().shape).t()

    def logits(self) -> torch.Tensor:
        """[s, b, v] logits of this rank's columns, whole: for tests and generation only."""
        return self._whole_hidden() @ self.weight_vh.t()

    def _whole_hidden(self) -> torch.Tensor:
        if self.shard.group is None:
            return self.hidden_sbh
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(
                self.hidden_sbh, tensor_parallel_output_grad=True
            )
        return copy_to_tensor_model_parallel_region(self.hidden_sbh)


class _LinearCrossEntropy(torch.autograd.Function):
    """Chunked linear + cross entropy; gradients in the forward pass, scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_Nh: torch.Tensor,
        weight_vh: torch.Tensor,
        labels_N: torch.Tensor,
        weights_N: torch.Tensor,
        shard: VocabShard,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of weighted losses, and the loss of every token."""
        count, width = hidden_Nh.shape[0], weight_vh.shape[0]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        nll_N = torch.empty(count, dtype=torch.float32, device=hidden_Nh.device)
        grad_hidden = torch.empty_like(hidden_Nh) if need_hidden else None
        # fp32: the sum over chunks must not round once a chunk.
        grad_weight = torch.zeros_like(weight_vh, dtype=torch.float32) if need_weight else None
        step = max(1, _CHUNK_ELEMENTS[hidden_Nh.device.type] // width)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            logits = (hidden_Nh[part] @ weight_vh.t()).float()
            columns = {"first": shard.first, "valid": shard.local_valid}
            lse, gold = merge_softmax(softmax_record(logits, labels_N[part], **columns), shard)
            nll_N[part] = torch.where(weights_N[part] == 0, 0.0, lse - gold)
            if grad_hidden is None and grad_weight is None:
                continue
            grad = cross_entropy_grad_(
                logits, labels_N[part], lse_N=lse, weight_N=weights_N[part], **columns
            ).to(weight_vh.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight_vh
            if grad_weight is not None:
                _add_outer(grad_weight, grad, hidden_Nh[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_vh.dtype
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(dtype=torch.float64).float(), nll_N

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The saved gradients times the upstream scalar (on the device: no host sync)."""
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = upstream[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _add_outer(total_vh: torch.Tensor, grad_Cv: torch.Tensor, hidden_Ch: torch.Tensor) -> None:
    """Add grad^T @ hidden to the total, accumulated in fp32."""
    if grad_Cv.dtype == total_vh.dtype:
        total_vh.addmm_(grad_Cv.t(), hidden_Ch)
    else:
        total_vh.add_(grad_Cv.t() @ hidden_Ch)
