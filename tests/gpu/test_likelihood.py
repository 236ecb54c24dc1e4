"""Continuations that share a row on a device: the answers of transformers on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.test_likelihood import (
    folder,  # noqa: F401
    qwen,  # noqa: F401
    test_a_model_is_as_it_was_after_it_read_branches,  # noqa: F401
    test_answers_are_those_of_transformers_on_each_sequence_alone,  # noqa: F401
)

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
