"""What every door to native kernels refuses: a kernel gets addresses, and would misread the rest.

Shapes: N tokens, K entries of a sparse teacher, v columns of this shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.kernels.sparse_loss import SparseTargets
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens


def checked(
    loss: TokenLoss,
    student_Nv: torch.Tensor,
    teacher_Nv: torch.Tensor | None,
    tokens: Tokens,
    *,
    device: str,
    dtypes: Sequence[torch.dtype],
    whole: bool,
) -> Tokens:
    """The tokens as kernels take them: dense int64 and fp32; refuses what a kernel would misread.

    `whole`: the shard is the whole vocabulary. Labels are looked at on the CPU alone; on a GPU,
    looking would be waiting.
    """
    roles = {"student": student_Nv}
    if loss.form is not None:
        assert teacher_Nv is not None, f"{loss.form} needs a teacher"
        roles["teacher"] = teacher_Nv
    rows = student_Nv.shape[0]
    for role, logits_Nv in roles.items():
        problem = _problem(logits_Nv, rows, tokens.valid, device, dtypes)
        if problem is None and logits_Nv.device != student_Nv.device:
            problem = f"are on {logits_Nv.device}, the student's on {student_Nv.device}"
        if problem is not None:
            raise ConfigError(f"{role} logits {problem}")
    vectors: dict[str, Any] = {
        name: _vector(name, value, student_Nv)
        for name, value in vars(tokens).items()
        if isinstance(value, torch.Tensor)
    }
    dense = replace(tokens, **vectors)
    if student_Nv.device.type == "cpu":
        _check_labels(dense, whole=whole)
    return dense


def checked_targets(
    targets: SparseTargets, student_Nv: torch.Tensor, tokens: Tokens, *, whole: bool
) -> SparseTargets:
    """The same for what a sparse teacher says: dense int32 and fp32; `tokens` are checked."""
    rows, device = student_Nv.shape[0], student_Nv.device
    shape = (rows, targets.ids_NK.shape[-1])
    found = {name: (tuple(value.shape), value.device) for name, value in vars(targets).items()}
    right = {"ids_NK": shape, "probs_NK": shape, "tail_N": (rows,)}
    if found != {name: (size, device) for name, size in right.items()}:
        raise ConfigError(
            f"targets are {found}; ids and weights must be [{rows}, K], the tail [{rows}], all on "
            f"{device} as the student's logits"
        )
    dense = SparseTargets(
        ids_NK=targets.ids_NK.to(torch.int32).contiguous(),
        probs_NK=targets.probs_NK.float().contiguous(),
        tail_N=targets.tail_N.float().contiguous(),
    )
    if device.type == "cpu":
        _check_ids(dense, tokens, whole=whole)
    return dense


def _problem(
    logits_Nv: torch.Tensor, rows: int, valid: int, device: str, dtypes: Sequence[torch.dtype]
) -> str | None:
    shape, found = tuple(logits_Nv.shape), logits_Nv.device
    if found.type != device or logits_Nv.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"are {logits_Nv.dtype} on {found}, must be {names} on {device}"
    if logits_Nv.dim() != 2 or shape[0] != rows or shape[1] < valid:
        return f"have shape {shape}, must be [{rows}, {valid} or more]"
    if shape[1] > 1 and logits_Nv.stride(1) != 1:
        return f"have columns {logits_Nv.stride(1)} elements apart, must be contiguous"
    if rows > 1 and logits_Nv.stride(0) < shape[1]:
        return f"have rows {logits_Nv.stride(0)} elements apart, must be {shape[1]} or more"
    return None


def _vector(name: str, values_N: torch.Tensor, student_Nv: torch.Tensor) -> torch.Tensor:
    """Dense, int64 where it holds integers and fp32 where not; on the student's device already."""
    rows, device = student_Nv.shape[0], student_Nv.device
    if tuple(values_N.shape) != (rows,) or values_N.device != device:
        raise ConfigError(
            f"{name} has shape {tuple(values_N.shape)} on {values_N.device}, must be [{rows}] on "
            f"{device} as the student's logits"
        )
    dtype = torch.float32 if values_N.dtype.is_floating_point else torch.int64
    return values_N.to(dtype).contiguous()


def _check_labels(tokens: Tokens, *, whole: bool) -> None:
    """A label that is no column would have the loss of a logit of 0, without a word."""
    stop = tokens.first + tokens.valid
    outside_N = tokens.labels_N < 0
    if whole:
        outside_N |= tokens.labels_N >= stop
    wrong_N = outside_N & (tokens.ce_weight_N != 0)
    if wrong_N.any():
        token = int(wrong_N.nonzero()[0])
        entries = f"0 to {stop - 1}" if whole else "0 or more"
        raise DataError(
            f"token {token} has label {int(tokens.labels_N[token])}, must be {entries}: give it a "
            f"cross-entropy weight of 0, or the tokenizer of the model"
        )


def _check_ids(targets: SparseTargets, tokens: Tokens, *, whole: bool) -> None:
    """A token that is no column would take its weight with it, without a word."""
    stop = tokens.first + tokens.valid
    outside_NK = targets.ids_NK < -1
    if whole:
        outside_NK |= targets.ids_NK >= stop
    wrong_NK = outside_NK & tokens.active[:, None]
    if wrong_NK.any():
        token, entry = wrong_NK.nonzero()[0].tolist()
        entries = f"0 to {stop - 1}" if whole else "0 or more"
        raise DataError(
            f"the teacher of token {token} names token id {int(targets.ids_NK[token, entry])}, "
            f"must be {entries}, or -1 for none: its vocabulary is not the student's"
        )
