"""Floor 1: arithmetic on one shard of logits; no collectives, no models.

`backend_for` chooses who computes a token loss: C++ on the CPU, Triton on a GPU, plain torch for
fp64 and wherever else nothing faster runs, which is said once. ``MINIPLM_KERNELS=reference`` makes
it plain torch everywhere, ``MINIPLM_KERNELS=auto`` (or nothing) is the choice above, and
``triton-one-read`` or ``triton-two-pass`` fixes which kernel a GPU runs.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Protocol

import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.kernels import cpu, reference
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens

VARIABLE = "MINIPLM_KERNELS"
# On a GPU, triton_loss chooses between its kernels; the last two are for it.
_CHOICES = ("auto", "reference", "triton-one-read", "triton-two-pass")


class Backend(Protocol):
    """What computes token losses on a shard of logits; `kernels.reference` documents the four."""

    def stats(
        self,
        loss: TokenLoss,
        student_Nv: torch.Tensor,
        teacher_Nv: torch.Tensor | None,
        tokens: Tokens,
    ) -> torch.Tensor:
        """The shard's record, [N, R]."""

    def inner(
        self,
        loss: TokenLoss,
        student_Nv: torch.Tensor,
        teacher_Nv: torch.Tensor,
        tokens: Tokens,
        record_NR: torch.Tensor,
    ) -> torch.Tensor:
        """The shard's inner sums, [N, 2]."""

    def grad_(
        self,
        loss: TokenLoss,
        student_Nv: torch.Tensor,
        teacher_Nv: torch.Tensor | None,
        tokens: Tokens,
        record_NR: torch.Tensor,
        inner_N2: torch.Tensor | None,
    ) -> None:
        """The student's logits become dL/ds."""

    def fused_(
        self,
        loss: TokenLoss,
        student_Nv: torch.Tensor,
        teacher_Nv: torch.Tensor | None,
        tokens: Tokens,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All of it where the shard is the whole vocabulary: (record, inner sums or None)."""


def backend_for(logits_Nv: torch.Tensor) -> Backend:
    """The backend of logits of this type and device."""
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in _CHOICES:
        raise ConfigError(f"{VARIABLE}={choice} must be one of {', '.join(_CHOICES)}")
    if choice == "reference":
        return _plain_torch(f"{VARIABLE}=reference")
    device, dtype = logits_Nv.device.type, logits_Nv.dtype
    if dtype == torch.float64:
        return reference  # what asks for fp64 asks for digits, not for speed
    if device == "cpu" and dtype in (torch.float32, torch.bfloat16):
        return cpu
    if device == "cuda":
        return _triton()
    return _plain_torch(f"there is no kernel for {dtype} on {device}")


@functools.cache
def _triton() -> Backend:
    """Imported when a GPU asks for it: triton is an extra, and a slow import."""
    try:
        return importlib.import_module("megatron_miniplm.kernels.triton_loss")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return _plain_torch(f"{error}")


@functools.cache
def _plain_torch(why: str) -> Backend:
    get_logger().warning("token losses in plain torch, many times slower: %s", why)
    return reference
