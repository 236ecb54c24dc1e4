"""The contract of token losses (`tests.contracts`) for the Triton kernels; no test by itself.

`test_triton_loss` runs this file in a process of its own, where Triton interprets kernels on the
CPU; `tests/gpu/test_triton_kernels.py` runs the same contract on a device. The interpreter runs one
program after another, so the one-read kernel is cut where its programs meet.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.kernels import triton_loss
from megatron_miniplm.kernels.choice import VARIABLE
from megatron_miniplm.kernels.token_loss import TokenLoss, Tokens
from megatron_miniplm.kernels.triton_one_read import GRADIENT, INNER, RECORD
from tests.contracts.test_token_losses import *  # noqa: F403
from tests.token_losses import Arithmetic
from tests.unit.test_kernels import (
    test_a_label_outside_the_vocabulary_is_refused_where_it_counts,  # noqa: F401
    test_labels_and_weights_may_be_of_any_type,  # noqa: F401
    test_logits_that_native_code_would_misread_are_refused,  # noqa: F401
    test_tokens_that_native_code_would_misread_are_refused,  # noqa: F401
)


class Kernels:
    """The Triton backend with the two-pass kernel for `fused_`."""

    variant = "two-pass"
    stats = staticmethod(triton_loss.stats)
    inner = staticmethod(triton_loss.inner)
    grad_ = staticmethod(triton_loss.grad_)
    fused_ = staticmethod(triton_loss.two_pass_)


class OneRead(Kernels):
    """The same with the one-read kernel, between its meetings."""

    variant = "one-read"

    @staticmethod
    def fused_(loss, student, teacher, tokens):
        steps = (RECORD, INNER, GRADIENT) if loss.needs_inner else (RECORD, GRADIENT)
        steps = tuple(step.value for step in steps)
        return triton_loss.one_read_(loss, student, teacher, tokens, steps=steps)


@pytest.fixture(
    params=[
        Arithmetic(backend=kernels(), dtype=dtype)
        for kernels in (Kernels, OneRead)
        for dtype in (torch.float32, torch.bfloat16)
    ],
    ids=str,
)
def arithmetic(request) -> Arithmetic:
    return request.param


@pytest.fixture
def door():
    return triton_loss


def test_the_one_read_kernel_is_not_left_out_in_silence_where_it_cannot_run(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton-one-read")
    tokens = Tokens.of(torch.zeros(1, dtype=torch.int64), ce_weight=1.0, valid=8)
    with pytest.raises(ConfigError, match=r"triton-one-read cannot be: .* use triton-two-pass"):
        triton_loss.fused_(TokenLoss(), torch.zeros(1, 8), None, tokens)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Small problems have several tiles and slices, and slices of padding alone."""
    monkeypatch.setattr(triton_loss, "TILE", 64)
    monkeypatch.setattr(triton_loss, "SLICE", 64)
    monkeypatch.setattr(triton_loss, "ONE_READ_SLICE", 64)


@pytest.fixture(autouse=True)
def rounding_to_nearest(monkeypatch):
    """To bf16, as devices do: Triton 3.9's interpreter cuts digits off, or loses a carry."""
    convert = interpreter._convert_float

    def rounded(data, from_dtype, to_dtype, mode):
        if to_dtype != tl.bfloat16:
            return convert(data, from_dtype, to_dtype, mode)
        bits = torch.from_numpy(np.ascontiguousarray(data, np.float32)).bfloat16().view(torch.int16)
        return bits.numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
