"""Cost of a token against numbers worked out by hand, and the table of device peaks."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_miniplm.models.family import ModelConfig, get_family
from megatron_miniplm.models.flops import (
    aligned_iterations,
    count_parameters,
    flops_per_token,
    forward_flops_per_token,
    peak_flops,
)

SMALL = ModelConfig(
    num_layers=2, hidden_size=8, num_attention_heads=2, num_query_groups=1, ffn_hidden_size=16,
    vocab_size=100,
)  # fmt: skip


def test_flops_equal_the_formula_worked_out_by_hand():
    # h(q+2k) = 8*(8+8) = 128; qh = 64; 3hf = 384; V padded to 128; s = 4
    # 6*2*(128+64+384) + 6*8*128 + 6*2*8*4 = 6912 + 6144 + 384
    assert flops_per_token(SMALL, 4) == 13440
    assert forward_flops_per_token(SMALL, 4) * 3 == 13440


def test_the_head_is_about_30_percent_of_a_500m_model_with_the_qwen_vocabulary():
    config = get_family("qwen").presets["qwen1.5-500m"]
    assert 0.29 < 6 * 1024 * 151936 / flops_per_token(config, 1024) < 0.33


def test_flops_follow_the_head_width_not_the_hidden_size():
    wide = dataclasses.replace(SMALL, kv_channels=16)
    # q = 32, k = 16: h(q+2k) grows by 384, qh by 192, q*s by 24*4; each counts 6 L times
    assert flops_per_token(wide, 4) - 13440 == 6 * 2 * (576 + 96)


def test_parameters_are_counted_without_padding_rows():
    padded = dataclasses.replace(SMALL, make_vocab_size_divisible_by=512)
    assert count_parameters(padded) == count_parameters(SMALL)
    # embeddings 800; layer: q,o 128, k,v 64, biases 16, MLP 384, norms 16; final norm 8
    assert count_parameters(SMALL) == 800 + 2 * (128 + 64 + 16 + 384 + 16) + 8


@pytest.mark.parametrize(
    ("student", "exact", "printed"),
    # The paper prints 25K, 45K and 65K (arXiv 2410.17215, section 3.1, for 100K without a teacher).
    [("qwen1.5-200m", 24_940, 25_000), ("qwen1.5-500m", 43_111, 45_000),
     ("qwen1.5-1.2b", 65_464, 65_000)],
)  # fmt: skip
def test_aligned_iterations_are_those_of_the_paper(student: str, exact: int, printed: int):
    presets = get_family("qwen").presets
    sizes = {
        "student": count_parameters(presets[student]),
        "teacher": count_parameters(presets["qwen1.5-1.8b"]),
    }
    assert aligned_iterations(100_000, **sizes) == exact
    assert aligned_iterations(100_000, **sizes, multiple=5000) == printed


def test_aligned_iterations_cost_what_training_without_a_teacher_costs():
    # 2 N a token for a forward pass, three times that for training: 9 updates with a teacher of
    # the student's size cost 9 * (6 + 2) N = 12 * 6 N.
    assert aligned_iterations(12, student=10, teacher=10) == 9
    assert aligned_iterations(3, student=1, teacher=10**9) == 1


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
    ],
)
def test_peak_is_that_of_the_named_device_or_unknown(name, peak):
    assert peak_flops(name) == peak
