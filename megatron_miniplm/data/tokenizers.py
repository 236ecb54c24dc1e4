"""Text to token ids, in bulk: Hugging Face ``tokenizer.json`` files and SentencePiece models.

`Tokenizer.encode_flat` turns many documents into two arrays (ids, offsets); it adds neither BOS nor
separator: corpora hold no BOS at all, for any family, and the separator is appended by whoever
knows where documents end. Two back ends give the same ids: ``fast`` (the package `fastokens`, about
fifty times faster) and ``hf`` (the package `tokenizers`, the reference). ``fast`` is checked
against ``hf`` on a small sample before its first use, and leaves to ``hf`` the documents it
refuses, which are those with bytes that the vocabulary lacks; ``hf`` drops such bytes in silence.
A special token spelled out in a text becomes that token, as in the released MiniPLM code.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
import tokenizers

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import hash_parts, read_json, write_json
from megatron_miniplm.data.vocabulary import Vocabulary, metaspace_bytes, read_model_file

try:
    import fastokens
except ImportError:  # no wheel for this platform
    fastokens = None

TokenizerType = Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"]
Backend = Literal["fast", "hf"]

META_NAME = "tokenizer_meta.json"
DEFAULT_EOD = "<|endoftext|>"
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")
_SAMPLE = (
    "The D.A. paid $3.14 (tax incl.) -- isn't that\n\n\tcheap?! ",
    "def f(x):\r\n    return {'a': [x**2 for x in range(10)]}  # naïve café, 你好, 🙂\n",
    "   leading, trailing and     inner spaces   \n \n",
    "",
)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer to use."""

    tokenizer_model: Path
    """Folder with tokenizer.json, that file itself, or a SentencePiece .model file."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """Kind of the tokenizer model."""
    tokenizer_backend: Backend = "fast"
    """fast: the fastokens package, checked against and backed by tokenizers; hf: tokenizers."""
    eod_token: str | None = None
    """Document separator; default: <|endoftext|> if known, else the tokenizer's EOS."""

    def load(self, *, workers: int | None = None) -> Tokenizer:
        """Load it; `workers` threads encode (default: all cores)."""
        return load_tokenizer(
            self.tokenizer_model,
            kind=self.tokenizer_type,
            eod_token=self.eod_token,
            backend=self.tokenizer_backend,
            workers=workers,
        )


class Tokenizer(ABC):
    """A vocabulary with a document separator; made by `load_tokenizer` or `load_saved`."""

    kind: TokenizerType
    name: str
    source: Path
    vocab_size: int
    """Ids that text can produce, added tokens included; trailing padding rows are not counted."""
    eod_id: int
    eod_token: str
    fingerprint: str
    """Hash of the model file's bytes and the separator."""

    def load_ahead(self) -> None:  # noqa: B027  most have nothing to load
        """Begin to load what encoding takes, in another thread: the first batch will need it."""

    @abstractmethod
    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts (int32[total]) and where each starts (int64[len(texts) + 1])."""

    @abstractmethod
    def opening_ids(self) -> list[int]:
        """What the tokenizer puts before every text when left to itself: a BOS, or nothing."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids, special tokens included; bytes that are no UTF-8 become U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for in the text, one entry per id below `vocab_size`."""

    @abstractmethod
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text: separators, control tokens, the unknown token."""

    @abstractmethod
    def _files(self) -> Mapping[str, Path]:
        """Name in a saved folder -> file, of all that must be kept."""

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files into `folder`, for `load_saved`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in self._files().items():
            shutil.copyfile(path, folder / name)
        meta = {"kind": self.kind, "eod_token": self.eod_token, "fingerprint": self.fingerprint}
        write_json(folder / META_NAME, meta)

    def _set_eod(self, eod_token: str | None, defaults: Sequence[str | None]) -> None:
        """Choose the separator: the given one, or the first default that the vocabulary has."""
        if eod_token is not None and self._token_id(eod_token) is None:
            raise ConfigError(
                f"--eod-token {eod_token!r} is not in the vocabulary of {self.source} "
                f"({self.vocab_size} tokens); give a token that it has"
            )
        for token in [eod_token, *defaults]:
            found = None if token is None else self._token_id(token)
            if token is not None and found is not None:
                self.eod_token, self.eod_id = token, found
                return
        raise ConfigError(
            f"{self.source} has neither {DEFAULT_EOD!r} nor a known EOS token to end documents "
            "with; name a token of its vocabulary with --eod-token"
        )

    @abstractmethod
    def _token_id(self, token: str) -> int | None:
        """Id of a token by its name, None if the vocabulary lacks it."""


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``; truncation and padding set in the file are switched off."""

    kind: TokenizerType = "HuggingFaceTokenizer"

    def __init__(self, model: Path, *, eod_token: str | None, backend: Backend) -> None:
        self.source = model
        self._path = model / "tokenizer.json" if model.is_dir() else model
        self.name = self._path.absolute().parent.name
        self._vocabulary = Vocabulary.read(self._path)
        self.vocab_size = self._vocabulary.size
        self._set_eod(eod_token, [DEFAULT_EOD, self._eos_of_config()])
        self.fingerprint = hash_parts(self._vocabulary.raw, self.eod_token)
        self.fallback_documents = 0
        """Documents so far that the fast back end refused and `tokenizers` encoded."""
        self._backend = backend
        self._loading: Future[Any] | None = None

    def load_ahead(self) -> None:
        """See `Tokenizer.load_ahead`; the fast back end takes seconds and does not hold the GIL."""
        if self._backend == "fast" and fastokens is not None and self._loading is None:
            pool = ThreadPoolExecutor(1)
            self._loading = pool.submit(self._load_fast)
            pool.shutdown(wait=False)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer.encode_flat`."""
        pieces = self._encode_pieces(texts) if texts else []
        if len(pieces) == 1:  # nearly always; the ids are not copied
            return pieces[0][0], np.concatenate([np.zeros(1, np.int64), np.cumsum(pieces[0][1])])
        lengths = np.concatenate([np.zeros(1, np.int64), *(lengths for _, lengths in pieces)])
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in pieces)])
        return ids, np.cumsum(lengths)

    def opening_ids(self) -> list[int]:
        """See `Tokenizer.opening_ids`; by its post-processor."""
        with_them = self._slow.encode("a", add_special_tokens=True).ids
        without = self._slow.encode("a", add_special_tokens=False).ids
        return list(with_them[: with_them.index(without[0])])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer.decode`."""
        return str(self._slow.decode(np.asarray(ids).tolist(), skip_special_tokens=False))

    def token_bytes(self) -> list[bytes]:
        """See `Tokenizer.token_bytes`; refuses tokenizers that are neither byte-level nor `▁`."""
        return self._vocabulary.token_bytes()

    def special_ids(self) -> frozenset[int]:
        """See `Tokenizer.special_ids`."""
        return self._vocabulary.special | {self.eod_id}

    @property
    def uses_fast(self) -> bool:
        """Whether the fast back end encodes: wanted, installed, and trusted with this file."""
        return self._fast is not None

    def _encode_pieces(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, lengths) of consecutive runs of texts; halves a run that the fast one refuses."""
        if self._fast is None:
            return [self._encode_slow(texts)]
        try:
            flat, ends = self._fast.encode_batch_flat(texts)
        except UnicodeEncodeError as error:
            raise DataError(f"a text is not valid Unicode: {error}") from error
        except ValueError:
            if len(texts) == 1:
                self.fallback_documents += 1
                return [self._encode_slow(texts)]
            half = len(texts) // 2
            return self._encode_pieces(texts[:half]) + self._encode_pieces(texts[half:])
        lengths = np.diff(np.frombuffer(ends, np.uint64).astype(np.int64))
        return [(np.frombuffer(flat, np.int32), lengths)]

    def _encode_slow(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        lists = [item.ids for item in self._slow.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.array([len(ids) for ids in lists], np.int64)
        return np.array([at for ids in lists for at in ids], np.int32), lengths

    @cached_property
    def _slow(self) -> Any:
        try:
            engine = tokenizers.Tokenizer.from_file(str(self._path))
        except Exception as error:  # nothing narrower is raised
            raise DataError(f"{self._path} is not a usable tokenizer.json: {error}") from error
        engine.no_truncation()
        engine.no_padding()
        return engine

    @cached_property
    def _fast(self) -> Any | None:
        """The fast engine, or None where it is unwanted, absent, or not to be trusted."""
        if self._backend == "hf":
            return None
        if fastokens is None:
            get_logger().info("fastokens is not installed: encoding with the slower tokenizers")
            return None
        self.load_ahead()
        assert self._loading is not None
        _ = self._slow  # loads meanwhile
        try:
            engine = self._loading.result()
            agree = all(self._agrees(engine, text) for text in _SAMPLE)
        except ValueError as error:
            get_logger().warning("fastokens cannot use %s (%s): using hf", self._path, error)
            return None
        if not agree:
            get_logger().warning("fastokens differs from tokenizers on %s: using hf", self._path)
        return engine if agree else None

    def _load_fast(self) -> Any:
        engine = fastokens.Tokenizer.from_file(str(self._path))
        engine.no_truncation()
        engine.no_padding()
        return engine

    def _agrees(self, engine: Any, text: str) -> bool:
        """Whether both back ends give the same ids; a refusal is no disagreement."""
        try:
            flat, _ = engine.encode_batch_flat([text])
        except ValueError:
            return True
        return np.frombuffer(flat, np.int32).tolist() == self._encode_slow([text])[0].tolist()

    def _eos_of_config(self) -> str | None:
        path = self._path.with_name("tokenizer_config.json")
        eos = read_json(path).get("eos_token") if path.is_file() else None
        return eos.get("content") if isinstance(eos, dict) else eos

    def _token_id(self, token: str) -> int | None:
        return self._vocabulary.ids.get(token)

    def _files(self) -> Mapping[str, Path]:
        companions = {name: self._path.with_name(name) for name in _COMPANIONS}
        kept = {name: path for name, path in companions.items() if path.is_file()}
        return {"tokenizer.json": self._path, **kept}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file."""

    kind: TokenizerType = "SentencePieceTokenizer"

    def __init__(self, model: Path, *, eod_token: str | None, workers: int | None) -> None:
        self.source = self._path = model / "tokenizer.model" if model.is_dir() else model
        self.name = model.stem
        raw = read_model_file(self._path)
        try:
            self._engine = sentencepiece.SentencePieceProcessor(model_proto=raw)
        except RuntimeError as error:
            raise DataError(f"{self._path} is not a SentencePiece model: {error}") from error
        self.vocab_size = self._engine.get_piece_size()
        eos = self._engine.eos_id()
        self._set_eod(eod_token, [DEFAULT_EOD, self._engine.id_to_piece(eos) if eos >= 0 else None])
        self.fingerprint = hash_parts(raw, self.eod_token)
        self._threads = workers or -1

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer.encode_flat`."""
        lists = self._engine.encode(list(texts), out_type=int, num_threads=self._threads)
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return np.array([at for ids in lists for at in ids], np.int32), offsets

    def opening_ids(self) -> list[int]:
        """See `Tokenizer.opening_ids`; by convention the BOS, if the model has one."""
        return [self._engine.bos_id()] if self._engine.bos_id() >= 0 else []

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer.decode`; control pieces such as the EOS have no text."""
        return str(self._engine.decode(np.asarray(ids).tolist()))

    def token_bytes(self) -> list[bytes]:
        """See `Tokenizer.token_bytes`; unknown and control pieces stand for their own names."""
        return [metaspace_bytes(self._engine.id_to_piece(at)) for at in range(self.vocab_size)]

    def special_ids(self) -> frozenset[int]:
        """See `Tokenizer.special_ids`."""
        kinds = (self._engine.is_control, self._engine.is_unknown, self._engine.is_unused)
        found = {at for at in range(self.vocab_size) if any(kind(at) for kind in kinds)}
        return frozenset(found | {self.eod_id})

    def _token_id(self, token: str) -> int | None:
        at = self._engine.piece_to_id(token)
        return at if self._engine.id_to_piece(at) == token else None

    def _files(self) -> Mapping[str, Path]:
        return {"tokenizer.model": self._path}


def load_tokenizer(
    model: Path,
    *,
    kind: TokenizerType = "HuggingFaceTokenizer",
    eod_token: str | None = None,
    backend: Backend = "fast",
    workers: int | None = None,
) -> Tokenizer:
    """Load a tokenizer from its folder or file; refuses one without a document separator.

    `workers` threads encode (default: all cores). The pools of the Hugging Face back ends are
    sized once a process, at their first use.
    """
    model = Path(model)
    if kind == "SentencePieceTokenizer":
        return SentencePieceTokenizer(model, eod_token=eod_token, workers=workers)
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = os.environ["FASTOKENS_BPE_THREADS"] = str(workers)
    return HuggingFaceTokenizer(model, eod_token=eod_token, backend=backend)


def load_saved(folder: Path) -> Tokenizer:
    """Load what `Tokenizer.save` wrote; refuses files that changed since."""
    meta = read_json(Path(folder) / META_NAME)
    loaded = load_tokenizer(Path(folder), kind=meta["kind"], eod_token=meta["eod_token"])
    if loaded.fingerprint != meta["fingerprint"]:
        raise DataError(
            f"the tokenizer in {folder} has fingerprint {loaded.fingerprint}, but was saved as "
            f"{meta['fingerprint']}: its files changed; restore them"
        )
    return loaded
