"""A plan as text: a row for each method, and what a table has no column for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

_SCALES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def cost_table(each: Mapping[str, Any]) -> Table:
    """Costs of each method for one number of training tokens (one of ``plans``)."""
    students = next(iter(each["methods"].values()))["students"]
    table = Table(
        title=f"{_amount(each['tokens'])} tokens of a corpus of {_amount(each['corpus_tokens'])}, "
        f"{len(students)} student(s)",
        title_justify="left",
    )
    table.add_column("method")
    for name in (
        "training FLOPs", "offline FLOPs", "a student", "GPU-hours", "offline", "days",
        "tokens at equal training FLOPs", "storage",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for name, cost in each["methods"].items():
        offline = sum(cost["offline_flops"].values())
        beside = sum(size for kind, size in cost["storage"].items() if kind != "corpus")
        table.add_row(
            name,
            f"{sum(student['training_flops'] for student in cost['students']):.2e}",
            f"{offline:.1e}" if offline else "",
            f"{cost['flops_per_student']:.2e}",
            f"{cost['gpu_hours']:,.0f}",
            f"{cost['offline_gpu_hours']:,.0f}" if offline else "",
            f"{cost['wall_hours'] / 24:,.1f}",
            " ".join(_amount(student["aligned_tokens"]) for student in cost["students"]),
            f"{_short(beside)}B" if beside else "",
        )
    return table


def notes(each: Mapping[str, Any], plans: Mapping[str, Any]) -> list[str]:
    """What the table has no column for."""
    corpus = next(iter(each["methods"].values()))["storage"]["corpus"]
    lines = [
        f"beside that: corpus {_short(corpus)}B, checkpoints of the students "
        f"{_short(each['checkpoints'])}B; every logit would be {_short(each['dense_logits'])}B"
    ]
    for found in each["pays_off"]:
        less = ""
        if found["beside"] == "pretrain":
            less = f", if it takes {plans['times_less_compute']:g} times less training"
        said = f"{found['method']} beside {found['beside']}{less}: "
        if found["students"] is None:
            lines.append(said + "never pays")
            continue
        lines.append(
            said + f"{found['offline_gpu_hours']:,.0f} GPU-hours once save "
            f"{found['saved_gpu_hours_per_student']:,.0f} a student: pays from student "
            f"{max(1, found['students']):,} on, after {_amount(found['tokens'])} trained tokens"
        )
    return [*lines, ""]


def _amount(tokens: float) -> str:
    """12.5B, 1.2T."""
    return _short(tokens).replace("G", "B")


def _short(value: float) -> str:
    """12.5G, 1.2T."""
    for scale, letter in _SCALES:
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}"
