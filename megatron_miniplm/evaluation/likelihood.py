"""Log-likelihoods of continuations: what multiple-choice tasks ask of a model.

Continuations of one context go through the model in one row that has the context once
(`models.branches`), and only their own positions go through the head. Rows of like length form
micro-batches, which are cut by the questions alone: data-parallel ranks take them in turn, so the
answers of a layout are those of any other with as many tensor-parallel ranks bit for bit, and
those of any other number up to rounding.

    packing     questions in the order of their tokens, so that neighbours share the most; a
                question joins the row before it where that saves an eighth of its tokens

Shapes: N questioned positions of a micro-batch, v columns of this rank, b rows, s positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.core.log import progress
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.kernels import backend_for
from megatron_miniplm.kernels.record import Field, merge, unpack
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens
from megatron_miniplm.models.branches import BranchedBatch, can_branch, reading_branches
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.forward import forward_only
from megatron_miniplm.models.head import Head
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import Topology
from megatron_miniplm.parallel.vocab import gather_shards

_LENGTH_MULTIPLE = 16
_WORTH_JOINING = 8
"""A question joins others if the row grows by less than its own tokens, by one in so many of them:
all questions of some tasks begin with the same word."""
_LONG, _TIMES = 2048, 2
"""Positions that a row may have, or times those of the question that joins, whichever is more:
attention, and the mask that says what sees what, take the square of them."""
_CALL = 32
"""Micro-batches of one pass of the pipeline schedule, which fills and drains once."""


@dataclass(frozen=True)
class Question:
    """Token ids, the last `asked` of which are the continuation."""

    tokens: tuple[int, ...]
    asked: int

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], longest: int) -> Question:
        """With at most `longest` inputs: what is too long loses its beginning.

        Refuses a continuation that is empty, without context, or longer than that itself.
        """
        if not context or not continuation or len(continuation) > longest:
            raise DataError(
                f"a continuation of {len(continuation)} tokens after {len(context)} of context, of "
                f"a model that reads {longest}: it needs one token of each, and to fit"
            )
        return cls((*context, *continuation)[-(longest + 1) :], len(continuation))

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last token."""
        return self.tokens[:-1]


@dataclass(frozen=True)
class Answer:
    """What the model says of a continuation."""

    log_likelihood: float
    """Nats, summed over its tokens."""
    greedy: bool
    """Whether each of its tokens is the likeliest one (the lowest of equals) where it stands."""


@dataclass
class Row:
    """Questions that are read together, and how many tokens they have in common."""

    questions: list[int]
    tokens: list[tuple[int, ...]]
    """Inputs of each question."""
    shared: int

    @property
    def length(self) -> int:
        """Positions: the common ones, then everybody's own."""
        return self.shared + sum(len(each) - self.shared for each in self.tokens)

    def join(self, question: int, inputs: tuple[int, ...], longest: int) -> bool:
        """Take a question in, unless that saves little or the row gets too long."""
        shared = _common(self.tokens[-1], inputs, self.shared)
        length = shared + sum(len(each) - shared for each in (*self.tokens, inputs))
        saved = self.length + len(inputs) - length
        if _WORTH_JOINING * saved < len(inputs) or length > min(
            longest, max(_LONG, _TIMES * len(inputs))
        ):
            return False
        self.questions.append(question)
        self.tokens.append(inputs)
        self.shared = shared
        return True

    def places(self) -> Iterator[tuple[int, int]]:
        """(question, row's place of its token j, less j, for those j that are not common)."""
        end = self.shared
        for question, inputs in zip(self.questions, self.tokens, strict=True):
            yield question, end - self.shared
            end += len(inputs) - self.shared


def pack(questions: Sequence[Question], *, longest: int, branch: bool) -> list[Row]:
    """Every question in one row, in the order of (length, tokens); deterministic.

    `longest`: positions of a row with several continuations, at most; `branch`: whether there may
    be any (rows of one question otherwise).
    """
    order = sorted(range(len(questions)), key=lambda at: questions[at].tokens)
    rows: list[Row] = []
    for at in order:
        inputs = questions[at].inputs
        if not (branch and rows and rows[-1].join(at, inputs, longest)):
            rows.append(Row([at], [inputs], len(inputs)))
    return sorted(rows, key=lambda row: row.length)


def _common(one: tuple[int, ...], other: tuple[int, ...], most: int) -> int:
    """How many of the first `most` tokens both begin with."""
    most = min(most, len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(at for at in range(most) if one[at] != other[at])


def answer(
    model: ModelChunks,
    questions: Sequence[Question],
    *,
    longest: int,
    micro_batch_size: int,
    topology: Topology,
) -> list[Answer]:
    """An answer to each question, on every rank (a collective over the whole job).

    `longest`: positions of a row at most; `micro_batch_size`: rows of a forward pass. Refuses
    answers that are not finite.
    """
    branch = can_branch(model)
    rows = pack(questions, longest=longest, branch=branch)
    batches = [
        rows[start : start + micro_batch_size] for start in range(0, len(rows), micro_batch_size)
    ]
    mine = batches[topology.dp_rank :: topology.dp_size]
    totals = torch.zeros((2, len(questions)), dtype=torch.float64)
    reading = reading_branches(model) if branch else nullcontext()
    with reading, progress("log-likelihoods", sum(map(len, mine)), "rows") as bar:
        for same in _same_shape(mine):
            asked = [_Asked.of(rows, questions) for rows in same]
            found = forward_only(model, [each.batch for each in asked], partial(_look_up, asked))
            for each, values_2N in zip(asked, found, strict=False):  # there are none but at the end
                totals.index_add_(1, each.question_N, values_2N.cpu())
            bar.advance(sum(map(len, same)))
    totals = totals.to(platform.device())
    if topology.is_last_stage:
        dist.all_reduce(totals, group=topology.dp_group)
    log_likelihoods, missed = topology.from_last_stage(totals).tolist()
    if not np.isfinite(log_likelihoods).all():
        raise DataError(
            "a log-likelihood is not finite: the model's weights or its precision are broken; "
            "evaluate an earlier checkpoint, or without --bf16"
        )
    return [Answer(*each) for each in zip(log_likelihoods, (n == 0 for n in missed), strict=True)]


def _same_shape(batches: Sequence[list[Row]]) -> Iterator[list[list[Row]]]:
    """Runs of micro-batches that can go through the pipeline together."""
    shapes = groupby(batches, key=lambda rows: (len(rows), _padded(rows)))
    for _, same in shapes:
        run = list(same)
        for start in range(0, len(run), _CALL):
            yield run[start : start + _CALL]


def _padded(rows: Sequence[Row]) -> int:
    return -(-rows[-1].length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


@dataclass(frozen=True)
class _Asked:
    """A micro-batch, and which of its positions are to predict what."""

    batch: Batch
    token_N: torch.Tensor
    """Which of the micro-batch's tokens, in Megatron's order (position first)."""
    label_N: torch.Tensor
    question_N: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], questions: Sequence[Question]) -> _Asked:
        length = _padded(rows)
        tokens = np.zeros((len(rows), length), np.int64)
        positions = np.tile(np.arange(length), (len(rows), 1))
        found: list[tuple[int, int, int]] = []
        for at, row in enumerate(rows):
            tokens[at, : row.shared] = row.tokens[0][: row.shared]
            for (number, ahead), inputs in zip(row.places(), row.tokens, strict=True):
                begin = row.shared + ahead
                tokens[at, begin : ahead + len(inputs)] = inputs[row.shared :]
                # Padding goes on from the last of them.
                positions[at, begin:] = np.arange(row.shared, length - ahead)
                question = questions[number]
                for place in range(len(inputs) - question.asked, len(inputs)):
                    at_place = place if place < row.shared else place + ahead
                    label = question.tokens[place + 1]
                    found.append((at_place * len(rows) + at, label, number))
        token_N, label_N, question_N = torch.tensor(found, dtype=torch.int64).T
        return cls(_batch(tokens, positions), token_N, label_N, question_N)


def _batch(tokens_bs: np.ndarray, positions_bs: np.ndarray) -> BranchedBatch:
    tokens = torch.from_numpy(tokens_bs)
    return BranchedBatch(
        tokens_bs=tokens,
        labels_bs=tokens,
        mask_bs=torch.zeros_like(tokens, dtype=torch.bool),
        rows_b=torch.zeros(len(tokens), dtype=torch.int64),
        branched_positions_bs=torch.from_numpy(positions_bs),
    ).to(platform.device())


def _look_up(asked: Sequence[_Asked], head: Head, batch: Batch) -> torch.Tensor:
    """[2, N] of a micro-batch: log-probability of each label, and whether another is likelier."""
    each = next(each for each in asked if each.batch is batch)
    labels_N = each.label_N.to(head.hidden_sbh.device)
    shard = head.shard

    def take(part: slice, logits_Nv: torch.Tensor) -> torch.Tensor:
        tokens = Tokens.of(
            labels_N[part], ce_weight=1.0, first=shard.first, valid=shard.local_valid
        )
        record = backend_for(logits_Nv).stats(TokenLoss(), logits_Nv, None, tokens)
        found = unpack(merge(gather_shards(record, shard), tokens).double())
        log_prob = found[Field.GOLD_S] - found[Field.MAX_S] - found[Field.SUM_S1].log()
        return torch.stack([log_prob, found[Field.ARG_S] != labels_N[part]])

    return torch.cat(head.over_logits(each.token_N.to(labels_N.device), take), dim=1)
