"""The contract of sparse losses for the Triton kernels, interpreted; see `triton_contract`."""

from __future__ import annotations

import pytest
import torch

from megatron_miniplm.kernels import triton_sparse
from tests.contracts.test_sparse_losses import *  # noqa: F403
from tests.token_losses import Arithmetic
from tests.unit.triton_contract import rounding_to_nearest, small_tiles  # noqa: F401


class Kernels:
    """The Triton backend."""

    variant = "triton"
    stats = staticmethod(triton_sparse.stats)
    grad_ = staticmethod(triton_sparse.grad_)
    fused_ = staticmethod(triton_sparse.fused_)


@pytest.fixture(
    params=[
        Arithmetic(backend=Kernels(), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    ],
    ids=str,
)
def arithmetic(request) -> Arithmetic:
    return request.param
