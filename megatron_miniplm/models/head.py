"""Final hidden states x output matrix -> loss, without the [N, V] logits of a whole batch.

Tokens go through the head in chunks, and through the teacher's head beside it; the gradients of a
chunk are computed in the forward pass while its logits exist, so memory is bounded by one chunk
(`models.logit_loss.CHUNK_BYTES`) whatever the batch. Every chunk reads and writes the whole of
dweight once, so a small one costs bandwidth: at V = 151,936 a chunk has 55 tokens on a CPU in fp32,
2,208 on a GPU in bf16.

    logits_Cv = hidden_Ch @ weight_vh^T            (the teacher's likewise)
    g_Cv      = dL / dlogits                       (`models.logit_loss`, in the place of the logits)
    dhidden   = g @ weight,   dweight += g^T @ hidden

dhidden is this rank's partial sum under TP; megatron.core's region functions reduce it. dweight is
summed in fp32: into ``weight.main_grad`` if Megatron keeps one, else into a buffer.

Shapes: b sequences of s positions, N = s * b tokens in Megatron's order, C tokens of a chunk,
h hidden width, v columns of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.kernels.record import TokenValues
from megatron_miniplm.kernels.sparse_loss import SparseTargets
from megatron_miniplm.kernels.token_loss import Tokens
from megatron_miniplm.models.logit_loss import CHUNK_BYTES, Adapt, LogitLoss, Signal
from megatron_miniplm.models.value_head import ValueHead
from megatron_miniplm.parallel.vocab import VocabShard

T = TypeVar("T")
Watch = Callable[[slice, torch.Tensor], None]
"""(which of the N tokens, their logits [C, v])."""
TILE_BYTES = 4 << 20
"""Memory of the fp32 copy of a part of the gradient, where a GEMM cannot add bf16 to fp32."""


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What a loss knows of each position [b, s]; numbers stand for all positions."""

    labels_bs: torch.Tensor
    """Next tokens, int64."""
    ce_weight: torch.Tensor
    """Weight of the cross entropy, fp32 [b, s]."""
    kd_weight: torch.Tensor | float = 0.0
    """Weight of the divergence from the teacher."""
    student_scale: torch.Tensor | float = 1.0
    """1 / temperature of the student in the divergence."""
    teacher_scale: torch.Tensor | float = 1.0
    """1 / temperature of the teacher."""

    def tokens(self, shard: VocabShard) -> Tokens:
        """The same in Megatron's order of tokens, on one shard of the vocabulary."""

        def flat(value: torch.Tensor | float) -> torch.Tensor | float:
            return value.t().flatten() if isinstance(value, torch.Tensor) else value

        return Tokens.of(
            self.labels_bs.t().flatten(),
            ce_weight=flat(self.ce_weight),
            kd_weight=flat(self.kd_weight),
            student_scale=flat(self.student_scale),
            teacher_scale=flat(self.teacher_scale),
            first=shard.first,
            valid=shard.local_valid,
        )


@dataclass(frozen=True, kw_only=True)
class Head:
    """What the last pipeline stage holds of one micro-batch; the teacher's is its signal."""

    hidden_sbh: torch.Tensor
    """Final hidden states; under sequence parallelism this rank's part of the sequence."""
    weight_vh: torch.Tensor
    """This rank's rows of the output matrix."""
    shard: VocabShard
    sequence_parallel: bool = False
    unit_upstream: bool = False
    """Whether the loss is known to be backpropagated with gradient 1 (Megatron's schedule, when
    losses are sums): dweight then goes to ``main_grad`` in the forward pass."""
    announce: bool = False
    """Whether autograd must be given a gradient of the weight even then, since something waits for
    it and nothing else on this rank uses the weight."""
    watch: Watch | None = None
    """Is shown the logits of every part of the tokens before the loss overwrites them."""
    value_head: ValueHead | None = None
    """Of a model that gives a number for each instance."""

    def values(self, mask_bs: torch.Tensor) -> torch.Tensor:
        """[b] number of each instance, of its positions in the mask; differentiable."""
        assert self.value_head is not None, "this model gives no number for an instance"
        values = self.value_head(self.hidden_sbh, mask_bs)
        # What waits for a gradient of the output matrix, which has no part in this, gets zeros.
        return values + 0 * self.weight_vh[0, 0] if self.announce else values

    def loss(
        self,
        kind: LogitLoss,
        positions: Positions,
        teacher: Head | SparseTargets | None = None,
        *,
        adapt: Adapt | None = None,
    ) -> tuple[torch.Tensor, TokenValues]:
        """(weighted sum of the losses, differentiable; values of every position [b, s], detached).

        `adapt`: what the teacher's logits change of the tokens, chunk by chunk, before the loss.
        Nats. Positions of weight 0 cost nothing in value or gradient. Refuses a teacher of which
        this rank holds other columns than of the student. Targets are of all N tokens in Megatron's
        order, of which every rank sees the same.
        """
        hidden = self._whole_hidden()
        tokens = positions.tokens(self.shard)
        dense: tuple[torch.Tensor, torch.Tensor] | None = None
        if isinstance(teacher, Head):
            _check_same_columns(self.shard, teacher.shard)
            dense = (teacher._whole_hidden().flatten(0, 1), teacher.weight_vh)
        work = _Work(
            kind=kind,
            tokens=tokens,
            shard=self.shard,
            teacher=dense,
            targets=teacher if isinstance(teacher, SparseTargets) else None,
            with_grad=torch.is_grad_enabled(),
            unit_upstream=self.unit_upstream,
            announce=self.announce,
            adapt=adapt,
            watch=self.watch,
        )
        loss = _ChunkedLoss.apply(hidden.flatten(0, 1), self.weight_vh, work)
        return loss, _by_position(TokenValues.joined(work.seen), hidden.shape[:2])

    def over_logits(
        self, tokens_N: torch.Tensor, take: Callable[[slice, torch.Tensor], T]
    ) -> list[T]:
        """`take(part, logits_Cv)` of these tokens (int64, in Megatron's order), chunk by chunk.

        `part` cuts `tokens_N`. The logits are only there until it returns.
        """
        models = [(self.hidden_of(tokens_N), self.weight_vh)]
        return [take(part, logits) for part, (logits,) in _chunks_of_logits(models)]

    def hidden_of(self, tokens_N: torch.Tensor) -> torch.Tensor:
        """[N, h] final hidden states of these tokens, the same on all TP ranks."""
        return self._whole_hidden().flatten(0, 1)[tokens_N]

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


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What `_ChunkedLoss` needs beside the tensors that it differentiates by."""

    kind: LogitLoss
    tokens: Tokens
    shard: VocabShard
    teacher: tuple[torch.Tensor, torch.Tensor] | None
    """Its hidden states [N, h] and rows of its output matrix."""
    targets: SparseTargets | None
    with_grad: bool
    """Whether gradients are recorded; inside of a Function, torch no longer says it."""
    unit_upstream: bool
    announce: bool
    adapt: Adapt | None = None
    watch: Watch | None = None
    seen: list[TokenValues] = field(default_factory=list)
    """Filled chunk by chunk."""


class _ChunkedLoss(torch.autograd.Function):
    """Chunked linear + loss; gradients in the forward pass, scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_Nh: torch.Tensor, weight_vh: torch.Tensor, work: _Work
    ) -> torch.Tensor:
        """Sum of weighted losses."""
        need_hidden, need_weight = (need and work.with_grad for need in ctx.needs_input_grad[:2])
        with_grad = need_hidden or need_weight
        ctx.weight_dtype, ctx.summed_in_place = weight_vh.dtype, False
        grad_hidden = torch.empty_like(hidden_Nh) if need_hidden else None
        grad_weight = None
        if need_weight:
            grad_weight, ctx.summed_in_place = _weight_total(weight_vh, work.unit_upstream)
        ctx.announced = weight_vh if ctx.summed_in_place and work.announce else None
        total = hidden_Nh.new_zeros((), dtype=torch.float64)
        models = [(hidden_Nh, weight_vh), *([work.teacher] if work.teacher else [])]
        for part, logits in _chunks_of_logits(models):
            hidden, tokens = hidden_Nh[part], work.tokens.rows(part)
            student, teacher = logits[0], logits[1] if work.teacher else None
            if work.adapt is not None:
                assert teacher is not None, "there are no logits to adapt to"
                tokens = work.adapt(teacher, tokens, work.shard)
            if work.watch is not None:
                work.watch(part, student)
            signal: Signal = teacher if work.targets is None else work.targets.rows(part)
            found = work.kind(student, signal, tokens, work.shard, with_grad=with_grad)
            work.seen.append(found)
            total += found.weighted(work.kind.loss, tokens).sum(dtype=torch.float64)
            if grad_hidden is not None:
                torch.mm(student, weight_vh, out=grad_hidden[part])
            if grad_weight is not None:
                _add_outer(grad_weight, student, hidden)
        ctx.save_for_backward(grad_hidden, None if ctx.summed_in_place else grad_weight)
        return total.to(torch.promote_types(hidden_Nh.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The saved gradients times the upstream scalar (on the device: no host sync)."""
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = upstream
        if ctx.summed_in_place:
            torch._assert_async(
                (scale == 1).all(),
                "the loss was scaled after its gradient had gone to main_grad: build the Head "
                "without unit_upstream",
            )
        dweight = None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype)
        if ctx.announced is not None:
            # Its values are never read: Megatron's hook is told that they are in main_grad.
            ctx.announced.grad_added_to_main_grad = True
            dweight = torch.empty_like(ctx.announced)
        dhidden = None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype)
        return dhidden, dweight, None


def _check_same_columns(student: VocabShard, teacher: VocabShard) -> None:
    for what in ("first", "size", "valid"):
        ours, theirs = getattr(student, what), getattr(teacher, what)
        if ours != theirs:
            raise ConfigError(
                f"student and teacher must have the same columns of the vocabulary on a rank, but "
                f"{what} is {ours} of the student's and {theirs} of the teacher's: build both for "
                f"the same vocabulary, padded to the same multiple"
            )


def _chunks_of_logits(
    models: list[tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Cuts of the tokens, and each model's logits of them, at most `CHUNK_BYTES` in all.

    `models`: (hidden states [N, h], output matrix [v, h]). Every chunk's logits take the place of
    the last one's: fresh memory would cost as much time as the loss.
    """
    count = models[0][0].shape[0]
    row = sum(weight.shape[0] * hidden.element_size() for hidden, weight in models)
    step = max(1, min(count, CHUNK_BYTES[models[0][0].device.type] // row))
    places = [hidden.new_empty((step, weight.shape[0])) for hidden, weight in models]
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        logits = [place[: part.stop - start] for place in places]
        for (hidden, weight), place in zip(models, logits, strict=True):
            torch.mm(hidden[part], weight.t(), out=place)
        yield part, logits


def _weight_total(weight_vh: torch.Tensor, unit_upstream: bool) -> tuple[torch.Tensor, bool]:
    """(where dweight is summed, whether that is Megatron's own fp32 sum over micro-batches).

    What autograd then gets for the weight is nothing, so ``grad_added_to_main_grad`` stays as it
    is: DDP's hook must still add what else the parameter got (the embedding's part when the two are
    tied). Where it got nothing else, an overlapped reduction wants a gradient: `Head.announce`.
    """
    main_grad = getattr(weight_vh, "main_grad", None)
    if unit_upstream and main_grad is not None and main_grad.dtype == torch.float32:
        return main_grad, True
    # fp32: the sum over chunks must not round once a chunk.
    dtype = torch.promote_types(weight_vh.dtype, torch.float32)
    return torch.zeros_like(weight_vh, dtype=dtype), False


def _add_outer(total_vh: torch.Tensor, grad_Cv: torch.Tensor, hidden_Ch: torch.Tensor) -> None:
    """Add grad^T @ hidden to the total, accumulated in its dtype."""
    if grad_Cv.dtype == total_vh.dtype:
        total_vh.addmm_(grad_Cv.t(), hidden_Ch)
    elif grad_Cv.is_cuda:
        torch.addmm(total_vh, grad_Cv.t(), hidden_Ch, out_dtype=total_vh.dtype, out=total_vh)
    else:
        _add_outer_in_tiles(total_vh, grad_Cv, hidden_Ch)


def _add_outer_in_tiles(
    total_vh: torch.Tensor, grad_Cv: torch.Tensor, hidden_Ch: torch.Tensor
) -> None:
    """The same by GEMMs in the total's type, on copies of some columns of the gradient.

    A product in bf16 would be rounded in every chunk, and be a [v, h] matrix of its own.
    """
    count, columns = grad_Cv.shape
    hidden_Ch = hidden_Ch.to(total_vh.dtype)
    step = max(1, TILE_BYTES // (count * total_vh.element_size()))
    for start in range(0, columns, step):
        part = slice(start, min(start + step, columns))
        total_vh[part].addmm_(grad_Cv[:, part].to(total_vh.dtype).t(), hidden_Ch)


def _by_position(found: TokenValues, shape: torch.Size) -> TokenValues:
    """Values of tokens in Megatron's order as [b, s]; `shape` is (s, b)."""
    there = {name: value for name, value in vars(found).items() if value is not None}
    return replace(found, **{name: value.view(shape).t() for name, value in there.items()})
