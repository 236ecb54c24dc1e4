"""Parameter rules: the Megatron layout against loops written out, and exact inverses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_miniplm.core.errors import CheckpointError
from megatron_miniplm.models.mapping import Direct, Gated, Qkv, Vocab


def qkv_rule(heads: int, groups: int, head_dim: int, columns: tuple[int, ...]) -> Qkv:
    return Qkv(
        hf=["layers.{layer}.q", "layers.{layer}.k", "layers.{layer}.v"],
        megatron="layers.qkv", heads=heads, groups=groups, head_dim=head_dim, columns=columns,
    )  # fmt: skip


def numbered(*shape: int, start: int = 0) -> torch.Tensor:
    """All elements distinct, so that a misplaced one shows."""
    size = torch.Size(shape).numel()
    return torch.arange(start, start + size, dtype=torch.float64).reshape(shape)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4), queries=st.integers(1, 4), head_dim=st.integers(1, 5),
    hidden=st.one_of(st.none(), st.integers(1, 4)),
)  # fmt: skip
def test_qkv_rows_are_group_by_group_queries_then_key_then_value(groups, queries, head_dim, hidden):
    columns = () if hidden is None else (hidden,)
    rule = qkv_rule(groups * queries, groups, head_dim, columns)
    q = numbered(groups * queries * head_dim, *columns)
    k = numbered(groups * head_dim, *columns, start=10_000)
    v = numbered(groups * head_dim, *columns, start=20_000)
    state = {"layers.7.q": q, "layers.7.k": k, "layers.7.v": v}

    expected = []
    for group in range(groups):
        for query in range(queries):
            head = group * queries + query
            expected += [q[head * head_dim + row] for row in range(head_dim)]
        expected += [k[group * head_dim + row] for row in range(head_dim)]
        expected += [v[group * head_dim + row] for row in range(head_dim)]
    whole = rule.to_megatron(state, 7)

    assert torch.equal(whole, torch.stack(expected))
    assert tuple(whole.shape) == rule.megatron_shape
    back = rule.to_hf(whole, 7)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_tensor_parallel_slice_of_qkv_holds_whole_groups():
    rule, part = qkv_rule(8, 4, 3, (5,)), qkv_rule(4, 2, 3, (5,))
    names = rule.hf_names(0)
    state = {name: torch.randn(shape) for name, shape in zip(names, rule.hf_shapes, strict=True)}
    halves = rule.to_megatron(state, 0).chunk(2)
    for rank, half in enumerate(halves):
        own = {name: tensor.chunk(2)[rank] for name, tensor in state.items()}
        assert torch.equal(half, part.to_megatron(own, 0))


def test_gated_is_gate_above_up_and_inverts():
    rule = Gated(hf=["gate", "up"], megatron="fc1", shape=(3, 2))
    gate, up = numbered(3, 2), numbered(3, 2, start=100)
    whole = rule.to_megatron({"gate": gate, "up": up})
    assert torch.equal(whole[:3], gate)
    assert torch.equal(whole[3:], up)
    back = rule.to_hf(whole)
    assert torch.equal(back["gate"], gate)
    assert torch.equal(back["up"], up)


def test_vocab_pads_with_zero_rows_and_drops_them():
    rule = Vocab(hf=["e"], megatron="e", vocab_size=5, padded_vocab_size=8, hidden_size=3)
    matrix = torch.randn(5, 3).bfloat16()
    whole = rule.to_megatron({"e": matrix})
    assert whole.dtype == torch.bfloat16
    assert torch.equal(whole[:5], matrix)
    assert torch.equal(whole[5:], torch.zeros(3, 3, dtype=torch.bfloat16))
    assert torch.equal(rule.to_hf(whole)["e"], matrix)


def test_direct_keeps_bits_including_nan_and_negative_zero():
    rule = Direct(hf=["w"], megatron="w", shape=(3,))
    tensor = torch.tensor([float("nan"), -0.0, 1e-45])
    back = rule.to_hf(rule.to_megatron({"w": tensor}))["w"]
    assert torch.equal(back.view(torch.int32), tensor.view(torch.int32))


def test_a_rule_is_per_layer_only_with_a_layer_in_its_name():
    assert qkv_rule(2, 1, 2, ()).per_layer
    assert not Direct(hf=["norm"], megatron="norm", shape=(1,)).per_layer


def test_shapes_other_than_the_configuration_are_refused_with_both():
    rule = Gated(hf=["gate", "up"], megatron="fc1", shape=(3, 2))
    with pytest.raises(CheckpointError, match=r"up has shape \[4, 2\].*\[3, 2\]"):
        rule.to_megatron({"gate": torch.zeros(3, 2), "up": torch.zeros(4, 2)})
    with pytest.raises(CheckpointError, match=r"fc1 has shape \[3, 2\].*\[6, 2\]"):
        rule.to_hf(torch.zeros(3, 2))
