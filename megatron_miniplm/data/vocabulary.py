"""What the entries of a vocabulary stand for: the bytes of a token, the size that is real.

Byte-level BPE (GPT-2, Qwen, Llama 3) writes each byte as one printable character; SentencePiece and
its relatives write a space as ``▁`` and a lone byte as ``<0x0A>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def real_vocab_size(model: Mapping[str, Any], added: Mapping[str, int]) -> int:
    """One more than the highest id that a text can produce.

    Some files carry the padding rows of an embedding matrix as vocabulary (``[PAD151935]``). A BPE
    model produces single characters, byte pieces and results of merges only, so such rows at the
    end are told from tokens. `model` is that part of tokenizer.json, `added` token -> id.
    """
    vocab = model["vocab"]
    size = max([*vocab.values(), *added.values()], default=-1) + 1
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type", "BPE") != "BPE" or model.get("ignore_merges") or affixes:
        return size
    merges = (item.split(" ") if isinstance(item, str) else item for item in model["merges"])
    produced = {"".join(pair) for pair in merges}
    special = {*added.values(), vocab.get(model.get("unk_token"), -1)}
    names = {at: token for token, at in vocab.items()}

    def producible(at: int) -> bool:
        token = names.get(at, "")
        return at in special or token in produced or len(token) == 1 or _is_byte_piece(token)

    while size > 0 and not producible(size - 1):
        size -= 1
    return size


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; one outside the byte alphabet stands for itself in UTF-8."""
    try:
        return bytes(_ALPHABET[char] for char in token)
    except KeyError:
        return token.encode()


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


_ALPHABET = _byte_alphabet()
