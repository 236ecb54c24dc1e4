"""The CPU platform: device names mean CPU, and PyPI's apex is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_miniplm.parallel import platform


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: nothing is mapped")
def test_cuda_means_cpu_after_activation() -> None:
    code = (
        "import torch; from megatron_miniplm.parallel import platform; platform.activate();"
        "platform.activate();"
        "x = torch.zeros(2, device='cuda');"
        "assert x.device.type == 'cpu';"
        "assert x.cuda() is x;"
        "assert x.type() == 'torch.cuda.FloatTensor';"
        "assert torch.zeros(1, device=torch.cuda.current_device()).device.type == 'cpu';"
        "torch.cuda.current_stream().wait_stream(None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def run_with_path(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r});"
        "from megatron_miniplm.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False
    )


def test_foreign_apex_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    result = run_with_path(
        tmp_path, "score", "--data-path", "x", "--load", "y", "--output", str(tmp_path / "z")
    )
    assert result.returncode == 2
    assert "pip uninstall apex" in result.stderr
    assert "Traceback" not in result.stderr


def test_nvidias_apex_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apex", "amp_C"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    platform.refuse_foreign_apex()
