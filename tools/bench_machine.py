"""What a benchmark ran on: figures without it mean nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = (
    "megatron-miniplm", "numpy", "torch", "megatron-core", "fastokens", "tokenizers", "orjson",
    "xxhash", "triton", "liger-kernel", "cut-cross-entropy", "flash-linear-attention",
    "transformer-engine", "quack-kernels", "transformers", "accelerate", "lm-eval",
    "datasets",
)  # fmt: skip
PROJECT = Path(__file__).resolve().parents[1]


def hardware(scratch: Path) -> dict[str, Any]:
    """Processor, usable cores, memory, the file system of `scratch`, and how busy it all was."""
    mount = _mount(scratch)
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "file_system": mount.fstype if mount else "unknown",
        "device": mount.device if mount else "unknown",
        "kernel": platform.release(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "load_average_at_start": list(os.getloadavg()),
    }


def versions() -> dict[str, str]:
    """Python and the packages that the figures depend on, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the project, with ``+changes`` if its tracked files differ; None without git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}+changes" if _git("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(PROJECT), *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _mount(path: Path) -> Any:
    """The mount that holds `path`: the longest mount point above it."""
    real = path.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if real.is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
