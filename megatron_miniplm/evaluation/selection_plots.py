"""What a selection did, drawn from the facts in a subset's manifest (`selection.diagnostics`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_miniplm.evaluation.figures import DROPPED, INK, KEPT, new_figure, plain, to_png

if TYPE_CHECKING:
    from megatron_miniplm.evaluation.figures import Axes

Facts = Mapping[str, Any]
_MOST_DOMAINS = 24


def key_name(selector: str | None, normalization: str) -> str:
    """What the keys of a selector are called, over scores that are so normalised."""
    if selector != "difference":
        return f"key of {selector}"
    return "r" if normalization == "mean" else "summed r"


def selection_overview(facts: Facts, *, title: str = "") -> bytes:
    """Ranks, kept share of each domain and lengths side by side; a PNG."""
    return _draw([_scores, _shares, _length_curves], facts, title)


def score_distribution(facts: Facts, *, title: str = "") -> bytes:
    """Histogram of the ranks, kept against dropped, with the threshold; a PNG.

    Bins span the central 99.8 %; what lies beyond is counted in the outermost ones.
    """
    return _draw([_scores], facts, title)


def kept_by_domain(facts: Facts, *, title: str = "") -> bytes:
    """Bars of the share of each domain's instances kept; a PNG."""
    return _draw([_shares], facts, title)


def length_distribution(facts: Facts, *, title: str = "") -> bytes:
    """Histogram of instance lengths in tokens, kept against dropped, as shares; a PNG."""
    return _draw([_length_curves], facts, title)


def _draw(panels: list[Callable[[Axes, Facts], None]], facts: Facts, title: str) -> bytes:
    figure, axes = new_figure(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        panel(axis, facts)
    return to_png(figure, title)


def _scores(axis: Axes, facts: Facts) -> None:
    found = facts["histogram"]
    edges, kept = np.array(found["edges"]), np.array(found["kept"])
    dropped = np.array(found["all"]) - kept
    axis.bar(edges[:-1], dropped, np.diff(edges), align="edge", color=DROPPED,
             label=f"dropped ({_total(facts) - facts['num_kept']:,})", lw=0)  # fmt: skip
    axis.bar(edges[:-1], kept, np.diff(edges), bottom=dropped, align="edge", color=KEPT,
             label=f"kept ({facts['num_kept']:,})", lw=0)  # fmt: skip
    threshold = facts["threshold"]
    # Where strata have thresholds of their own, or chance chose, no line tells kept from dropped.
    if not (dropped[edges[:-1] >= threshold].any() or kept[edges[1:] <= threshold].any()):
        axis.axvline(threshold, color=INK, lw=1.2, ls="--", label=f"threshold {threshold:.3f}")
    key = key_name(facts["selector"], facts.get("score_normalization", "mean"))
    axis.set_xlabel(
        f"{key} = NLL(reference) - NLL(teacher), nats" if facts["selector"] == "difference" else key
    )
    sampled = facts["sampled_rows"] < _total(facts)
    axis.set_ylabel(f"instances, of {facts['sampled_rows']:,} drawn" if sampled else "instances")
    axis.legend(frameon=False)


def _shares(axis: Axes, facts: Facts) -> None:
    largest = sorted(facts["domains"].items(), key=lambda item: -item[1]["instances"])
    domains = sorted(largest[:_MOST_DOMAINS], key=lambda item: item[1]["share"])
    shares = [100 * domain["share"] for _, domain in domains]
    axis.barh([plain(name) for name, _ in domains], shares, color=KEPT, height=0.62)
    for row, (_, domain) in enumerate(domains):
        text = f"{100 * domain['share']:.0f} % of {domain['instances']:,}"
        axis.text(102, row, text, va="center", fontsize=9)
    together = 100 * facts["num_kept"] / _total(facts)
    axis.axvline(together, color=INK, lw=1.2, ls="--", label=f"all: {together:.0f} %")
    axis.set_xlim(0, 132)
    axis.set_xticks(range(0, 101, 20))
    more = len(largest) - len(domains)
    axis.set_xlabel("instances kept (%)" + (f"; {more} smaller domains not shown" if more else ""))
    axis.grid(visible=False, axis="y")
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


def _length_curves(axis: Axes, facts: Facts) -> None:
    found, means = facts["lengths"], facts["mean_length"]
    kept = np.array(found["kept"])
    dropped = np.array(found["all"]) - kept
    for counts, color, name in ((kept, KEPT, "kept"), (dropped, DROPPED, "dropped")):
        if counts.sum():
            heights = 100 * counts / counts.sum()
            label = f"{name}, mean {means[name]:,.0f}"
            axis.stairs(heights, found["edges"], color=color, lw=1.8, label=label)
            axis.stairs(heights, found["edges"], color=color, alpha=0.12, fill=True)
    axis.set_xlabel("instance length (tokens)")
    axis.set_ylabel("share of the part (%)")
    axis.legend(frameon=False)


def _total(facts: Facts) -> int:
    return sum(domain["instances"] for domain in facts["domains"].values())
