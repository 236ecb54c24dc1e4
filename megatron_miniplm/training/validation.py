"""Losses on held-out data during training: ``--valid-data-path PREFIX NAME=PREFIX ...``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.blend import check_same_language
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.objectives.lm import summarize_rows
from megatron_miniplm.parallel.topology import Topology

_FLAG = "--valid-data-path"


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Sets of held-out instances, and how they are read."""

    sets: Mapping[str, Corpus]
    """By name; "" for the one that has none."""
    micro_batch_size: int
    most: int | None
    """Instances of each set that are used; None: all."""
    topology: Topology

    def losses(self, model: ModelChunks) -> dict[str, float]:
        """Metric -> nats per token; those of a named set begin with its name."""
        found = {}
        for name, corpus in self.sets.items():
            count = len(corpus) if self.most is None else min(len(corpus), self.most)
            summary = summarize_rows(
                model, corpus, np.arange(count),
                micro_batch_size=self.micro_batch_size, topology=self.topology,
            )  # fmt: skip
            prefix = f"{name} " if name else ""
            found[f"{prefix}lm loss"] = summary.instance_mean
            found[f"{prefix}lm loss (token mean)"] = summary.token_mean
        return found


def open_validation_sets(words: Sequence[str], trained_on: Corpus) -> dict[str, Corpus]:
    """Name -> corpus, of PREFIX and NAME=PREFIX; refuses a name twice and other tokenizers."""
    sets: dict[str, Corpus] = {}
    for word in words:
        name, equals, prefix = word.partition("=")
        if not equals or "/" in name:  # a path, maybe with an = in it
            name, prefix = "", word
        elif not (name and prefix):
            raise ConfigError(f"{_FLAG} {word}: give NAME=PREFIX, or PREFIX alone")
        if name in sets:
            who = f"the name {name}" if name else "no name"
            raise ConfigError(
                f"{_FLAG} has two sets of {who}, {sets[name].prefix} and {prefix}: give each a "
                "name of its own (NAME=PREFIX)"
            )
        sets[name] = Corpus.open(prefix)
        check_same_language(trained_on, "--train-data-path", sets[name], _FLAG)
    return sets
