"""Where runs ended, side by side: the last held-out losses, best first, seeds as a bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_miniplm.evaluation.figures import INK, KEPT, new_figure, plain, to_png

if TYPE_CHECKING:
    from megatron_miniplm.evaluation.run_curves import History

FEWEST = 3
"""Labels below which a chart says no more than the table does."""


def final_losses(groups: Mapping[str, Sequence[History]]) -> bytes | None:
    """A line for each label of `groups` (label -> seeds), of the first held-out loss: a PNG.

    None where fewer than `FEWEST` labels have validated on one set.
    """
    names = dict.fromkeys(
        n for group in groups.values() for each in group for n in each.validations
    )
    if not names:
        return None
    name = next(iter(names))
    ends = {
        label: [float(each.validations[name][1][-1]) for each in seeds if name in each.validations]
        for label, seeds in groups.items()
    }
    ends = {label: found for label, found in ends.items() if found}
    if len(ends) < FEWEST:
        return None
    worst_first = sorted(ends, key=lambda label: -float(np.mean(ends[label])))
    figure, (axis,) = new_figure(1, columns=1, height=0.8 + 0.24 * len(ends))
    for row, label in enumerate(worst_first):
        found = ends[label]
        axis.plot([min(found), max(found)], [row, row], color=KEPT, lw=3, alpha=0.3)
        axis.plot(np.mean(found), row, "o", color=KEPT, ms=6)
        axis.annotate(
            f"{np.mean(found):.3f}", (max(found), row), xytext=(8, 0), textcoords="offset points",
            va="center", fontsize=9, color=INK,
        )  # fmt: skip
    axis.set_yticks(range(len(worst_first)), [plain(label) for label in worst_first])
    axis.margins(x=0.12)
    axis.set_xlabel(f"held out at the end: {plain(name)} (nats per token)")
    return to_png(figure, "")
