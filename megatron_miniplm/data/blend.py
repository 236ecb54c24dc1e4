"""Training data of one or several corpora, mixed by weight: ``--train-data-path 0.3 A 0.7 B``.

A row of a blend is a row of its corpora laid end to end, so one number names an instance of any of
them; `Blend.locate` gives the corpus and its own row back (and with these the instance id).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.data.blend_order import MAX_BLOCK, BlendOrder
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import PADDING_ROW, Batch, training_mask

_ROWS_SAID = 8
_FLAG = "--train-data-path"
LossOn = Literal["all", "continuation"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus of a blend."""

    name: str
    """How metrics call it."""
    corpus: Corpus
    weight: Fraction
    """Its part of all samples."""


class Blend:
    """The opened corpora of a run and the order of their instances; make one with `Blend.open`.

    Its rows are those of its corpora laid end to end. Attributes: ``sources``, ``order``.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, loss_on: LossOn = "all") -> None:
        self.sources, self.loss_on = tuple(sources), loss_on
        sizes = [len(source.corpus) for source in sources]
        self._starts = np.cumsum([0, *sizes])
        self.order = BlendOrder(sizes, [source.weight for source in sources], seed=seed)

    @classmethod
    def open(cls, words: Sequence[str], *, seed: int, loss_on: LossOn = "all") -> Blend:
        """Open what ``--train-data-path`` names: PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ...

        Without weights, a corpus weighs as much as it has instances. Refuses corpora that cannot be
        trained on together, and weights too far apart; with `loss_on` continuations, corpora that
        have none.
        """
        weights, prefixes = _pairs(words)
        corpora = _open_all(prefixes)
        if loss_on == "continuation":
            _refuse_without_prompts(corpora)
        weights = weights or [Fraction(len(corpus)) for corpus in corpora]
        total = sum(weights)
        for prefix, weight in zip(prefixes, weights, strict=True):
            if weight * MAX_BLOCK < total:
                raise ConfigError(
                    f"{_FLAG}: one of {round(total / weight):,} samples would be of {prefix}, and "
                    f"one of {MAX_BLOCK:,} is the least: raise its weight, or leave it out"
                )
        sources = [
            Source(name=name, corpus=corpus, weight=weight / total)
            for name, corpus, weight in zip(_names(corpora), corpora, weights, strict=True)
        ]
        return cls(sources, seed=seed, loss_on=loss_on)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def language(self) -> Corpus:
        """The first corpus: any one says what tokenizer, vocabulary and length all have."""
        return self.sources[0].corpus

    @property
    def eod_id(self) -> int:
        """Id of the separator."""
        return self.language.eod_id

    @property
    def num_tokens(self) -> int:
        """Of all instances."""
        return sum(source.corpus.num_tokens for source in self.sources)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the source, row in its corpus) of each row of the blend, int64[n] each."""
        sources = np.searchsorted(self._starts, rows, side="right") - 1
        return sources, rows - self._starts[sources]

    def tokens(self, row: int) -> np.ndarray:
        """One instance, as `Corpus.tokens`."""
        (source,), (own_row,) = self.locate(np.array([row]))
        return self.sources[source].corpus.tokens(int(own_row))

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each row of the blend, int64[n]."""
        sources, own_rows = self.locate(rows)
        found = np.empty(len(rows), np.int64)
        for number in np.unique(sources):
            mine = sources == number
            found[mine] = self.sources[number].corpus.lengths[own_rows[mine]]
        return found

    def first_label(self, row: int) -> int:
        """See `instances.Instances.first_label`."""
        if self.loss_on == "all":
            return 1
        (source,), (own_row,) = self.locate(np.array([row]))
        return self.sources[source].corpus.prompt_length(int(own_row))

    def whole_mask(self, batch: Batch) -> torch.Tensor:
        """The mask of a batch of these rows, bool[b, s], where all of an instance is trained on.

        What is stored of a teacher is of these positions, whatever `loss_on` is.
        """
        if self.loss_on == "all":
            return batch.mask_bs
        rows_b = batch.rows_b.cpu().numpy()
        there = rows_b != PADDING_ROW
        num_inputs_b = np.zeros(len(rows_b), np.int64)
        num_inputs_b[there] = self.lengths(rows_b[there]) - 1
        inputs = torch.from_numpy(num_inputs_b).to(batch.tokens_bs.device)
        return training_mask(batch.tokens_bs, inputs, eod_id=self.eod_id)

    def say(self, rows: np.ndarray) -> str:
        """Rows of the blend in words, as `miniplm inspect PREFIX --rows` takes them."""
        sources, own_rows = self.locate(rows)
        parts = []
        for number in dict.fromkeys(sources.tolist()):
            mine = own_rows[sources == number].tolist()
            more = ", ..." if len(mine) > _ROWS_SAID else ""
            prefix = f" of {self.sources[number].corpus.prefix}" if len(self.sources) > 1 else ""
            parts.append(f"rows {', '.join(map(str, mine[:_ROWS_SAID]))}{more}{prefix}")
        return " and ".join(parts)

    def progress(self, samples: int) -> dict[str, float]:
        """Metric -> value: samples and epochs of each corpus after so many samples in all."""
        found: dict[str, float] = {}
        for source, count in zip(self.sources, self.order.consumed(samples).tolist(), strict=True):
            found[f"consumed samples ({source.name})"] = count
            found[f"epochs ({source.name})"] = count / len(source.corpus)
        return found

    @property
    def parents(self) -> Mapping[str, tuple[str, Path]]:
        """Role -> (fingerprint, prefix): what a checkpoint says that it was trained on.

        The role of a blend's corpus says its place and its weight, so that another blend has other
        roles.
        """
        count = len(self.sources)
        return {
            f"corpus {number} of {count}, weight {source.weight}" if count > 1 else "corpus": (
                source.corpus.fingerprint,
                source.corpus.prefix,
            )
            for number, source in enumerate(self.sources, 1)
        }


def check_same_language(ours: Corpus, ours_said: str, other: Corpus, other_said: str) -> None:
    """Refuse corpora of different tokenizers or separators; `..._said`: how the user named them."""
    for what, mine, theirs in (
        ("tokenizer", *(c.manifest.content["tokenizer"]["fingerprint"] for c in (ours, other))),
        ("separator id", ours.eod_id, other.eod_id),
    ):
        if mine != theirs:
            raise LineageError(
                f"{other_said} {other.prefix} has {what} {theirs}, {ours_said} {ours.prefix} has "
                f"{mine}: preprocess both with one tokenizer, or retokenize one of them"
            )


def _open_all(prefixes: Sequence[str]) -> list[Corpus]:
    """Corpora that can be trained on together."""
    corpora: list[Corpus] = []
    for prefix in prefixes:
        corpus = Corpus.open(prefix)
        if not len(corpus):
            raise DataError(f"{_FLAG} {prefix} holds no instance: leave it out")
        corpora.append(corpus)
        first = corpora[0]
        check_same_language(first, _FLAG, corpus, "and")
        if corpus.seq_length != first.seq_length:
            raise LineageError(
                f"{_FLAG} {first.prefix} has instances of {first.seq_length} inputs, and "
                f"{corpus.prefix} of {corpus.seq_length}: preprocess both with one --seq-length"
            )
        if any(corpus.fingerprint == other.fingerprint for other in corpora[:-1]):
            raise ConfigError(
                f"{_FLAG} names {prefix} twice: name it once, with the sum of weights"
            )
    return corpora


def _refuse_without_prompts(corpora: Sequence[Corpus]) -> None:
    for corpus in corpora:
        if not corpus.is_generated:
            raise ConfigError(
                f"--loss-on continuation, but {corpus.prefix} was not generated and has no "
                "prompts: leave the flag out, or train on a corpus that `generate` made"
            )


def _pairs(words: Sequence[str]) -> tuple[list[Fraction], list[str]]:
    """(weights or none, prefixes). A word that reads as a number is a weight (``./7`` is none)."""
    if len(words) == 1 or not any(map(_is_number, words)):
        return [], list(words)
    if len(words) % 2 or not all(map(_is_number, words[::2])) or any(map(_is_number, words[1::2])):
        raise ConfigError(
            f"{_FLAG} {' '.join(words)}: give WEIGHT PREFIX pairs, or prefixes without weights"
        )
    weights = [Fraction(word) if math.isfinite(float(word)) else 0 for word in words[::2]]
    for word, weight in zip(words[::2], weights, strict=True):
        if weight <= 0:
            raise ConfigError(f"{_FLAG}: weight {word} must be a number above 0")
    return [Fraction(weight) for weight in weights], list(words[1::2])


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _names(corpora: Sequence[Corpus]) -> list[str]:
    """Short names for metrics: the last part of the prefix, all of it where that is not enough."""
    short = [corpus.prefix.name for corpus in corpora]
    return short if len(set(short)) == len(short) else [str(corpus.prefix) for corpus in corpora]
