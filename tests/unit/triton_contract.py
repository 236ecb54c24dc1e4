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

from megatron_miniplm.kernels import triton_loss
from megatron_miniplm.kernels.triton_one_read import GRADIENT, INNER, RECORD
from tests.contracts.test_token_losses import *  # noqa: F403
from tests.token_losses import Arithmetic


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
