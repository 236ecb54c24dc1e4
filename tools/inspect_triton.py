"""Compile every Triton kernel for sm_90 ahead of time and print what ptxas made of it: no GPU.

    python tools/inspect_triton.py [--form jsd ...] [--student bf16] [--teacher bf16]

Registers and spills decide how many programs a multiprocessor holds, so read this table before
renting a GPU, and after every change. Types and divisibility are those of V = 151,936 (Qwen).
Columns: registers a thread, stack bytes a thread, loads and stores of that stack, shared memory,
instructions in all and exponentials (MUFU.EX2), and programs that fit on one multiprocessor by
registers and threads. Exit code 1 where anything spills.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported: this is about real code

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_miniplm.kernels import triton_loss
from megatron_miniplm.kernels.token_loss import DIVERGENCES
from megatron_miniplm.kernels.triton_grad import grad_kernel, inner_kernel
from megatron_miniplm.kernels.triton_losses import needs_inner
from megatron_miniplm.kernels.triton_one_read import WHOLE, one_read_kernel
from megatron_miniplm.kernels.triton_rows import Matrix, TokenArrays
from megatron_miniplm.kernels.triton_stats import merge_kernel, stats_kernel
from megatron_miniplm.kernels.triton_two_pass import two_pass_kernel

VOCABULARY = 151_936
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS, THREADS = 65536, 2048  # of an sm_90 multiprocessor
TOKENS = TokenArrays("*i64", "*fp32", "*fp32", "*fp32", "*fp32", "i32", "i32")
NOT_DIVISIBLE = {"beta", "z_loss", "slices"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel with the types of its own arguments."""

    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    warps: int


def cases(form: str | None) -> Iterator[Case]:
    """Every kernel that a loss of this form launches."""
    tile, part = {"TILE": triton_loss.TILE}, {"SLICE": triton_loss.SLICE}
    warps = triton_loss.LAUNCH["num_warps"]
    out = {"record": "*fp32", "inner": "*fp32" if needs_inner(form) else "constexpr"}
    scalars = {"beta": "fp32", "z_loss": "fp32"}
    yield Case(
        kernel=stats_kernel,
        arguments={"parts": "*fp32", "slices": "i32"},
        constants=tile | part,
        warps=warps,
    )
    width = triton.next_power_of_2(triton.cdiv(VOCABULARY, triton_loss.SLICE))
    yield Case(
        kernel=merge_kernel,
        arguments={"parts": "*fp32", "record": "*fp32", "slices": "i32"},
        constants={"WIDTH": width},
        warps=1,
    )
    if needs_inner(form):
        yield Case(
            kernel=inner_kernel,
            arguments={"record": "*fp32", "parts": "*fp32", "slices": "i32", "beta": "fp32"},
            constants=tile | part,
            warps=warps,
        )
    yield Case(
        kernel=grad_kernel,
        arguments=out | {"columns": "i32", "slices": "i32"} | scalars,
        constants=tile | part,
        warps=warps,
    )
    yield Case(
        kernel=two_pass_kernel,
        arguments=out | {"columns": "i32"} | scalars,
        constants=tile,
        warps=warps,
    )
    slice_columns = triton_loss.ONE_READ_SLICE
    width = triton.next_power_of_2(triton.cdiv(VOCABULARY, slice_columns))
    yield Case(
        kernel=one_read_kernel,
        arguments=out
        | {"parts": "*fp32", "inner_parts": out["inner"], "turns": "*i32"}
        | {"columns": "i32", "slices": "i32"}
        | scalars,
        constants={"SLICE": slice_columns, "WIDTH": width, "STEP": WHOLE.value},
        warps=warps,
    )


def compiled(case: Case, form: str | None, student: str, teacher: str) -> Any:
    """The kernel as a launch with these types would compile it."""
    constants = case.constants | {"FORM": form}
    kinds: dict[str, Any] = {
        "student": Matrix(f"*{student}", "i32"),
        "teacher": Matrix(f"*{teacher}", "i32"),
        "tokens": TOKENS,
        **case.arguments,
        **dict.fromkeys(constants, "constexpr"),
    }
    if form is None:
        kinds["teacher"] = Matrix("constexpr", "constexpr")
    # A path of positions says which argument is meant: (1, 0) is teacher.data.
    signature = {name: kinds[name] for name in case.kernel.arg_names}
    values = {
        path: constants.get(name) for path, name, kind in _leaves(signature) if kind == "constexpr"
    }
    attributes = {
        path: [["tt.divisibility", 16]]
        for path, name, kind in _leaves(signature)
        if kind != "constexpr" and name not in NOT_DIVISIBLE and kind != "fp32"
    }
    source = ASTSource(case.kernel, signature, values, attributes)
    return triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": case.warps, "maxnreg": triton_loss.LAUNCH["maxnreg"]},
    )


def _leaves(signature: dict[str, Any]) -> Iterator[tuple[tuple[int, ...], str, str]]:
    for index, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            yield from (((index, inner), name, part) for inner, part in enumerate(kind))
        else:
            yield (index,), name, kind


def usage(binary: bytes) -> dict[str, int]:
    """Numbers of cuobjdump and nvdisasm, which come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        resources = _output(BINARIES / "cuobjdump", "-res-usage", file.name)
        assembly = _output(BINARIES / "nvdisasm", "-c", file.name)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", resources)}
    found["instructions"] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", assembly, re.MULTILINE))
    found["exponentials"] = assembly.count("MUFU.EX2")
    found["spilling"] = len(re.findall(r"\b(?:LDL|STL)\b", assembly))
    return found


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Print one row a kernel and form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", nargs="*", default=["none", *DIVERGENCES])
    parser.add_argument("--student", default="bf16")
    parser.add_argument("--teacher", default="bf16")
    flags = parser.parse_args()
    table = Table("form", "kernel", "regs", "stack B", "spills", "shared B", "instr", "ex2",
                  "programs/SM", title=f"sm_90, Triton {triton.__version__}")  # fmt: skip
    spills = 0
    for name in flags.form:
        form = None if name == "none" else name
        for case in cases(form):
            kernel = compiled(case, form, flags.student, flags.teacher)
            used = usage(kernel.asm["cubin"])
            fits = min(REGISTERS // (used["REG"] * 32 * case.warps), THREADS // (32 * case.warps))
            row = [name, case.kernel.__name__, used["REG"], used["STACK"],
                   used["spilling"], kernel.metadata.shared,
                   used["instructions"], used["exponentials"], fits]  # fmt: skip
            table.add_row(*map(str, row))
            spills += used["spilling"]
    Console(width=120).print(table)
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
