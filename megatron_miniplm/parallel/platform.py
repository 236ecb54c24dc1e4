"""One code path for CUDA and CPU: megatron.core's hard-coded CUDA device made to mean CPU.

megatron.core names ``device="cuda"`` and ``torch.cuda.current_device()`` throughout. Where there
is no GPU, a public `TorchFunctionMode` reads that device as CPU and three ``torch.cuda`` functions
get CPU answers; no Megatron module is patched. On a GPU this file does nothing.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_miniplm.core.errors import ConfigError


class _CudaMeansCpu(TorchFunctionMode):
    """Read device "cuda" as CPU; report CPU type strings as CUDA ones (core compares those)."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` with its device argument corrected."""
        named = dict(kwargs or {})
        device = named.get("device")
        if device is not None and (isinstance(device, int) or str(device).startswith("cuda")):
            named["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        out = func(*args, **named)
        if func is torch.Tensor.type and len(args) == 1 and isinstance(out, str):
            return out if "cuda" in out else out.replace("torch.", "torch.cuda.", 1)
        return out


class _NoStream:
    """Stands in for a CUDA stream (megatron.core 0.19 asks for one while reducing gradients)."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def on_cpu() -> bool:
    """Whether this process computes on the CPU."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: its GPU, or the CPU."""
    return torch.device("cpu") if on_cpu() else torch.device("cuda", torch.cuda.current_device())


def join(shared: torch.device) -> None:
    """Make `shared` the device of this thread; a new thread begins with the first GPU."""
    if shared.type == "cuda":
        torch.cuda.set_device(shared)


def device_name() -> str:
    """Name of the accelerator, or "cpu"."""
    return "cpu" if on_cpu() else torch.cuda.get_device_name()


def peak_memory() -> int:
    """Most bytes that this process has held so far: of its GPU, or of main memory."""
    if on_cpu():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return torch.cuda.max_memory_allocated()


@contextmanager
def without_gpus() -> Iterator[bool]:
    """Take no GPU in here, whatever the machine has; gives whether it has any.

    For a process that has not asked CUDA for more than the number of devices.
    """
    has_gpus = torch.cuda.device_count() > 0
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield has_gpus
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def activate(*, deterministic: bool = False) -> None:
    """Make megatron.core usable here; call once, before any of its models is built."""
    refuse_foreign_apex()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.use_deterministic_algorithms(True)
    if not on_cpu() or getattr(torch.cuda.current_device, "miniplm_cpu", False):
        return

    def current_device() -> torch.device:
        return torch.device("cpu")

    current_device.miniplm_cpu = True  # type: ignore[attr-defined]
    torch.cuda.current_device = current_device  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_stream = lambda *args, **kwargs: _NoStream()  # type: ignore[assignment]
    _CudaMeansCpu().__enter__()


def refuse_foreign_apex() -> None:
    """Stop if PyPI's ``apex`` (a web toolkit) is installed: megatron.core would mistake it.

    NVIDIA's Apex brings the extension module ``amp_C``; without it, ``import apex`` succeeding
    makes megatron.core choose fused layers that do not exist.
    """
    found = importlib.util.find_spec("apex") is not None
    if found and importlib.util.find_spec("amp_C") is None:
        raise ConfigError(
            "a package named 'apex' is installed, but not NVIDIA's (its extension 'amp_C' is "
            "missing); megatron.core would take it for NVIDIA's: run `pip uninstall apex`"
        )
