"""Floor 1: arithmetic on one shard of logits; no collectives, no models.

`backend_for` chooses who computes a token loss: C++ on the CPU, Triton on a GPU, plain torch for
fp64 and wherever else nothing faster runs, which is said once. ``MINIPLM_KERNELS=reference`` makes
it plain torch everywhere, ``MINIPLM_KERNELS=auto`` (or nothing) is the choice above, and
``triton-one-read`` or ``triton-two-pass`` fixes which kernel a GPU runs (`kernels.choice`).
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal, Protocol, cast

import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.lazy import lazy_module
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.kernels import cpu, reference, sparse_cpu, sparse_reference
from megatron_miniplm.kernels.choice import VARIABLE, chosen
from megatron_miniplm.kernels.sparse_loss import SparseLoss, SparseTargets
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens

# Triton is an extra, and a slow import: it comes with the first logits on a GPU.
triton_loss = lazy_module(f"{__name__}.triton_loss")
triton_sparse = lazy_module(f"{__name__}.triton_sparse")


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


class SparseBackend(Protocol):
    """The same for teachers of whom some tokens are known; `kernels.sparse_reference`."""

    def stats(
        self, loss: SparseLoss, student_Nv: torch.Tensor, targets: SparseTargets, tokens: Tokens
    ) -> torch.Tensor:
        """The shard's record, [N, R]."""

    def grad_(
        self,
        loss: SparseLoss,
        student_Nv: torch.Tensor,
        targets: SparseTargets,
        tokens: Tokens,
        record_NR: torch.Tensor,
    ) -> None:
        """The student's logits become dL/ds."""

    def fused_(
        self, loss: SparseLoss, student_Nv: torch.Tensor, targets: SparseTargets, tokens: Tokens
    ) -> torch.Tensor:
        """Both where the shard is the whole vocabulary: the record."""


def backend_for(logits_Nv: torch.Tensor) -> Backend:
    """The backend of logits of this type and device."""
    who = _who(logits_Nv)
    return cast(Backend, {"torch": reference, "cpu": cpu, "triton": triton_loss}[who])


def sparse_backend_for(logits_Nv: torch.Tensor) -> SparseBackend:
    """The backend of the sparse losses."""
    who = _who(logits_Nv)
    modules = {"torch": sparse_reference, "cpu": sparse_cpu, "triton": triton_sparse}
    return cast(SparseBackend, modules[who])


def _who(logits_Nv: torch.Tensor) -> Literal["torch", "cpu", "triton"]:
    choice = chosen()
    if choice == "reference":
        return _plain_torch(f"{VARIABLE}=reference")
    device, dtype = logits_Nv.device.type, logits_Nv.dtype
    missing = None if _has_triton() else "Triton is not installed: pip install triton"
    if choice != "auto" and (device != "cuda" or dtype == torch.float64 or missing):
        raise ConfigError(
            f"{VARIABLE}={choice} asks for a kernel of GPUs, for 32 and 16 bits, but the logits "
            f"are {dtype} on {device}{f', and {missing}' if missing else ''}; unset it"
        )
    if dtype == torch.float64:
        return "torch"  # what asks for fp64 asks for digits, not for speed
    if device == "cpu" and dtype in (torch.float32, torch.bfloat16):
        return "cpu"
    if device == "cuda":
        return _plain_torch(missing) if missing else "triton"
    return _plain_torch(f"there is no kernel for {dtype} on {device}")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _plain_torch(why: str) -> Literal["torch"]:
    get_logger().warning("token losses in plain torch, many times slower: %s", why)
    return "torch"
