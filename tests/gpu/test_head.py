"""The chunked head on a device: the functions of the unit tests, on its kernels and GEMMs."""

from __future__ import annotations

import pytest
import torch

from megatron_miniplm.models import head as head_module
from tests.unit.test_head import (
    TestMainGrad,  # noqa: F401
    test_a_sparse_teachers_targets_are_cut_with_the_tokens,  # noqa: F401
    test_a_step_never_waits_for_the_device,  # noqa: F401
    test_a_sum_over_many_chunks_in_bf16_is_rounded_once,  # noqa: F401
    test_a_teacher_of_another_width_gives_the_gradients_of_float64,  # noqa: F401
    test_columns_beyond_the_real_vocabulary_have_probability_zero,  # noqa: F401
    test_memory_is_bounded_by_the_chunk_and_not_by_the_batch,  # noqa: F401
    test_positions_of_weight_zero_have_no_loss_and_no_gradient,  # noqa: F401
    test_value_and_gradients_equal_float64,  # noqa: F401
)

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")


@pytest.fixture
def device() -> str:
    return "cuda"


def test_a_chunk_of_qwens_vocabulary_is_as_large_as_said() -> None:
    """The note on chunks in `models.head`."""
    assert head_module.CHUNK_BYTES["cuda"] // (2 * 2 * 151_936) == 2208
