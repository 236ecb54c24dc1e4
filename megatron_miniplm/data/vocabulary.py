"""What the entries of a vocabulary stand for: the bytes of a token, the size that is real.

Byte-level BPE (GPT-2, Qwen, Llama 3) writes each byte as one printable character; SentencePiece and
its relatives write a space as ``▁`` and a lone byte as ``<0x0A>``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_miniplm.core.errors import ConfigError, DataError


@dataclass(frozen=True)
class Vocabulary:
    """What a ``tokenizer.json`` says about its tokens."""

    path: Path
    raw: bytes
    """The file's bytes."""
    ids: Mapping[str, int]
    """Token -> id, added tokens included."""
    added: Mapping[str, int]
    """Added tokens only; they are spelled as in the text."""
    special: frozenset[int]
    """Ids of added tokens that stand for no text, like separators and roles of a chat."""
    size: int
    """See `_real_size`."""
    decoder: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """Read the file; refuses one without a vocabulary."""
        raw = read_model_file(path)
        try:
            spec = orjson.loads(raw)
            model, added_tokens = spec["model"], spec.get("added_tokens") or []
            vocab = model["vocab"]
            if isinstance(vocab, list):  # Unigram: [token, score] in the order of ids
                vocab = {token: at for at, (token, _) in enumerate(vocab)}
            added = {token["content"]: token["id"] for token in added_tokens}
            special = frozenset(token["id"] for token in added_tokens if token.get("special"))
            size = _real_size(model, vocab, added)
            decoder = spec.get("decoder") or {}
            return cls(path, raw, {**vocab, **added}, added, special, size, decoder)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a usable tokenizer.json: {error!r}") from error

    def token_bytes(self) -> list[bytes]:
        """Bytes of every id; refuses tokenizers that are neither byte-level nor `▁`."""
        table = [b""] * self.size
        model = [token for token in self.ids if token not in self.added]
        spelled = byte_level_bytes(model) if self._is_byte_level() else map(metaspace_bytes, model)
        for token, raw in zip(model, spelled, strict=True):
            if self.ids[token] < self.size:
                table[self.ids[token]] = raw
        for token, at in self.added.items():
            if at < self.size:
                table[at] = token.encode()
        return table

    def _is_byte_level(self) -> bool:
        steps = self.decoder.get("decoders") or [self.decoder]
        kinds = {step.get("type") for step in steps}
        if "ByteLevel" in kinds:
            return True
        spaces = any((step.get("pattern") or {}).get("String") == "▁" for step in steps)
        if "Metaspace" in kinds or spaces:
            return False
        raise ConfigError(
            f"{self.path} has a decoder of type {sorted(map(str, kinds))}; ByteLevel or Metaspace "
            "is needed to know the bytes of each token"
        )


def read_model_file(path: Path) -> bytes:
    """Bytes of a tokenizer's file; refuses a path without one."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"no tokenizer at {path}: {error.strerror}; --tokenizer-model takes a folder with "
            "tokenizer.json, that file, or a SentencePiece model (--tokenizer-type)"
        ) from error


def byte_level_bytes(tokens: Sequence[str]) -> list[bytes]:
    """Bytes of byte-level tokens; one outside the byte alphabet stands for itself in UTF-8."""
    characters = np.frombuffer("".join(tokens).encode("utf-32-le", "surrogatepass"), np.uint32)
    values = _BYTE_OF[np.minimum(characters, len(_BYTE_OF) - 1)]
    flat = values.astype(np.uint8).tobytes()
    ends = np.cumsum([0, *map(len, tokens)])
    found = [flat[start:end] for start, end in pairwise(ends.tolist())]
    for place in np.flatnonzero(values < 0).tolist():
        at = int(np.searchsorted(ends, place, side="right")) - 1
        found[at] = tokens[at].encode()
    return found


def metaspace_bytes(token: str) -> bytes:
    """Bytes of a SentencePiece-like token: ``▁`` is a space, ``<0x0A>`` is that byte."""
    if _is_byte_piece(token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _is_byte_piece(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + rank): byte for rank, byte in enumerate(others)
    }


def _byte_table() -> np.ndarray:
    """int16[last character + 2]: the byte of each character, -1 where there is none."""
    alphabet = {ord(char): byte for char, byte in _byte_alphabet().items()}
    table = np.full(max(alphabet) + 2, -1, np.int16)
    table[list(alphabet)] = list(alphabet.values())
    return table


_BYTE_OF = _byte_table()


def _real_size(model: Mapping[str, Any], vocab: Mapping[str, int], added: Mapping[str, int]) -> int:
    """One more than the highest id that a text can produce.

    Some files carry the padding rows of an embedding matrix as vocabulary (``[PAD151935]``). A BPE
    model produces single characters, byte pieces and results of merges only, which tells such rows
    at the end from tokens.
    """
    size = max([*vocab.values(), *added.values()]) + 1
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type", "BPE") != "BPE" or model.get("ignore_merges") or affixes:
        return size
    special = {*added.values(), vocab.get(model.get("unk_token") or "", -1)}
    if size - 1 in special:  # nearly always
        return size
    merges = (item.split(" ") if isinstance(item, str) else item for item in model["merges"])
    produced = {"".join(pair) for pair in merges}
    names = {at: token for token, at in vocab.items()}

    def producible(at: int) -> bool:
        token = names.get(at, "")
        return at in special or token in produced or len(token) == 1 or _is_byte_piece(token)

    while size > 0 and not producible(size - 1):
        size -= 1
    return size
