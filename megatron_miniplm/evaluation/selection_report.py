"""What a selection did, as cards of a page: keys, kept shares of domains, lengths, and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_miniplm.evaluation.report import Example, Plot, Section
from megatron_miniplm.evaluation.selection_plots import (
    kept_by_domain,
    key_name,
    length_distribution,
    score_distribution,
)
from megatron_miniplm.selection import examples
from megatron_miniplm.selection.population import Population

_CHANCE = "random"
"""A selector whose keys are not worth a picture."""
_MEANING = {
    "difference": "{key} = log p(teacher) - log p(reference), {unit}. High: text that the better "
    "model learned to predict and the small one did not. Low: easy for both, or noise to both.",
    _CHANCE: "Chosen by chance.",
}
"""Of the keys of a selector."""
_ORDERS: Sequence[tuple[examples.Order, str]] = (
    ("top", "highest"),
    ("borderline", "nearest to the threshold"),
    ("bottom", "lowest"),
)
_LONGEST = 6_000
"""Characters of an instance that a page shows."""


def selection_section(facts: Mapping[str, Any], title: str, *, name: str = "selection") -> Section:
    """Of a subset's `selection` facts (its manifest has them); pictures are called NAME_..."""
    selector = facts["selector"]
    normalization = facts.get("score_normalization", "mean")
    key = key_name(selector, normalization)
    text = _MEANING.get(selector, "Instances with higher keys are kept.").format(
        key=key, unit="per token" if normalization == "mean" else "over all tokens of an instance"
    )
    plots = [
        Plot(
            png=kept_by_domain(facts),
            caption="Share of each kind of text that was kept.",
            name=f"{name}_domains",
        ),
        Plot(
            png=length_distribution(facts),
            caption="Instance lengths: a score that favours short or long ones shows here.",
            name=f"{name}_lengths",
        ),
    ]
    if selector != _CHANCE:
        caption = f"Of every instance: {key}."
        plots.insert(0, Plot(png=score_distribution(facts), caption=caption, name=f"{name}_keys"))
    return Section(title=title, text=text, plots=plots)


def examples_section(population: Population, title: str, *, count: int) -> Section:
    """`count` instances each from the top, about the threshold and from the bottom, as text."""
    key = key_name(population.selector, population.normalization)
    shown = []
    for order, what in _ORDERS:
        found = population.examples(count, order=order, seed=1)
        for number, item in enumerate(found):
            figures = [f"instance {item.id}, {item.num_tokens:,} tokens"]
            if said := _figures(item):
                figures.insert(0, said)
            shown.append(
                Example(
                    title=" | ".join([f"{what} {key}" if order != "borderline" else what,
                                      item.domain, *figures]),
                    text=_shortened(item.text),
                    kept=bool(item.kept),
                    opened=number == 0,
                )
            )  # fmt: skip
    return Section(title=title, examples=shown)


def _figures(item: examples.Example) -> str:
    """What the models think of an instance, nats a token."""
    return ", ".join(
        f"{name} {value:{sign}.3f}"
        for name, value, sign in (
            ("log p", item.teacher_log_prob, ""),
            ("log p_ref", item.reference_log_prob, ""),
            ("r", item.difference, "+"),
            ("predicted r", item.predicted_difference, "+"),
        )
        if value is not None
    )


def _shortened(text: str) -> str:
    more = len(text) - _LONGEST
    return text if more <= 0 else f"{text[:_LONGEST]}\n[{more:,} more characters]"
