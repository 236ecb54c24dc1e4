"""The look of every plot: empty figures, their colours, and how they become PNG bytes.

Colours are Okabe and Ito's, told apart by colour-blind readers, too.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import cycle, product
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT, DROPPED, INK, MUTED = "#0072B2", "#D55E00", "#1f2933", "#6b7785"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
_GRID = "#e3e7ec"


class Style(NamedTuple):
    """What tells one curve from others."""

    color: str
    line: str
    marker: str


def styles() -> Iterator[Style]:
    """Of curves, without an end: after all colours come other lines and markers, then all again."""
    for (line, marker), color in cycle(product(_LINES, PALETTE)):
        yield Style(color, line, marker)


def plain(text: str) -> str:
    """`text` as matplotlib shows it letter for letter, and not as a formula."""
    return text.replace("$", r"\$")


def new_figure(
    panels: int, *, columns: int | None = None, height: float = 3.9
) -> tuple[Figure, Sequence[Axes]]:
    """An empty figure (no global pyplot state) with light axes, side by side or in `columns`.

    Columns share the width of a page; `height` is that of one row, in inches.
    """
    from matplotlib.figure import Figure  # takes a second, which commands without a plot save

    width = 5.8 * panels if columns is None else min(11.6, 5.8 * columns)
    columns = columns or panels
    rows = -(-panels // columns)
    figure = Figure(
        figsize=(width, height * rows), dpi=150, layout="constrained", facecolor="white"
    )
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in places[panels:]:
        unused.set_axis_off()
    axes = places[:panels]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#aab4bf")
        axis.grid(color=_GRID, lw=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=MUTED, labelcolor=INK, length=3)
    return figure, axes


def few_marks(axis: Axes) -> None:
    """Write a logarithmic axis as 0.5, 1, 2, and large numbers as 1.2 M."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    if axis.get_yscale() == "log":
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif axis.get_ylim()[1] >= 1e4:
        axis.yaxis.set_major_formatter(EngFormatter())


def to_png(figure: Figure, title: str) -> bytes:
    """The figure under its title, if there is one."""
    if title:
        figure.suptitle(title, color=INK, fontweight="bold", x=0.01, ha="left", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
