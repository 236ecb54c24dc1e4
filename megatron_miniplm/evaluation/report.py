"""The one maker of HTML: a self-contained page around figures and tables.

A page has no script and loads nothing: figures are embedded as ``data:`` images, the content
security policy forbids the rest, and every text (corpus text may hold anything, ``<script>``
included) is escaped.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_FORBIDDEN = re.compile(
    r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(f"\\U{plane:04x}fffe\\U{plane:04x}ffff" for plane in range(17))
    + "]"
)
"""Controls, halves of surrogate pairs, and the last two code points of every plane."""


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


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """``3.1234 ± 0.0056 (n=3)``: mean and sample standard deviation; no spread for one value."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f} (n=1)"
    spread = np.std(values, ddof=1)
    return f"{np.mean(values):.{digits}f} ± {spread:.{digits}f} (n={len(values)})"


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
    """Escaped for HTML; characters that no page may hold become U+FFFD."""
    return html.escape(_FORBIDDEN.sub("\ufffd", value), quote=True)


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
