"""Training data of one or several corpora, mixed by weight: ``--train-data-path 0.3 A 0.7 B``.

A row of a blend is a row of its corpora laid end to end, so one number names an instance of any of
them; `Blend.locate` gives the corpus and its own row back (and with these the instance id).

The order is a function of the number of samples alone. It goes in blocks of B samples. At the end
of a block, after n samples in all, corpus k of weight w_k has given

    c_k(n) = floor((w_1 + ... + w_k) n) - floor((w_1 + ... + w_k-1) n)

samples, in exact arithmetic: less than one from w_k n. (B w_k >= 1 keeps it from falling.) A keyed
permutation mixes the corpora inside a block, and each corpus has its own `SampleOrder`, with its
own epochs. With one corpus, that is its `SampleOrder` and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import Permutation, SampleOrder

_BLOCK = 1 << 10
_MAX_BLOCK = 1 << 24
_ROWS_SAID = 8
_FLAG = "--train-data-path"


class BlendOrder:
    """The endless stream of a blend's rows, read anywhere; see the module."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[Fraction], *, seed: int) -> None:
        """`sizes`: instances of each corpus; `weights`: above 0, of any sum."""
        share = sum(weights)
        self.seed = seed
        self.sizes = np.array(sizes, dtype=np.int64)
        self._denominator = math.lcm(*((w / share).denominator for w in weights))
        whole = [int(w / share * self._denominator) for w in weights]
        self._edges = [sum(whole[:k]) for k in range(len(whole) + 1)]
        self._starts = np.cumsum([0, *sizes])
        self._orders = [SampleOrder(n, seed=seed, stream=k) for k, n in enumerate(sizes)]
        self.block = max(_BLOCK, 1 << (-(-self._denominator // min(whole)) - 1).bit_length())

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows (int64[count]) of samples ``first .. first + count`` of the stream."""
        parts = []
        while count:
            block, start = divmod(first, self.block)
            taken = min(count, self.block - start)
            parts.append(self._rows_of_block(block, start, taken))
            first, count = first + taken, count - taken
        return np.concatenate(parts)

    def consumed(self, samples: int) -> np.ndarray:
        """int64[K]: samples of each corpus among the first `samples` of the stream."""
        block, inside = divmod(samples, self.block)
        sources = self._places(block, 0, inside)[0]
        return self._quota(block) + np.bincount(sources, minlength=len(self.sizes))

    def _rows_of_block(self, block: int, start: int, count: int) -> np.ndarray:
        sources, samples = self._places(block, start, count)
        out = np.empty(count, np.int64)
        for source, order in enumerate(self._orders):
            here = sources == source
            out[here] = self._starts[source] + order.at(samples[here])
        return out

    def _places(self, block: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, which sample of its own order) of `count` samples of a block."""
        slots = np.arange(start, start + count)
        if len(self.sizes) > 1:
            slots = Permutation(
                self.block, seed=self.seed, epoch=block, stream=len(self.sizes)
            )(slots)  # fmt: skip
        before = self._quota(block)
        here = np.cumsum(self._quota(block + 1) - before)  # ends of the corpora among the slots
        sources = np.searchsorted(here, slots, side="right")
        return sources, slots + (before - np.concatenate([[0], here[:-1]]))[sources]

    def _quota(self, block: int) -> np.ndarray:
        """int64[K]: samples of each corpus before a block."""
        floors = [edge * block * self.block // self._denominator for edge in self._edges]
        return np.diff(np.array(floors, dtype=np.int64))


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

    def __init__(self, sources: Sequence[Source], *, seed: int) -> None:
        self.sources = tuple(sources)
        sizes = [len(source.corpus) for source in sources]
        self._starts = np.cumsum([0, *sizes])
        self.order = BlendOrder(sizes, [source.weight for source in sources], seed=seed)

    @classmethod
    def open(cls, words: Sequence[str], *, seed: int) -> Blend:
        """Open what ``--train-data-path`` names: PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ...

        Without weights, a corpus weighs as much as it has instances. Refuses corpora that cannot be
        trained on together, and weights too far apart.
        """
        weights, prefixes = _pairs(words)
        corpora = _open_all(prefixes)
        weights = weights or [Fraction(len(corpus)) for corpus in corpora]
        total = sum(weights)
        for prefix, weight in zip(prefixes, weights, strict=True):
            if weight * _MAX_BLOCK < total:
                raise ConfigError(
                    f"{_FLAG}: one of {round(total / weight):,} samples would be of {prefix}, and "
                    f"one of {_MAX_BLOCK:,} is the least: raise its weight, or leave it out"
                )
        sources = [
            Source(name=name, corpus=corpus, weight=weight / total)
            for name, corpus, weight in zip(_names(corpora), corpora, weights, strict=True)
        ]
        return cls(sources, seed=seed)

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
