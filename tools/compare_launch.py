"""The same training twice: from two commits, or in two layouts.

A commit is checked out into a git worktree that goes away afterwards; its extension is taken from
this working tree if the native sources are the same, else built. ``.`` stands for the working tree
as it is.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench_machine import PROJECT

from megatron_miniplm.core.errors import ConfigError, MiniPLMError

_RANKS = "--nproc-per-node"
_NATIVE = ("csrc", "setup.py")


def check_flags(words: Sequence[str]) -> None:
    """Refuse flags of `pretrain` that this program sets itself."""
    for flag in ("--save", "--overwrite"):
        if any(word == flag or word.startswith(f"{flag}=") for word in words):
            raise ConfigError(f"{flag} is set by compare_runs.py: leave it out (see --output)")


def run_commit(commit: str, words: Sequence[str], save: Path) -> None:
    """Train by the code of a commit, in one process."""
    with _checked_out(commit, save.parent / f"{save.name}.code") as code:
        _train(code, 1, words, save)


def run_layout(layout: str, words: Sequence[str], save: Path) -> None:
    """Train by this code with the flags of a layout, under torchrun if it has several ranks.

    As many ranks as ``--nproc-per-node N`` in the layout says; default: one data-parallel rank.
    """
    own = shlex.split(layout)
    ranks = _number(own, _RANKS)
    if ranks is not None:
        at = own.index(_RANKS)
        del own[at : at + 2]
    else:
        ranks = 1
        for kind in ("tensor", "pipeline"):
            ranks *= _number(own, f"--{kind}-model-parallel-size") or 1
    _train(PROJECT, ranks, [*words, *own], save)


def _number(words: Sequence[str], flag: str) -> int | None:
    if flag not in words:
        return None
    value = words[words.index(flag) + 1] if words.index(flag) + 1 < len(words) else ""
    if not value.isdigit() or value == "0":
        raise ConfigError(f"{flag} {value!r} is not a number of ranks")
    return int(value)


def _train(code: Path, ranks: int, words: Sequence[str], save: Path) -> None:
    program = ["-m", "megatron_miniplm", "pretrain", *words, "--save", str(save)]
    if "--log-interval" not in words:
        program += ["--log-interval", "1"]
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", _RANKS, str(ranks)] if ranks > 1 else []
    )
    # Safe path: `python -m` must not prefer a package in the folder that one stands in.
    environment = {**os.environ, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *program],
        check=False, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise MiniPLMError(
            f"pretrain for {save.name} ended with code {done.returncode}:\n{done.stderr[-3000:]}"
        )


@contextmanager
def _checked_out(commit: str, folder: Path) -> Iterator[Path]:
    if commit == ".":
        yield PROJECT
        return
    _git("worktree", "add", "--detach", str(folder), commit)
    try:
        _add_extension(commit, folder)
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _add_extension(commit: str, folder: Path) -> None:
    built = list((PROJECT / "megatron_miniplm").glob("_C*.so"))
    if built and not _git("diff", "--stat", commit, "--", *_NATIVE):
        for path in built:
            shutil.copy2(path, folder / "megatron_miniplm")
        return
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, check=True
    )


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(PROJECT), *words], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise ConfigError(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
