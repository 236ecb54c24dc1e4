"""How diverse corpora are: the Vendi score of their instances, and of their wording.

Of n unit vectors e_i (``E``, [n, d]) with K = E E^T and the eigenvalues l of K / n::

    Vendi score = exp(-sum_{l > 0} l ln l)     from 1, all the same, to min(n, d), all orthogonal

(Friedman & Dieng, 2023; the MiniPLM paper, Table 4). E^T E / n has the same non-zero spectrum, so
the smaller of the two is decomposed, in fp64. The score grows with n, and ever less as it comes
near d, above which no n can lift it: corpora are compared at one n, over several draws. That a
subset keeps other domains than another can alone move it, so there is a second score over draws
with one mix of domains.

Wording: the share of distinct n-grams among all, of as many words from each draw; and how many
times smaller zstd makes as many bytes of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import zstandard
from scipy.special import entr

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.evaluation.embedders import WORD, EmbedderConfig, Vectors

_LONGEST_GRAM = 4
_ZSTD_LEVEL = 9
_WINDOW_LOG = 27
"""128 MiB, so that repeats far apart count."""
_LARGEST = 10_000
"""Rows of a matrix that is decomposed: 0.8 GB in fp64, held three times over, and minutes."""


@dataclass(frozen=True, kw_only=True)
class DiversityConfig:
    """How diverse corpora are, beside each other."""

    diversity: tuple[str, ...] = ()
    """Instead of --load: prefixes of corpora or subsets; NAME=PREFIX names one in the results."""
    diversity_instances: int = 2000
    """Instances of a draw, the same of all; fewer if the smallest has fewer. Time grows with the
    cube of it, up to the width of the embedder."""
    diversity_seeds: int = 5
    """Draws of each."""
    embedding: EmbedderConfig = field(default_factory=EmbedderConfig)

    def __post_init__(self) -> None:
        for name in ("diversity_instances", "diversity_seeds"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1"
                )


def vendi_score(embeddings: Vectors) -> float:
    """Of [n, d] vectors of any length but zero: from 1 to min(n, d)."""
    vectors = embeddings.astype(np.float64)
    count, width = vectors.shape
    norms = np.sqrt((vectors * vectors).sum(axis=1))
    if not (count and np.isfinite(norms).all() and norms.all()):
        raise DataError(
            f"{int((~np.isfinite(norms) | (norms == 0)).sum())} of {count} embeddings "
            "are zero or not finite: they have no direction to compare"
        )
    unit = scipy.sparse.diags_array(1 / norms) @ vectors
    return score_of_spectrum(primal(unit) if count <= width else dual(unit))


def ceiling(count: int, width: int) -> int:
    """The most that the score of so many vectors can be; refuses what would not end."""
    if (most := min(count, width)) > _LARGEST:
        raise ConfigError(
            f"the Vendi score of {count:,} vectors of {width:,} numbers takes the eigenvalues of a "
            f"matrix of {most:,} rows, more than {_LARGEST:,}: lower --diversity-instances"
        )
    return most


def primal(unit: Vectors) -> np.ndarray:
    """[n, n] similarities over n."""
    return _dense(unit @ unit.T) / unit.shape[0]


def dual(unit: Vectors) -> np.ndarray:
    """[d, d], of the same non-zero eigenvalues."""
    return _dense(unit.T @ unit) / unit.shape[0]


def _dense(matrix: Vectors) -> np.ndarray:
    return matrix if isinstance(matrix, np.ndarray) else np.asarray(matrix.toarray())


def score_of_spectrum(matrix: np.ndarray) -> float:
    """Exponential of the entropy of a symmetric matrix's eigenvalues; rounding below 0 is 0."""
    return float(np.exp(entr(np.linalg.eigvalsh(matrix).clip(min=0)).sum()))


def word_numbers(texts: Sequence[str]) -> list[np.ndarray]:
    """int32 of each text's words in lower case, the same number for the same word."""
    numbers: dict[str, int] = {}
    return [
        np.array(
            [numbers.setdefault(word, len(numbers)) for word in WORD.findall(text.lower())],
            dtype=np.int32,
        )
        for text in texts
    ]


def distinct_grams(texts: Sequence[np.ndarray], num_words: int) -> dict[str, float]:
    """distinct-1 to 4 of the first `num_words` words (int) of texts; no n-gram leaves its text."""
    words = np.concatenate(texts)[:num_words].astype(np.int64)
    text_of = np.repeat(np.arange(len(texts)), [len(text) for text in texts])[: len(words)]
    base = int(words.max(initial=0)) + 1
    found, grams = {}, words
    for size in range(1, _LONGEST_GRAM + 1):
        inside = text_of[size - 1 :] == text_of[: len(text_of) - size + 1]
        found[f"distinct_{size}"] = len(np.unique(grams[inside])) / max(int(inside.sum()), 1)
        _, number = np.unique(grams[:-1], return_inverse=True)
        grams = number * base + words[size:]  # both are below 2^31
    return found


def compression_ratio(data: bytes) -> float:
    """Bytes over compressed bytes: higher repeats itself more."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _ZSTD_LEVEL,
        source_size=len(data),
        window_log=min(max(len(data).bit_length(), zstandard.WINDOWLOG_MIN), _WINDOW_LOG),
        enable_ldm=True,
    )
    return len(data) / len(zstandard.ZstdCompressor(compression_params=parameters).compress(data))


def judge_diversity(config: DiversityConfig, prefixes: Mapping[str, str]) -> dict[str, Any]:
    """JSON-ready: what was compared how, and of each corpus every measure's mean and deviation."""
    if not prefixes:
        raise ConfigError("the flags beside --diversity need it: give prefixes of corpora")
    corpora = {name: Corpus.open(prefix) for name, prefix in prefixes.items()}
    embedder = config.embedding.make()
    size = min(config.diversity_instances, *map(len, corpora.values()))
    mix = _common_mix(list(corpora.values()), size)
    seeds = range(config.diversity_seeds)
    plain = {name: [_drawn(c, size, s) for s in seeds] for name, c in corpora.items()}
    mixed = {name: [_drawn_by_domain(c, mix, s) for s in seeds] for name, c in corpora.items()}
    texts = _Texts(corpora, {name: np.concatenate(plain[name] + mixed[name]) for name in corpora})
    get_logger().info("embedding %d texts", len(texts.distinct))
    vectors = embedder.embed(texts.distinct)
    width = vectors.shape[1]
    ceilings = {
        "vendi": ceiling(size, width),
        "vendi_same_domains": min(sum(mix.values()), width),
    }
    wording = _wording(
        texts.distinct, {name: [texts.at(name, rows) for rows in plain[name]] for name in corpora}
    )
    results = {}
    for name, corpus in corpora.items():
        measures = {
            "vendi": [vendi_score(vectors[texts.at(name, rows)]) for rows in plain[name]],
            "vendi_same_domains": [vendi_score(vectors[texts.at(name, r)]) for r in mixed[name]],
            **wording[name],
        }
        results[name] = {
            **{measure: _spread(values) for measure, values in measures.items()},
            "num_instances": len(corpus),
            "corpus": corpus.fingerprint,
        }
    return {
        "embedder": {"name": config.embedding.embedder, **embedder.facts},
        "comparable": embedder.comparable,
        "dimensions": width,
        "ceilings": ceilings,
        "instances": size,
        "instances_same_domains": sum(mix.values()),
        "same_domains": mix,
        "seeds": config.diversity_seeds,
        "corpora": results,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation over draws."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "sd": deviation}


def _drawn(corpus: Corpus, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(len(corpus), size, replace=False)


def _domain_rows(corpus: Corpus) -> dict[str, np.ndarray]:
    return {
        name: rows
        for number, name in enumerate(corpus.domain_names)
        if len(rows := np.flatnonzero(corpus.domains == number))
    }


def _common_mix(corpora: Sequence[Corpus], size: int) -> dict[str, int]:
    """Instances of each domain that every corpus can give: shares of the least that one has."""
    counts = [{name: len(rows) for name, rows in _domain_rows(c).items()} for c in corpora]
    least = {name: min(c.get(name, 0) for c in counts) for name in counts[0]}
    total = sum(least.values())
    if not total:
        raise ConfigError(
            "the corpora of --diversity have no domain in common: compare such as have one"
        )
    share = min(1.0, size / total)
    return {name: max(round(n * share), 1) for name, n in least.items() if n}


def _drawn_by_domain(corpus: Corpus, mix: Mapping[str, int], seed: int) -> np.ndarray:
    generator, rows = np.random.default_rng(seed), _domain_rows(corpus)
    return np.concatenate(
        [generator.choice(rows[name], n, replace=False) for name, n in mix.items()]
    )


class _Texts:
    """Texts of drawn rows, each once: subsets of one root share theirs."""

    def __init__(self, corpora: Mapping[str, Corpus], drawn: Mapping[str, np.ndarray]) -> None:
        self.distinct: list[str] = []
        self._at: dict[tuple[str, int], int] = {}
        self._corpora = corpora
        for name, corpus in corpora.items():
            tokenizer = corpus.tokenizer()
            special = np.array(sorted(tokenizer.special_ids()))
            for row in np.unique(drawn[name]):
                if (key := self._key(name, row)) not in self._at:
                    tokens = corpus.tokens(int(row))
                    self._at[key] = len(self.distinct)
                    self.distinct.append(tokenizer.decode(tokens[~np.isin(tokens, special)]))

    def at(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Places of a corpus's rows in `distinct`."""
        return np.array([self._at[self._key(name, row)] for row in rows])

    def _key(self, name: str, row: int) -> tuple[str, int]:
        corpus = self._corpora[name]
        return corpus.root_fingerprint, int(corpus.ids[row])


def _wording(
    texts: Sequence[str], draws: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, dict[str, list[float]]]:
    """Name -> measure -> value of each draw (places in `texts`), of as much as all draws have."""
    words, raw = word_numbers(texts), [text.encode() for text in texts]
    every = [places for each in draws.values() for places in each]
    num_words = min(sum(len(words[at]) for at in places) for places in every)
    num_bytes = min(sum(len(raw[at]) for at in places) for places in every)
    found: dict[str, dict[str, list[float]]] = {}
    for name, each in draws.items():
        grams = [distinct_grams([words[at] for at in places], num_words) for places in each]
        found[name] = {measure: [one[measure] for one in grams] for measure in grams[0]}
        found[name]["zstd_ratio"] = [
            compression_ratio(b"".join(raw[at] for at in places)[:num_bytes]) for places in each
        ]
    return found
