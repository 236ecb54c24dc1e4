"""Size of a model and cost of a token: parameters, FLOPs by Megatron's formula, peak of a device.

Megatron counts, per token of a sequence of length s (L layers, hidden h, q = heads * head width,
k = groups * head width, f = MLP width, V = *padded* vocabulary)::

    6 L [h (q + 2k) + q h + 3 h f] + 6 h V + 6 L q s

6 = 2 (multiply-add) * 3 (forward, and a backward of twice its cost); the attention term is halved
because attention is causal. Input embedding, norms, softmax and recomputation are not counted.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from megatron_miniplm.models.family import ModelConfig, get_family

FORWARD_AND_BACKWARD = 3


def count_parameters(config: ModelConfig) -> int:
    """Parameters as Hugging Face stores the model: without the rows that pad the vocabulary."""
    total = 0
    for rule in get_family(config.model_family).rules(config):
        size = sum(math.prod(shape) for shape in rule.hf_shapes)
        total += size * (config.num_layers if rule.per_layer else 1)
    return total


def forward_flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """Floating point operations of one forward pass, per token of a `seq_length`-token sequence."""
    layer = get_family(config.model_family).architecture.multiplications(config, seq_length)
    return 2 * (config.num_layers * layer + config.hidden_size * config.padded_vocab_size)


def flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """Floating point operations of one training step, per token: three forward passes' worth."""
    return FORWARD_AND_BACKWARD * forward_flops_per_token(config, seq_length)


def embedding_parameters(config: ModelConfig) -> int:
    """Parameters with a row a token, of one matrix or two; without rows that pad the vocabulary."""
    matrices = 2 if config.untie_embeddings_and_output_weights else 1
    return matrices * (config.vocab_size or 0) * config.hidden_size


def share_beside_teacher(
    *,
    student: int,
    teacher: int,
    student_passes: int = FORWARD_AND_BACKWARD,
    teacher_passes: int = 1,
) -> Fraction:
    """Samples beside a teacher's forward pass for the cost of one without a teacher.

    The paper's accounting (arXiv 2410.17215): a token costs 6 FLOPs a parameter in training and 2
    in a forward pass, so 6 N_s / (6 N_s + 2 N_t). `student`, `teacher`: parameters, or anything
    that a forward pass is proportional to; `_passes`: what a token costs in forward passes.
    """
    plain = FORWARD_AND_BACKWARD * student
    return Fraction(plain, student_passes * student + teacher_passes * teacher)


def aligned_iterations(iterations: int, *, student: int, teacher: int, multiple: int = 1) -> int:
    """Updates beside a teacher that cost as much as `iterations` of the same size without one."""
    return nearest(iterations * share_beside_teacher(student=student, teacher=teacher), multiple)


def nearest(exact: Fraction, multiple: int) -> int:
    """The nearest multiple of `multiple`, and at least one of it."""
    return max(1, round(exact / multiple)) * multiple


# Dense bfloat16 with float32 accumulation, without sparsity, in FLOP/s, from the vendors' data
# sheets. The first match counts, so a more specific name precedes a shorter one.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"GB200", 2500e12),
    (r"B200", 2250e12),
    (r"H100 PCIe", 756e12),
    (r"H[12]00 NVL", 835e12),
    (r"(GH200|H200|H100|H800)", 989e12),
    (r"(A100|A800)", 312e12),
    (r"L40S", 362e12),
    (r"L40", 181e12),
    (r"L4", 121e12),
    (r"A40", 150e12),
    (r"A30", 165e12),
    (r"A10", 125e12),
    (r"RTX 6000 Ada", 364e12),
    (r"RTX 4090", 165e12),
    (r"RTX 3090", 71e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak in FLOP/s of a device as CUDA names it; None when it is not known.

    None also for a CPU and for a MIG slice of a GPU: model FLOPs utilisation then needs
    ``--peak-tflops``.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, peak in _PEAKS:
        if re.search(rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])", device_name):
            return peak
    return None
