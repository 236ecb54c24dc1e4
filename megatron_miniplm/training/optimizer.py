"""Optimizer and schedules: megatron.core's own, with the paper's defaults.

AdamW with betas .9/.98, eps 1e-6, weight decay 0.1 on every parameter, clipping at 1, linear
warm-up from 0 and cosine to 0.1 x peak (arXiv 2410.17215, spec "Training recipe"). Update u is
taken with learning rate lr * u / W for u < W: the first update has rate 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.value_head import VALUE_HEAD
from megatron_miniplm.objectives.objective import Progress
from megatron_miniplm.training.zero_state import ParallelStateOptimizer


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """AdamW, clipping and the learning-rate schedule."""

    lr: float = 6e-4
    """Peak learning rate."""
    min_lr: float | None = None
    """Final learning rate; default: a tenth of the peak."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay after warm-up."""
    lr_decay_iters: int | None = None
    """Iteration at which the final rate is reached; default: the last one."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up from 0."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a fraction of the decay iterations, instead of --lr-warmup-iters."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "cosine"
    """Shape of the final decay of WSD."""
    lr_wsd_decay_iters: int | None = None
    """Length of the final decay of WSD; default: a tenth of the decay iterations."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    wd_scope: Literal["all", "matrices"] = "all"
    """Decay every parameter (the paper's code), or not norms and biases (Megatron)."""
    adam_beta1: float = 0.9
    """Adam's first-moment decay."""
    adam_beta2: float = 0.98
    """Adam's second-moment decay."""
    adam_eps: float = 1e-6
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    use_distributed_optimizer: bool = False
    """Divide optimizer state over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """With both flags above: gather updated weights while the next forward pass goes on."""

    def __post_init__(self) -> None:
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            raise ConfigError(
                f"--lr-warmup-fraction {self.lr_warmup_fraction} and --lr-warmup-iters "
                f"{self.lr_warmup_iters} say two things: give one"
            )
        if self.overlap_param_gather and not (
            self.use_distributed_optimizer and self.overlap_grad_reduce
        ):
            raise ConfigError(
                "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce"
            )
        if self.final_lr > self.lr:
            raise ConfigError(f"--min-lr {self.min_lr} is above --lr {self.lr}")

    @property
    def final_lr(self) -> float:
        """Learning rate at the end of the decay."""
        return 0.1 * self.lr if self.min_lr is None else self.min_lr

    def schedule(self, train_iters: int) -> tuple[int, int]:
        """Iterations at which (warm-up, decay) end; refuses a warm-up that ends too late."""
        decay_iters = self.lr_decay_iters or train_iters
        warmup_iters = self.lr_warmup_iters
        if self.lr_warmup_fraction is not None:
            warmup_iters = round(self.lr_warmup_fraction * decay_iters)
        if warmup_iters >= decay_iters:
            raise ConfigError(
                f"warm-up of {warmup_iters} iterations does not end before the decay does, at "
                f"{decay_iters}: lower --lr-warmup-iters or raise --train-iters"
            )
        return warmup_iters, decay_iters


def build_optimizer(
    config: OptimizationConfig,
    wrapped: Sequence[DistributedDataParallel],
    *,
    bf16: bool,
    head_lr_mult: float = 1.0,
) -> MegatronOptimizer:
    """megatron.core's optimizer; the distributed one is made able to restore its state.

    `head_lr_mult`: of the learning rates of a head for a number of each instance.
    """
    core = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.final_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.use_distributed_optimizer,
    )
    groups: dict[ParamKey, Any] = {}
    if config.wd_scope == "matrices":
        groups |= get_standard_config_overrides(core)
    if head_lr_mult != 1:
        groups[ParamKey(name=f"*{VALUE_HEAD}*")] = {
            "max_lr": head_lr_mult * config.lr, "min_lr": head_lr_mult * config.final_lr,
            # Multiplies nothing, but core 0.16 tells groups apart by it when it loads them.
            "lr_mult": head_lr_mult,
        }  # fmt: skip
    optimizer = get_megatron_optimizer(core, list(wrapped), config_overrides=groups)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        torchs = type(part.optimizer) is torch.optim.AdamW
        if torchs:
            _fuse(part.optimizer)
        if type(part) is DistributedOptimizer:
            part.__class__ = RestorableDistributedOptimizer if torchs else ParallelStateOptimizer
    return optimizer


def _fuse(adam: torch.optim.AdamW) -> None:
    """One pass over the parameters; megatron.core leaves torch its default, a dozen of them."""
    for group in (adam.defaults, *adam.param_groups):
        group["fused"], group["foreach"] = True, False


def build_scheduler(
    config: OptimizationConfig,
    optimizer: MegatronOptimizer,
    *,
    train_iters: int,
    samples_after: Callable[[int], int],
) -> SampleSchedule:
    """megatron.core's schedule, counted in samples as its users expect.

    `samples_after`: the samples that so many updates consume. So what the flags say in iterations
    happens at these iterations also while batches grow. A run keeps the schedule that it began
    with, in samples, also if its batches have another size from some checkpoint on.
    """
    warmup_iters, decay_iters = config.schedule(train_iters)
    wsd_iters = config.lr_wsd_decay_iters or max(1, decay_iters // 10)
    decay_samples = samples_after(decay_iters)
    wsd_samples = decay_samples - samples_after(max(0, decay_iters - wsd_iters))
    return SampleSchedule(
        optimizer,
        use_checkpoint_opt_param_scheduler=True,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.final_lr,
        lr_warmup_steps=samples_after(warmup_iters),
        lr_decay_steps=decay_samples,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=wsd_samples if config.lr_decay_style == "WSD" else None,
        lr_wsd_decay_style=config.lr_wsd_decay_style if config.lr_decay_style == "WSD" else None,
    )


class SampleSchedule(OptimizerParamScheduler):
    """megatron.core's schedule, whose state has all that it depends on."""

    def progress(self, consumed: int, total: int) -> Progress:
        """Where a run of `total` samples is, and how long the rate's phases are."""
        tenth = math.ceil(total / 10)
        return Progress(
            consumed=consumed,
            total=total,
            warmup=int(self.lr_warmup_steps),
            decay=tenth if self.wsd_decay_steps is None else int(self.wsd_decay_steps),
        )

    def state_dict(self) -> dict[str, Any]:
        """With the length of WSD's decay, which core leaves out."""
        return {**super().state_dict(), "wsd_decay_steps": self.wsd_decay_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state is."""
        if "wsd_decay_steps" in state_dict:
            self.wsd_decay_steps = state_dict["wsd_decay_steps"]
        super().load_state_dict(state_dict)


class RestorableDistributedOptimizer(ParallelStateOptimizer):
    """megatron.core's ZeRO-1 optimizer over torch's AdamW, able to load what it saved.

    Stock code (0.16.1 and 0.19.2) asserts on saving before the first step, expects the state of
    Transformer Engine's Adam, and gives every parameter one shared `step` tensor on loading, so
    that the step then advances once a parameter instead of once an update.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state, allocated first where no step was taken yet."""
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.zeros((), device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        state: dict[str, Any] = super().state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, then give every parameter a step of its own."""
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def _get_main_param_and_optimizer_states(self, parameter: torch.Tensor) -> dict[str, Any]:
        tensors: dict[str, Any] = super()._get_main_param_and_optimizer_states(parameter)
        tensors.pop("step", None)
        return tensors

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(
        self, parameter: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> None:
        group, order = self.model_param_group_index_map[parameter]
        main = self.optimizer.param_groups[group]["params"][order]
        for name, value in {"param": main, **self.optimizer.state[main]}.items():
            if name != "step":
                value.copy_(tensors[name])
