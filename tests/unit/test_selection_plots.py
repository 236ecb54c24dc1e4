"""What the plots of a selection show, looked up in the figures themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_miniplm.evaluation import selection_plots as plots

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def facts() -> dict[str, Any]:
    """Of 6 instances in two domains, 3 kept from r = 0.5 on."""
    return {
        "selector": "difference", "num_kept": 3, "threshold": 0.5, "sampled_rows": 6,
        "histogram": {"edges": [-1.0, 0.5, 2.0, 3.5], "all": [3, 2, 1], "kept": [0, 2, 1]},
        "domains": {
            "a": {"instances": 4, "kept": 1, "share": 0.25},
            "b": {"instances": 2, "kept": 2, "share": 1.0},
        },
        "lengths": {"edges": [0, 16, 32], "all": [2, 4], "kept": [1, 2]},
        "mean_length": {"all": 20.0, "kept": 21.0, "dropped": 19.0},
    }  # fmt: skip


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved, to look at what it shows."""
    figures: list[Figure] = []
    real = Figure.savefig

    def savefig(self, *args, **kwargs):
        figures.append(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_the_histogram_stacks_kept_on_dropped_and_marks_the_threshold(facts, drawn):
    assert plots.score_distribution(facts).startswith(PNG)
    axis = drawn[0].axes[0]
    dropped, kept = axis.containers
    assert [bar.get_height() for bar in dropped] == [3, 0, 0]
    assert [bar.get_height() for bar in kept] == [0, 2, 1]
    assert [bar.get_y() for bar in kept] == [3, 0, 0]
    assert axis.lines[0].get_xdata()[0] == 0.5
    assert axis.get_ylabel() == "instances"


def test_without_a_dividing_threshold_there_is_no_line(facts, drawn):
    facts["histogram"]["kept"] = [1, 1, 1]  # strata, or chance
    plots.score_distribution(facts)
    assert not drawn[0].axes[0].lines


def test_a_sample_is_said(facts, drawn):
    facts["sampled_rows"] = 4
    plots.score_distribution(facts)
    assert drawn[0].axes[0].get_ylabel() == "instances, of 4 drawn"


def test_domain_bars_show_the_share_kept_of_each_domain(facts, drawn):
    assert plots.kept_by_domain(facts).startswith(PNG)
    axis = drawn[0].axes[0]
    widths = {
        label.get_text(): bar.get_width()
        for label, bar in zip(axis.get_yticklabels(), axis.patches, strict=True)
    }
    assert widths == {"a": 25.0, "b": 100.0}
    assert axis.lines[0].get_xdata()[0] == 50


def test_of_many_domains_the_largest_are_shown(facts, drawn):
    for number in range(40):
        facts["domains"][f"d{number}"] = {"instances": 10 + number, "kept": 0, "share": 0.0}
    plots.kept_by_domain(facts)
    axis = drawn[0].axes[0]
    assert len(axis.patches) == 24
    assert "18 smaller domains not shown" in axis.get_xlabel()


def test_length_outlines_are_shares_of_each_part(facts, drawn):
    assert plots.length_distribution(facts).startswith(PNG)
    outlines = [patch.get_data() for patch in drawn[0].axes[0].patches]
    assert [data.values.sum() for data in outlines] == pytest.approx([100] * 4)


def test_everything_kept_has_no_dropped_outline(facts, drawn):
    facts["lengths"]["kept"] = facts["lengths"]["all"]
    plots.length_distribution(facts)
    assert len(drawn[0].axes[0].patches) == 2


def test_the_overview_has_the_three_side_by_side(facts, drawn):
    assert plots.selection_overview(facts, title="pool").startswith(PNG)
    assert len(drawn[0].axes) == 3
    assert drawn[0].get_suptitle() == "pool"
    assert np.isclose(drawn[0].get_size_inches()[0], 3 * 5.8)
