"""Text -> tokenised documents, with Megatron-LM's flags and output names.

For each JSON key, ``PREFIX_KEY_document.{bin,idx}``: one sequence a document, as Megatron-LM's
``tools/preprocess_data.py`` writes and every Megatron reads. Other than there, the separator is
appended by default. ``miniplm adopt`` makes a corpus of the result without copying it;
``miniplm preprocess`` makes one straight from text.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_miniplm.core.config import parse_flags
from megatron_miniplm.core.errors import ConfigError, DataError, MiniPLMError
from megatron_miniplm.core.log import get_logger, setup_logging
from megatron_miniplm.data.documents import DocumentWriter, join_documents, output_prefixes
from megatron_miniplm.data.indexed import token_dtype
from megatron_miniplm.data.pipeline import Pipeline
from megatron_miniplm.data.preprocess import BATCH_CHARACTERS
from megatron_miniplm.data.staging import writing
from megatron_miniplm.data.text import TextBatch, TextConfig, TextReader
from megatron_miniplm.data.tokenizers import Tokenizer, TokenizerConfig

_DEPTH = 2  # batches that may wait between two steps
_ONE_PROCESS = "one process encodes on all cores and writes each file once; --workers limits it"
_SENTENCES = "documents stay whole; only readers like BERT's want one sequence a sentence"
_TOKENIZER_JSON = "give --tokenizer-model a folder with tokenizer.json, or a SentencePiece model"
UNSUPPORTED = {
    "--partitions": _ONE_PROCESS,
    "--find-optimal-num-workers": _ONE_PROCESS,
    "--workers-to-check": _ONE_PROCESS,
    "--max-documents": _ONE_PROCESS,
    "--keep-sequential-samples": "the order of documents is always kept; leave it out",
    "--split-sentences": _SENTENCES,
    "--keep-newlines": _SENTENCES,
    "--lang": _SENTENCES,
    "--vocab-file": _TOKENIZER_JSON,
    "--merge-file": _TOKENIZER_JSON,
    "--vocab-size": "the vocabulary's size is read from the tokenizer",
    "--tokenizer-metadata": _TOKENIZER_JSON,
    "--tokenizer-special-tokens": "special tokens are read from the tokenizer",
    "--trust-remote-code": "no code of a tokenizer's author is ever run; leave it out",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tokenise text into Megatron's .bin/.idx files: PREFIX_KEY_document, one for each JSON key.

    Every document ends with the separator unless --no-append-eod is given (Megatron-LM's default
    is the other way round); `miniplm adopt` needs it.
    """

    input: tuple[str, ...]
    """JSONL files or quoted globs; .gz, .xz and .zst are decompressed, - is standard input."""
    tokenizer: TokenizerConfig
    output_prefix: Path
    """Path and start of the name of the output files."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys of a record's texts; each makes files of its own."""
    append_eod: bool = True
    """End every document with the separator."""
    workers: int | None = None
    """Threads that encode; default: all cores. They do not change the result."""
    log_interval: int = 1000
    """Say how far it is every so many documents."""
    on_bad_record: Literal["error", "skip"] = "error"
    """At a malformed record: stop, or count it and go on."""
    overwrite: bool = False
    """Replace files that are there."""

    def __post_init__(self) -> None:
        for name in ("workers", "log_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if not self.json_keys or len(set(self.json_keys)) < len(self.json_keys):
            raise ConfigError(f"--json-keys {' '.join(self.json_keys)}: give different keys")
        if "-" in self.input and len(self.json_keys) > 1:
            raise ConfigError("standard input can be read once: give one of the --json-keys")


def run(config: Config) -> None:
    """Make the files of all keys; those of a key are there complete or not at all."""
    prefixes = output_prefixes(config.output_prefix, config.json_keys)
    for prefix in prefixes.values():
        DocumentWriter.refuse_existing(prefix, overwrite=config.overwrite)
    tokenizer = config.tokenizer.load(workers=config.workers)
    tokenizer.load_ahead()
    if config.append_eod:
        get_logger().info(
            "every document ends with %s (id %d); --no-append-eod leaves it out",
            tokenizer.eod_token, tokenizer.eod_id,
        )  # fmt: skip
    else:
        get_logger().warning("no separator between documents: `miniplm adopt` will refuse this")
    for key, prefix in prefixes.items():
        text = TextConfig(input=config.input, json_keys=(key,), on_bad_record=config.on_bad_record)
        with writing(prefix):
            write_documents(TextReader(text), tokenizer, prefix, config)


def write_documents(reader: TextReader, tokenizer: Tokenizer, prefix: Path, config: Config) -> None:
    """Encode all documents of a reader into one stock prefix: read, encode, write side by side."""
    dtype = token_dtype(tokenizer.vocab_size)
    eod_id = tokenizer.eod_id if config.append_eod else None
    documents, without_tokens, start = 0, 0, time.monotonic()

    def encode(batch: TextBatch) -> tuple[TextBatch, np.ndarray, np.ndarray]:
        return batch, *join_documents(*tokenizer.encode_flat(batch.texts), eod_id=eod_id)

    with (
        DocumentWriter(prefix, dtype, overwrite=config.overwrite) as writer,
        Pipeline(depth=_DEPTH) as pipeline,
    ):
        read = pipeline.ahead(reader.batches(BATCH_CHARACTERS), name="reader")
        for batch, tokens, lengths in pipeline.ahead(map(encode, read), name="tokenizer"):
            writer.add(tokens, lengths)
            before, documents = documents, documents + len(batch.texts)
            without_tokens += len(batch.texts) - len(lengths)
            if documents // config.log_interval > before // config.log_interval:
                _say(documents, batch.bytes_read, time.monotonic() - start)
        if not writer.num_tokens:
            raise DataError(f"no document of {documents} has a token that could be written")
        writer.finish()
    _say(documents, reader.bytes_read, time.monotonic() - start)
    get_logger().info(
        "%s: %s documents, %s tokens; %d empty texts, %d texts without a token, %d bad records",
        prefix, f"{documents - without_tokens:,}", f"{writer.num_tokens:,}",
        reader.empty_documents, without_tokens, reader.bad_records,
    )  # fmt: skip


def _say(documents: int, num_bytes: int, seconds: float) -> None:
    """Megatron-LM's progress line; megabytes are those of the input as stored."""
    seconds = max(seconds, 1e-9)
    get_logger().info(
        "Processed %d documents (%.1f docs/s, %.1f MB/s).",
        documents, documents / seconds, num_bytes / 1e6 / seconds,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 only if every file is complete."""
    words = list(sys.argv[1:] if argv is None else argv)
    setup_logging()
    try:
        for word in words:
            flag = word.partition("=")[0].replace("_", "-")
            if flag in UNSUPPORTED:
                raise ConfigError(f"{flag} is not supported: {UNSUPPORTED[flag]}")
        run(parse_flags(Config, words, prog="preprocess_data.py"))
    except MiniPLMError as error:
        get_logger().error("preprocess_data.py: %s: %s", type(error).__name__, error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
