"""A Mamba-1 layer for megatron.core's block: norm, mixer, residual (arXiv:2312.00752).

megatron.core has Mamba-2 only, and needs `mamba_ssm` for it. Tensor parallelism divides the
channels: every rank has its part of the inner width from the input to the output projection, and
the ranks meet twice: where step size, B and C are summed over all channels (a few dozen floats a
token), and in the output projection, as in an MLP.

Shapes: s tokens, b sequences, h hidden, d channels of this rank, r rank of the step size, n states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_miniplm.models.family import Architecture, ModelConfig
from megatron_miniplm.models.layers import RMSNorm, run_hooks_of_calls
from megatron_miniplm.models.selective_scan import has_package, selective_scan

_DIVIDED = {
    "in_proj.weight": 0, "conv1d.weight": 0, "conv1d.bias": 0, "x_proj.weight": 1,
    "dt_proj.weight": 0, "dt_proj.bias": 0, "A_log": 0, "D": 0, "out_proj.weight": 1,
}  # fmt: skip
"""Parameter of the mixer -> the axis along which the ranks share it."""

_TIME_STEPS = (0.001, 0.1)
"""Smallest and largest step size that a channel begins with."""


class MambaLayer(MegatronModule):
    """hidden + mixer(norm(hidden)), with the signature of megatron.core's transformer layer."""

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelConfig,
        layer_number: int = 1,
        vp_stage: int | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage)
        self.norm = RMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)
        self.mixer = MambaMixer(config, shape)

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor | None = None, **unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, h] (under sequence parallelism this rank's part of s), and the context as is."""
        return hidden_states + self.mixer(self.norm(hidden_states)), context


class MambaMixer(MegatronModule):
    """A gated selective state space; parameters are named as in Hugging Face's model.

    In bf16 all of them are rounded in a forward pass, as in that model; their master copies are
    fp32, and so are the states.
    """

    def __init__(self, config: TransformerConfig, shape: ModelConfig) -> None:
        super().__init__(config)
        self.shape = shape
        ranks, kind = config.tensor_model_parallel_size, {"dtype": config.params_dtype}
        mine = shape.ffn_hidden_size // ranks
        width = shape.time_step_rank + 2 * shape.mamba_state_dim
        linear = {"config": config, "init_method": config.init_method, "bias": False}
        linear_out = {"input_is_parallel": True, "skip_bias_add": False, **linear}
        self.in_proj = ColumnParallelLinear(
            config.hidden_size, 2 * shape.ffn_hidden_size, gather_output=False, stride=2, **linear
        )
        self.conv1d = torch.nn.Conv1d(mine, mine, shape.mamba_conv_kernel, groups=mine, **kind)
        self.x_proj = torch.nn.Linear(mine, width, bias=False, **kind)
        self.dt_proj = torch.nn.Linear(shape.time_step_rank, mine, **kind)
        self.A_log = torch.nn.Parameter(torch.empty(mine, shape.mamba_state_dim, **kind))
        self.D = torch.nn.Parameter(torch.empty(mine, **kind))
        self.out_proj = RowParallelLinear(shape.ffn_hidden_size, config.hidden_size, **linear_out)
        for name, axis in _DIVIDED.items():
            parameter = self.get_parameter(name)
            if not hasattr(parameter, "tensor_model_parallel"):
                # Else the gradient norm would count one rank's part of it.
                set_tensor_model_parallel_attributes(parameter, ranks > 1, axis, 1)

    def forward(self, hidden_sbh: torch.Tensor) -> torch.Tensor:
        """[s, b, h] to [s, b, h]."""
        for layer in (self.conv1d, self.dt_proj):
            run_hooks_of_calls(layer)
        x_sbd, gate_sbd = self.in_proj(hidden_sbh)[0].chunk(2, -1)
        x_sbd = self._convolved(x_sbd)
        dt_sbr, B_sbn, C_sbn = self._sum_over_channels(self.x_proj(x_sbd)).split(
            [self.shape.time_step_rank, self.shape.mamba_state_dim, self.shape.mamba_state_dim], -1
        )
        step_sbd = F.linear(dt_sbr, self.dt_proj.weight)
        exact = torch.promote_types(x_sbd.dtype, torch.float32)
        bias_d, A_dn, D_d = (each.to(exact) for each in (self.dt_proj.bias, self.A_log, self.D))
        y_sbd = selective_scan(x_sbd, step_sbd, bias_d, -A_dn.exp(), B_sbn, C_sbn, D_d)
        out: torch.Tensor = self.out_proj(y_sbd * F.silu(gate_sbd))[0]
        return out

    def _convolved(self, x_sbd: torch.Tensor) -> torch.Tensor:
        """SiLU of a causal convolution of each channel by itself."""
        weight_dk, bias_d = self.conv1d.weight[:, 0], self.conv1d.get_parameter("bias")
        kernels = (
            x_sbd.is_cuda
            and x_sbd.dtype != torch.float64
            and self.shape.mamba_conv_kernel in (2, 3, 4)
        )
        if kernels and has_package("causal_conv1d"):
            from causal_conv1d import causal_conv1d_fn

            x_bds = x_sbd.permute(1, 2, 0).contiguous()
            out: torch.Tensor = causal_conv1d_fn(x_bds, weight_dk, bias_d, activation="silu")
            return out.permute(2, 0, 1)
        count, kernel = len(x_sbd), self.shape.mamba_conv_kernel
        padded = F.pad(x_sbd, (0, 0, 0, 0, kernel - 1, 0))
        taps = [padded[at : at + count] * weight_dk[:, at] for at in range(kernel)]
        return F.silu(torch.stack(taps).sum(0) + bias_d)

    @staticmethod
    def _sum_over_channels(partial: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in the forward pass and, for its gradient, in the backward pass.

        Every rank goes on from the same sum with its own channels, so its gradient is partial, too.
        """
        summed = reduce_from_tensor_model_parallel_region(partial)
        return copy_to_tensor_model_parallel_region(summed)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Parameters with their place in the whole; a rank's input projection is two pieces."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            dict(self.named_parameters()), prefix, _DIVIDED, sharded_offsets
        )
        key = f"{prefix}in_proj.weight"
        state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


def _layer(config: ModelConfig, core: TransformerConfig) -> ModuleSpec:
    return ModuleSpec(module=MambaLayer, params={"shape": config})


def _settings(config: ModelConfig, tp_size: int) -> Mapping[str, Any]:
    return {"num_attention_heads": tp_size}  # there are none, but it must be divided


def _multiplications(config: ModelConfig, seq_length: int) -> int:
    """Matrices, the convolution, and the scan: discretise, recur, read out (3 a state)."""
    channels, states = config.ffn_hidden_size, config.mamba_state_dim
    projected = 3 * config.hidden_size + 2 * config.time_step_rank + 2 * states
    return channels * (projected + config.mamba_conv_kernel + 3 * states)


def _initial(
    config: ModelConfig, key: str, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor | None:
    """As in `mamba_ssm` and Hugging Face's model: step sizes log-uniform in 0.001 .. 0.1."""
    name = key.partition("mixer.")[2]

    def uniform(bound: float) -> torch.Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) * bound

    if name == "A_log":
        return torch.arange(1, shape[1] + 1).float().log().expand(shape)
    if name == "D":
        return torch.ones(shape)
    if name == "dt_proj.bias":
        low, high = math.log(_TIME_STEPS[0]), math.log(_TIME_STEPS[1])
        step = (low + (high - low) * torch.rand(shape, generator=generator)).exp()
        return step + (-torch.expm1(-step)).log()  # softplus undone
    fan_in = {
        "dt_proj.weight": config.time_step_rank,
        "conv1d.weight": config.mamba_conv_kernel,
        "out_proj.weight": config.ffn_hidden_size,
    }
    return uniform(fan_in[name] ** -0.5) if name in fan_in else None


MAMBA = Architecture(
    layer=_layer,
    settings=_settings,
    position_embedding="none",
    divided=lambda config: {"--ffn-hidden-size": config.ffn_hidden_size},
    multiplications=_multiplications,
    initial=_initial,
)
