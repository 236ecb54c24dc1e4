"""The packages' kernels of Mamba compute what plain torch does."""

from __future__ import annotations

import pytest
import torch

from megatron_miniplm.models import selective_scan as scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_fused_scan_equals_plain_torch(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mamba_ssm")
    torch.manual_seed(0)
    s, b, d, n = 200, 2, 64, 16
    given = [
        torch.randn(s, b, d, dtype=dtype), torch.randn(s, b, d, dtype=dtype), torch.randn(d),
        -torch.rand(d, n), torch.randn(s, b, n, dtype=dtype), torch.randn(s, b, n, dtype=dtype),
        torch.randn(d),
    ]  # fmt: skip
    given = [each.cuda().requires_grad_() for each in given]
    fused = scan.selective_scan(*given)
    upstream = torch.randn_like(fused)
    ours = torch.autograd.grad(fused, given, upstream)
    monkeypatch.setattr(scan, "has_package", lambda name: False)
    plain = scan.selective_scan(*given)
    torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(ours, torch.autograd.grad(plain, given, upstream), strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * scale)
