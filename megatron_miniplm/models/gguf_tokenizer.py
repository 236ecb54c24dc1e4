"""The tokenizer inside a GGUF file: as a tokenizer.json, where that can be done faithfully.

GGUF has tokens, merges and the *name* of the rule that splits text beforehand. Byte-level BPE
(``tokenizer.ggml.model`` is ``gpt2``) with a rule known here is written out; for anything else
(SentencePiece scores, other rules) the user gives the original with ``--tokenizer-model``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.manifest import write_json
from megatron_miniplm.data.vocabulary import byte_level_bytes, metaspace_bytes

Metadata = Callable[[str], Any]
"""Name of a metadata field -> its contents, None without one."""

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Of ``tokenizer.ggml.token_type``: special tokens, added words, padding of the embedding."""


def _byte_level(*, split: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split,
    }  # fmt: skip


def _by_pattern(pattern: str) -> dict[str, Any]:
    split = {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(split=False)]}


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"type": "Digits", "individual_digits": True}
_RULES: Mapping[str, Mapping[str, Any]] = {
    "gpt-2": {"pre_tokenizer": _byte_level(split=True)},
    "smollm": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_DIGITS, _byte_level(split=True)]}
    },
    "qwen2": {"normalizer": {"type": "NFC"}, "pre_tokenizer": _by_pattern(_WORDS % r"\p{N}")},
    "llama-bpe": {"pre_tokenizer": _by_pattern(_WORDS % r"\p{N}{1,3}"), "ignore_merges": True},
}
"""``tokenizer.ggml.pre`` -> what the tokenizer.json of those models says."""


def write_tokenizer(metadata: Metadata, folder: Path, source: Path) -> None:
    """Write tokenizer.json and its settings; refuses what cannot be written faithfully."""
    kind, rule = metadata("tokenizer.ggml.model"), metadata("tokenizer.ggml.pre")
    if kind != "gpt2" or rule not in _RULES:
        raise ConfigError(
            f"the tokenizer in {source} is of kind {kind!r} with rule {rule!r}; only 'gpt2' with "
            f"{', '.join(_RULES)} can be written out: pass the model's own with --tokenizer-model"
        )
    tokens, kinds = _vocabulary(metadata)
    settings = _RULES[rule]
    added = [
        {
            "id": at, "content": tokens[at], "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": kinds[at] == CONTROL,
        }
        for at in range(len(tokens)) if kinds[at] in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": settings.get("normalizer"),
            "pre_tokenizer": settings["pre_tokenizer"],
            "post_processor": None,
            "decoder": {
                "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                "use_regex": True,
            },
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None,
                "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                "byte_fallback": False, "ignore_merges": settings.get("ignore_merges", False),
                "vocab": {token: at for at, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in metadata("tokenizer.ggml.merges")],
            },
        },
    )  # fmt: skip
    _write_settings(metadata, tokens, folder)


def token_bytes(metadata: Metadata) -> list[bytes]:
    """The bytes that each id stands for in text (like `Tokenizer.token_bytes`), padding left out.

    Empty where the file has no tokenizer.
    """
    tokens, kinds = _vocabulary(metadata)
    if metadata("tokenizer.ggml.model") == "gpt2":
        spelled = byte_level_bytes(tokens)
    else:
        spelled = [metaspace_bytes(token) for token in tokens]
    added = (CONTROL, USER_DEFINED)
    return [
        token.encode() if kind in added else raw
        for token, kind, raw in zip(tokens, kinds, spelled, strict=True)
    ]


def _vocabulary(metadata: Metadata) -> tuple[list[str], list[int]]:
    """(tokens, kinds) without the padding at the end."""
    tokens = metadata("tokenizer.ggml.tokens") or []
    kinds = metadata("tokenizer.ggml.token_type") or [1] * len(tokens)
    size = len(tokens)
    while size and kinds[size - 1] == UNUSED:
        size -= 1
    return tokens[:size], kinds[:size]


def _write_settings(metadata: Metadata, tokens: list[str], folder: Path) -> None:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        at = metadata(f"tokenizer.ggml.{key}_token_id")
        if isinstance(at, int) and at < len(tokens):
            settings[name] = tokens[at]
    if template := metadata("tokenizer.chat_template"):
        settings["chat_template"] = template
    write_json(folder / "tokenizer_config.json", settings)
