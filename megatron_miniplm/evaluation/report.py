"""Training curves, and the one maker of HTML: a self-contained page around figures and tables.

A page has no script and loads nothing: figures are embedded as ``data:`` images, the content
security policy forbids the rest, and every text (corpus text may hold anything, ``<script>``
included) is escaped.

A run is read from ``SAVE/metrics.jsonl``: rows with ``lm loss`` are training steps, rows with
``validation`` are validations. Runs with one label are seeds of one method: curves show their
mean, and the band or bar around it is one standard deviation.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.evaluation.figures import PALETTE, new_figure, to_png

if TYPE_CHECKING:
    from megatron_miniplm.evaluation.figures import Axes

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one training run logged; arrays of equal length, float64."""

    label: str
    """Method; runs with one label are its seeds."""
    tokens: Array
    """Tokens consumed at each logged step."""
    loss: Array
    """Training loss, nats per token."""
    validation_tokens: Array
    """Tokens consumed at each validation."""
    validation_loss: Array
    """Validation loss, nats per token."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a header; columns after the first are right-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A PNG and, for those who cannot see it and as its caption, what it shows."""

    png: bytes
    caption: str
    wide: bool = False
    """Across the whole page; otherwise two plots share a row."""
    name: str = ""
    """Its file, without .png, where a page has its pictures beside it."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A piece of corpus text with a title, folded away until it is opened."""

    title: str
    text: str
    kept: bool
    opened: bool = False
    """Unfolded when the page opens."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A line of a tree, and those that hang on it."""

    text: str
    branches: Sequence[Branch] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """One card of the page: text, table, plots, examples and trees, in this order."""

    title: str
    text: str = ""
    table: Table | None = None
    plots: Sequence[Plot] = ()
    examples: Sequence[Example] = ()
    tree: Sequence[Branch] = ()


def read_run(folder: Path, label: str) -> Run:
    """Read ``folder/metrics.jsonl``; a torn last line (a killed run) is left out."""
    path = Path(folder) / "metrics.jsonl"
    rows = read_rows(path)
    train = [row for row in rows if "lm loss" in row]
    if not train:
        raise DataError(f"{path} holds no step with an `lm loss`: has this run logged anything?")
    valid = [row for row in rows if "validation" in row]
    samples = np.array([row["consumed_samples"] for row in train], dtype=np.float64)
    tokens = np.array([row["consumed_tokens"] for row in train], dtype=np.float64)
    at = np.array([row["consumed_samples"] for row in valid], dtype=np.float64)
    return Run(
        label=label,
        tokens=tokens,
        loss=np.array([row["lm loss"] for row in train], dtype=np.float64),
        validation_tokens=np.interp(at, np.r_[0.0, samples], np.r_[0.0, tokens]),
        validation_loss=np.array([_validation_loss(row["validation"]) for row in valid]),
    )


def _validation_loss(losses: Mapping[str, float]) -> float:
    """That of the set without a name; of the first one where all have names."""
    return losses.get("lm loss", next(iter(losses.values())))


def read_rows(path: Path) -> list[dict]:
    """The JSON objects of a file of lines; a resumed run's repeated steps: the last one counts."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; is this the --save folder of a run?") from error
    last: dict[tuple[int, bool], dict] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        if row is not None:
            last[row["iteration"], "validation" in row] = row
    return [last[key] for key in sorted(last)]


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """``3.1234 ± 0.0056 (n=3)``: mean and sample standard deviation; no spread for one value."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f} (n=1)"
    spread = np.std(values, ddof=1)
    return f"{np.mean(values):.{digits}f} ± {spread:.{digits}f} (n={len(values)})"


def loss_curves(runs: Sequence[Run], *, title: str = "") -> bytes:
    """Loss against tokens: smoothed training loss by method, and validations; returns a PNG.

    Refuses an empty list. With validations there are two panels, else one.
    """
    if not runs:
        raise DataError("no runs to plot")
    validated = any(run.validation_loss.size for run in runs)
    figure, axes = new_figure(2 if validated else 1)
    for color, (label, seeds) in zip(_cycle(), by_label(runs).items(), strict=False):
        curves = [(r.tokens / 1e6, smooth(r.loss)) for r in seeds]
        draw_curve(axes[0], curves, label=label, color=color)
        if validated:
            curves = [(r.validation_tokens / 1e6, r.validation_loss) for r in seeds]
            draw_curve(axes[1], curves, label=label, color=color, marker="o")
    axes[0].set_ylabel("training loss (nats per token), smoothed")
    for axis in axes:
        axis.set_xlabel("training tokens (millions)")
        axis.legend(frameon=False)
    if validated:
        axes[1].set_ylabel("validation loss (nats per token)")
    return to_png(figure, title)


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of each label, in order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def smooth(values: Array, span: int = 0) -> Array:
    """Centred running mean over `span` points (0: a twentieth of them); ends use what is there."""
    span = max(1, min(span or len(values) // 20, len(values)))
    total = np.convolve(values, np.ones(span), mode="same")
    return total / np.convolve(np.ones(len(values)), np.ones(span), mode="same")


def draw_curve(
    axis: Axes,
    curves: Sequence[tuple[Array, Array]],
    *,
    label: str,
    color: str,
    marker: str = "",
    width: float = 2,
) -> None:
    """Mean of several curves on the first one's grid, a band of one deviation, thin single ones."""
    curves = [(x, y) for x, y in curves if len(x)]
    if not curves:
        return
    end = min(x[-1] for x, _ in curves)
    grid = np.unique(np.minimum(curves[0][0], end))  # seeds of one length differ by a few tokens
    stack = np.stack([np.interp(grid, x, y) for x, y in curves])
    mean = stack.mean(axis=0)
    axis.plot(
        grid, mean, color=color, lw=width, marker=marker, ms=4, label=_name(label, len(curves))
    )
    if len(curves) > 1:
        spread = stack.std(axis=0, ddof=1)
        axis.fill_between(grid, mean - spread, mean + spread, color=color, alpha=0.18, lw=0)
        for x, y in curves:
            axis.plot(x, y, color=color, lw=0.6, alpha=0.5)


def _name(label: str, seeds: int) -> str:
    """A label in a legend: not read as a formula, nor left out for an underscore in front."""
    shown = label.replace("$", r"\$")
    shown = f" {shown}" if shown.startswith("_") else shown
    return f"{shown} ({seeds} seeds)" if seeds > 1 else shown


def _cycle() -> Sequence[str]:
    return PALETTE * 8


def render_page(
    title: str,
    sections: Sequence[Section],
    *,
    lead: str = "",
    facts: Mapping[str, str] | None = None,
) -> str:
    """One self-contained HTML page; `facts` are shown as small print under the lead."""
    items = "".join(
        f"<span>{_text(name)} <b>{_text(value)}</b></span>" for name, value in (facts or {}).items()
    )
    body = "".join(_section(section) for section in sections)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_CSS}</style></head><body><main>"
        f"<header><h1>{_text(title)}</h1>{_paragraph('lead', _text(lead))}"
        f"{_paragraph('facts', items)}</header>{body}</main></body></html>\n"
    )


def _paragraph(kind: str, inner: str) -> str:
    return f'<p class="{kind}">{inner}</p>' if inner else ""


def _section(section: Section) -> str:
    parts = [f"<h2>{_text(section.title)}</h2>"]
    parts += [f"<p>{_text(block)}</p>" for block in section.text.split("\n\n") if block]
    if section.table is not None:
        parts.append(_table(section.table))
    if section.plots:
        parts.append(f'<div class="plots">{"".join(map(_plot, section.plots))}</div>')
    parts += [_example(example) for example in section.examples]
    if section.tree:
        parts.append(f'<div class="tree">{_tree(section.tree)}</div>')
    return f"<section>{''.join(parts)}</section>"


def _plot(plot: Plot) -> str:
    data, caption = base64.b64encode(plot.png).decode(), _text(plot.caption)
    kind = "wide" if plot.wide else "half"
    return (
        f'<figure class="{kind}"><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in table.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return (
        '<div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _example(example: Example) -> str:
    kind = "kept" if example.kept else "dropped"
    return (
        f"<details{' open' if example.opened else ''}>"
        f'<summary><span class="{kind}">{kind}</span> {_text(example.title)}</summary>'
        f"<pre>{_text(example.text)}</pre></details>"
    )


def _tree(branches: Sequence[Branch]) -> str:
    items = (
        f"<li>{_text(each.text)}{_tree(each.branches) if each.branches else ''}</li>"
        for each in branches
    )
    return f"<ul>{''.join(items)}</ul>"


def _text(value: str) -> str:
    """Escaped for HTML; control characters, which no page may hold, become U+FFFD."""
    clean = "".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "\ufffd" for c in value)
    return html.escape(clean, quote=True)


_CSS = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0;background:#f4f6f8;color:#1f2933;font:16px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:70rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .6rem;letter-spacing:-.01em}
h2{font-size:1.15rem;margin:0 0 .7rem}
.lead{font-size:1.05rem;margin:0 0 .8rem;max-width:46rem}
.facts{color:#5b6773;font-size:.85rem;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:0}
.facts b{color:#1f2933;font-weight:600}
section{background:#fff;border:1px solid #e1e6eb;border-radius:10px;padding:1.4rem 1.6rem;
margin-top:1.4rem}
section p{margin:.2rem 0 .8rem;max-width:46rem}
table{border-collapse:collapse;min-width:min(46rem,100%);font-variant-numeric:tabular-nums;
font-size:.94rem;margin:.4rem 0 .6rem}
th{text-align:right;font-weight:600;color:#5b6773;border-bottom:2px solid #d5dce3;
padding:.35rem .6rem;font-size:.85rem}
td{text-align:right;border-bottom:1px solid #edf0f3;padding:.4rem .6rem;white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}
figure{margin:0}.wide{grid-column:1/-1}.plots{display:grid;gap:1.2rem 2rem;margin:1rem 0;
grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr))}img{max-width:100%;height:auto;display:block}
figcaption{color:#5b6773;font-size:.87rem;margin-top:.4rem;max-width:46rem}
details{border-top:1px solid #edf0f3;padding:.5rem 0}
summary{cursor:pointer;font-size:.94rem}
summary span{display:inline-block;min-width:4.6rem;text-align:center;border-radius:99px;
font-size:.78rem;font-weight:600;padding:.1rem .6rem;margin-right:.4rem;color:#fff}
.kept{background:#0072B2}.dropped{background:#b94a00}
pre{background:#f7f9fa;border:1px solid #e6eaee;border-radius:6px;padding:.8rem 1rem;
overflow-x:auto;font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
white-space:pre-wrap;overflow-wrap:anywhere;max-height:26rem;overflow-y:auto}
.scroll{overflow-x:auto}
.tree{font:12.5px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.tree ul{list-style:none;margin:0;padding:0 0 0 1.1rem;border-left:1px solid #d5dce3}
.tree>ul{border:0;padding:0}.tree>ul>li{font-weight:600;margin-top:.8rem}
.tree ul ul{font-weight:400}
@media(max-width:40rem){main{padding:1.2rem .6rem 2rem}section{padding:1rem .9rem}
.wide{overflow-x:auto}.wide img{max-width:none;width:46rem}.tree ul{padding-left:.6rem}}
"""
