"""The Triton kernels by interpretation on the CPU: the contract of all token losses.

In a process of its own, since TRITON_INTERPRET is read when Triton is imported; other tests of this
process are none the wiser. What needs a GPU is in `tests/gpu`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pool import PROJECT

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[gpu]'")

CONTRACT = Path(__file__).with_name("triton_contract.py")
SPARSE = Path(__file__).with_name("triton_sparse_contract.py")
# An interpreted case takes 1 to 4 seconds: plain test runs have every loss once, and of the rest
# what differs most.
LOSSES = "(ce-0.5-z0.0 or soft_nll or reverse_kl or jsd-0.5 or mse_log_probs)"
PLAIN = [
    "definition and 131 and two-pass-bfloat16 and 0.5-",
    f"definition and 131 and one-read-float32 and {LOSSES}",
    "merged and -4] and two-pass-float32 and (soft_nll or jsd-0.5)",
    "not_read and one-read-bfloat16 and jsd-0.5",
    "rows_may_lie_apart and one-read-float32 and jsd-0.5",
    "teacher_may_rule and two-pass-float32 and forward_kl",
    "its_teacher and two-pass-float32 and tvd",
    "adding and two-pass-float32 and reverse_kl",
    "refused or in_silence or any_type",
]
PLAIN_SPARSE = [
    "definition and 131 and bfloat16 and (residual or square)",
    "merged and -4] and float32 and uniform",
    "not_read and bfloat16 and residual",
]


@pytest.mark.parametrize(
    ("contract", "cases"),
    [
        pytest.param(CONTRACT, " or ".join(f"({cases})" for cases in PLAIN), id="some"),
        pytest.param(SPARSE, " or ".join(f"({cases})" for cases in PLAIN_SPARSE), id="some-sparse"),
        pytest.param(CONTRACT, "", marks=pytest.mark.slow, id="all"),
        pytest.param(SPARSE, "", marks=pytest.mark.slow, id="all-sparse"),
    ],
)
def test_interpreted_kernels_keep_the_contract(contract, cases):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", contract, "-k", cases],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, cwd=PROJECT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
