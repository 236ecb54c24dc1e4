"""Losses on held-out data during training: ``--valid-data-path PREFIX NAME=PREFIX ...``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.blend import check_same_language
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.objectives.lm import summarize_rows
from megatron_miniplm.parallel.topology import Topology

_FLAG = "--valid-data-path"


def open_validation_sets(words: Sequence[str], trained_on: Corpus) -> dict[str, Corpus]:
    """Name -> corpus, of PREFIX (its name is "") and NAME=PREFIX.

    Refuses a name twice, and a tokenizer that is not that of `trained_on`.
    """
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


def held_out_losses(
    model: ModelChunks,
    sets: Mapping[str, Corpus],
    *,
    most: int | None,
    micro_batch_size: int,
    topology: Topology,
) -> dict[str, float]:
    """Metric -> nats per token, over the first `most` instances of each set (None: all).

    The metrics of a set with a name begin with it.
    """
    found = {}
    for name, corpus in sets.items():
        count = len(corpus) if most is None else min(len(corpus), most)
        summary = summarize_rows(
            model, corpus, np.arange(count), micro_batch_size=micro_batch_size, topology=topology
        )
        prefix = f"{name} " if name else ""
        found[f"{prefix}lm loss"] = summary.instance_mean
        found[f"{prefix}lm loss (token mean)"] = summary.token_mean
    return found
