"""Peers from other libraries: what each can do, and the call that does it.

All are optional: one that is not installed, or that needs a GPU where there is none, is left out
and said. Each call is written after the source of the version that is named beside it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bench_core import Bench
from bench_loss_forms import IGNORED, UPSTREAM, Shape

from megatron_miniplm.kernels.token_loss import Divergence

_JSD_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # as Liger defines its ends


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A loss of another library."""

    name: str
    module: str
    """What is imported; its first part is what has to be installed."""
    package: str
    """Where that comes from, and the version whose source was read."""
    make: Callable[[Any, Shape], Callable[..., Any]]
    """(module, shape) -> a form; see `LOGIT_PEERS` and `LINEAR_PEERS` for its arguments."""
    losses: tuple[Divergence | None, ...]
    """None is cross entropy alone."""
    mixes: bool = False
    """Whether it takes cross entropy and a temperature beside the divergence."""
    masks: bool = True
    devices: tuple[str, ...] = ("cuda",)
    compiles: bool = False

    def does(self, shape: Shape) -> bool:
        """Whether it has this loss."""
        plain = shape.divergence is None or (shape.alpha == 1 and shape.temperature == 1)
        return (
            shape.divergence in self.losses
            and (plain or self.mixes)
            and (self.masks or not shape.masked)
        )


def peer_forms(peers: Sequence[Peer], shape: Shape, bench: Bench) -> dict[str, Callable[..., Any]]:
    """Forms of the peers that have this loss and can run; the others are noted."""
    forms = {}
    for peer in peers:
        if not peer.does(shape):
            continue
        if shape.device not in peer.devices:
            bench.skip(f"{peer.name}: needs a GPU")
        elif importlib.util.find_spec(peer.module.partition(".")[0]) is None:
            bench.skip(f"{peer.name}: needs {peer.package}")
        elif peer.compiles and bench.sizes.quick:
            bench.skip(f"{peer.name}: compiling takes longer than a quick run")
        else:
            try:
                forms[peer.name] = peer.make(importlib.import_module(peer.module), shape)
            except (ImportError, AttributeError) as error:  # another version, or half installed
                bench.skip(f"{peer.name}: {error}")
    return forms


# --- logits -> loss: forms of (student, teacher, labels) ----------------------------------------


def _liger_jsd(module: Any, shape: Shape) -> Callable[..., torch.Tensor]:
    """Liger's mean over rows; the log-softmaxes that it wants are part of the work."""
    jsd = module.LigerJSD(beta=_JSD_BETA[shape.divergence or ""])

    def form(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_p, log_q = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
        return jsd(log_p, log_q) * UPSTREAM

    return form


def _transformer_engine(module: Any, shape: Shape) -> Callable[..., torch.Tensor]:
    """(logits [b, s, V], labels, smoothing, whether to average); overwrites its logits."""

    def form(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return module.parallel_cross_entropy(student[None], labels[None], 0.0, True) * UPSTREAM

    return form


def _fast_llm(module: Any, shape: Shape) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """(loss, gradient) in one call, without autograd."""
    config = importlib.import_module("fast_llm.functional.config")
    labels_only = shape.divergence is None
    target_format = config.TargetFormat.labels if labels_only else config.TargetFormat.logits
    kind = config.EntropyLossType("cross_entropy" if labels_only else shape.divergence)

    def form(
        student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return module.triton_entropy_loss_forward_backward(
            student.detach(), labels if labels_only else teacher,
            loss_mask=None, grad_output=UPSTREAM, logits_scale_factor=1.0,
            target_format=target_format, entropy_loss_type=kind,
        )  # fmt: skip

    return form


LOGIT_PEERS = (
    Peer(
        name="Liger JSD, log_softmax included",
        module="liger_kernel.transformers.jsd", package="liger-kernel (0.8.5)",
        make=_liger_jsd, losses=("forward_kl", "reverse_kl", "jsd"), masks=False,
    ),
    Peer(
        name="Transformer Engine's cross entropy",
        module="transformer_engine.pytorch.cross_entropy", package="transformer-engine (2.x)",
        make=_transformer_engine, losses=(None,), masks=False,
    ),
    Peer(
        name="Fast-LLM's entropy loss",
        module="fast_llm.functional.triton.entropy_loss", package="Fast-LLM (of early 2026)",
        make=_fast_llm, losses=("forward_kl", "reverse_kl", None), masks=False,
    ),
)  # fmt: skip


# --- hidden states -> loss: forms of (hidden, weight, teacher's hidden, teacher's weight, labels) -


def _liger_chunked(module: Any, shape: Shape) -> Callable[..., torch.Tensor]:
    """Chunks of 1,024 tokens, compiled; dweight is summed in the type of the weight."""
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - shape.alpha, weight_soft_loss=shape.alpha * shape.temperature**2,
        beta=_JSD_BETA[shape.divergence or ""], ignore_index=IGNORED,
        temperature=shape.temperature,
    )  # fmt: skip
    return lambda *models_and_labels: loss(*models_and_labels) * UPSTREAM


def _liger_linear_jsd(module: Any, shape: Shape) -> Callable[..., torch.Tensor]:
    """Sums dweight in fp32, as ours."""
    loss = module.LigerFusedLinearJSD(
        jsd_beta=_JSD_BETA[shape.divergence or ""], ignore_index=IGNORED, accum_dtype=torch.float32
    )
    return lambda *models_and_labels: loss(*models_and_labels) * UPSTREAM


def _of_student(call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A form of a cross entropy (hidden, weight, labels) -> mean."""
    return lambda hidden, weight, _, __, labels: call(hidden, weight, labels) * UPSTREAM


def _liger_linear_ce(module: Any, shape: Shape) -> Callable[..., torch.Tensor]:
    loss = module.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, accum_dtype=torch.float32)
    return _of_student(lambda hidden, weight, labels: loss(weight, hidden, labels))


def _fla_kl(accumulate_in_fp32: bool) -> Callable[[Any, Shape], Callable[..., torch.Tensor]]:
    def make(module: Any, shape: Shape) -> Callable[..., torch.Tensor]:
        loss = module.FusedKLDivLoss(accumulate_grad_in_fp32=accumulate_in_fp32)
        return lambda hidden, weight, teacher, teacher_weight, _: (
            loss(hidden, teacher, weight, teacher_weight) * UPSTREAM
        )

    return make


def _cut(filter_eps: str | None) -> Callable[[Any, Shape], Callable[..., torch.Tensor]]:
    def make(module: Any, shape: Shape) -> Callable[..., torch.Tensor]:
        return _of_student(
            lambda hidden, weight, labels: module.linear_cross_entropy(
                hidden, weight, labels, ignore_index=IGNORED, filter_eps=filter_eps
            )
        )

    return make


def _torch_linear_ce(module: Any, shape: Shape) -> Callable[..., torch.Tensor]:
    """PyTorch's own in chunks, of torch 2.13; its accumulation is the default for the type."""
    linear_cross_entropy = module.nn.functional.linear_cross_entropy
    options = module.nn.LinearCrossEntropyOptions()
    return _of_student(
        lambda hidden, weight, labels: linear_cross_entropy(
            hidden, weight, labels, ignore_index=IGNORED, options=options
        )
    )


def _quack(module: Any, shape: Shape) -> Callable[..., torch.Tensor]:
    return _of_student(
        lambda hidden, weight, labels: module.chunked_linear_cross_entropy(
            hidden, weight, labels, ignore_index=IGNORED
        )
    )


LINEAR_PEERS = (
    Peer(
        name="Liger's chunked JSD",
        module="liger_kernel.chunked_loss", package="liger-kernel (0.8.5)",
        make=_liger_chunked, losses=("forward_kl", "reverse_kl", "jsd"), mixes=True,
        devices=("cpu", "cuda"), compiles=True,
    ),
    Peer(
        name="Liger's fused linear JSD",
        module="liger_kernel.transformers.fused_linear_jsd", package="liger-kernel (0.8.5)",
        make=_liger_linear_jsd, losses=("forward_kl", "reverse_kl", "jsd"),
    ),
    Peer(
        name="FLA's fused KL, dweight in fp32",
        module="fla.modules.fused_kl_div", package="flash-linear-attention (0.6.0)",
        make=_fla_kl(True), losses=("forward_kl",), masks=False,
    ),
    Peer(
        name="FLA's fused KL, dweight in the weight's type",
        module="fla.modules.fused_kl_div", package="flash-linear-attention (0.6.0)",
        make=_fla_kl(False), losses=("forward_kl",), masks=False,
    ),
    Peer(
        name="Liger's fused linear cross entropy",
        module="liger_kernel.transformers.fused_linear_cross_entropy",
        package="liger-kernel (0.8.5)",
        make=_liger_linear_ce, losses=(None,),
    ),
    Peer(
        name="cut-cross-entropy",
        module="cut_cross_entropy", package="cut-cross-entropy (25.1.1)",
        make=_cut("high"), losses=(None,),
    ),
    Peer(
        name="cut-cross-entropy, exact",
        module="cut_cross_entropy", package="cut-cross-entropy (25.1.1)",
        make=_cut(None), losses=(None,),
    ),
    Peer(
        name="torch linear_cross_entropy, chunked",
        module="torch", package="torch (2.13)",
        make=_torch_linear_ce, losses=(None,), devices=("cpu", "cuda"),
    ),
    Peer(
        name="QuACK's chunked cross entropy",
        module="quack.linear_cross_entropy", package="quack-kernels (0.6.5)",
        make=_quack, losses=(None,),
    ),
)  # fmt: skip
