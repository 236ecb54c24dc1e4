"""Documents from text files, as a stream: one record is one text and, if asked for, its domain.

A record is a line of JSONL, an object, or a row of Parquet. Whatever is wrong with one is said with
its file and line. Lines go through a native scanner (csrc/jsonl.h); those that it finds unusual,
and so everything that is wrong, go through orjson.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson

from megatron_miniplm._C import RecordReader
from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.data.sources import (
    LineFile,
    domain_of_file,
    expand_inputs,
    is_parquet,
    parquet_rows,
    said,
    stored_size,
)

DEFAULT_DOMAIN = "text"
_LOGGED_BAD_RECORDS = 5
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where documents come from."""

    input: tuple[str, ...]
    """JSONL or Parquet files or quoted globs; .gz, .xz and .zst are decompressed, - is stdin."""
    json_keys: tuple[str, ...] = ("text",)
    """Key of a record's text (one key)."""
    domain_key: str | None = None
    """Key of a record's domain, dots lead inwards (meta.pile_set_name); default: one domain."""
    domain_from_file_name: bool = False
    """Take the domain from the file's name, less suffixes and shard number (wiki-003.jsonl.gz)."""
    on_bad_record: Literal["error", "skip"] = "error"
    """At a malformed record: stop, or count it and go on."""

    def __post_init__(self) -> None:
        if len(self.json_keys) != 1:
            raise ConfigError(
                f"--json-keys takes one key, not {len(self.json_keys)}: a corpus has one text a "
                "record; run the command once for each key"
            )
        if self.domain_from_file_name and self.domain_key is not None:
            raise ConfigError(
                f"--domain-key {self.domain_key} and --domain-from-file-name: give one of them"
            )


class Document(NamedTuple):
    """One text and the domain that it belongs to."""

    text: str
    domain: str


class TextBatch(NamedTuple):
    """Consecutive documents."""

    texts: list[str]
    domains: list[str]
    bytes_read: int
    """Bytes of the inputs as stored that were read up to here."""


class _Documents(NamedTuple):
    """Some documents, column by column."""

    texts: list[str]
    domains: list[str]

    def add(self, document: Document) -> None:
        self.texts.append(document.text)
        self.domains.append(document.domain)


class _BadRecordError(Exception):
    """What is wrong with a line."""


class TextReader:
    """Iterates over the documents of all inputs, once, and counts what it met.

    `paths` are the input files, all of `config.input` by default (see `expand_inputs`). Refuses
    inputs without a document.
    """

    def __init__(self, config: TextConfig, paths: Sequence[str] | None = None) -> None:
        self.config = config
        self.paths = expand_inputs(config.input) if paths is None else list(paths)
        sizes = [stored_size(path) for path in self.paths]
        self.total_bytes = None if None in sizes else sum(size or 0 for size in sizes)
        """Size of all inputs as stored (compressed); None if one is no regular file."""
        self.documents = 0
        self.empty_documents = 0
        self.bad_records = 0
        self.bytes_read = 0
        """Bytes of the inputs as stored that are read so far."""

    def __iter__(self) -> Iterator[Document]:
        for texts, domains in self._pieces():
            yield from map(Document, texts, domains)

    def batches(self, characters: int) -> Iterator[TextBatch]:
        """Runs of documents of at least so many characters together (the last one: the rest)."""
        texts: list[str] = []
        domains: list[str] = []
        size = 0
        for piece in self._pieces():
            texts += piece.texts
            domains += piece.domains
            size += sum(map(len, piece.texts))
            if size >= characters:
                yield TextBatch(texts, domains, self.bytes_read)
                texts, domains, size = [], [], 0
        if texts:
            yield TextBatch(texts, domains, self.bytes_read)

    def _pieces(self) -> Iterator[_Documents]:
        """All documents, some at a time; counted here."""
        for path in self.paths:
            before = self.bytes_read
            for piece in self._parquet(path) if is_parquet(path) else self._jsonl(path):
                self.documents += len(piece.texts)
                yield piece
            if is_parquet(path):
                self.bytes_read = before + (stored_size(path) or 0)
        if not self.documents:
            raise DataError(
                f"no document in {_listed(self.paths)}: {self.empty_documents} empty texts, "
                f"{self.bad_records} bad records"
            )

    def _jsonl(self, path: str) -> Iterator[_Documents]:
        file, before = LineFile(path), self.bytes_read
        constant = self._constant_domain(path)
        scanner = RecordReader(self.config.json_keys[0], self.config.domain_key)
        lines, records = 0, 0
        with closing(file.blocks()) as blocks:
            for block in blocks:
                self.bytes_read = before + file.bytes_read
                if not lines:
                    block = block.removeprefix(_UTF8_BOM)
                texts, domains, unusual, empty, found, count = scanner.read(block)
                piece = _Documents(texts, domains or [constant] * len(texts))
                self.empty_documents += empty
                if unusual:
                    piece = self._with_unusual(
                        piece, unusual, constant, f"{said(path)}, line", lines
                    )
                lines, records = lines + count, records + found
                yield piece
        self.bytes_read = before + file.bytes_read
        if not records:
            raise DataError(f"{said(path)} holds no record: it has {lines} blank lines")

    def _with_unusual(
        self,
        plain: _Documents,
        unusual: Sequence[tuple[int, int, bytes]],
        constant: str,
        place: str,
        lines_before: int,
    ) -> _Documents:
        """The documents of a run of lines, those that orjson has to read put in their places."""
        merged, done = _Documents([], []), 0
        for at, number, line in unusual:
            merged.texts.extend(plain.texts[done:at])
            merged.domains.extend(plain.domains[done:at])
            done = at
            try:
                document = self._parse(line, constant)
            except _BadRecordError as error:
                self._bad(f"{place} {lines_before + number + 1}: {error}")
            else:
                self._keep(document, merged)
        merged.texts.extend(plain.texts[done:])
        merged.domains.extend(plain.domains[done:])
        return merged

    def _keep(self, document: Document, piece: _Documents) -> None:
        """Add a document to a piece, or count it if it is empty."""
        if document.text:
            piece.add(document)
        else:
            self.empty_documents += 1

    def _parquet(self, path: str) -> Iterator[_Documents]:
        text_key, domain_key = self.config.json_keys[0], self.config.domain_key
        constant = self._constant_domain(path)
        number = 0
        keys = [text_key] if domain_key is None else [text_key, domain_key]
        for columns in parquet_rows(path, keys):
            piece = _Documents([], [])
            for values in zip(*columns, strict=True):
                number += 1
                try:
                    text = _checked(values[0], text_key)
                    domain = constant if domain_key is None else _checked(values[1], domain_key)
                    if not domain:
                        raise _BadRecordError(f"the domain {domain_key!r} is empty")
                except _BadRecordError as error:
                    self._bad(f"{path}, row {number}: {error}")
                else:
                    self._keep(Document(text, domain), piece)
            yield piece
        if not number:
            raise DataError(f"{path} holds no record: it has no rows")

    def _constant_domain(self, path: str) -> str:
        return domain_of_file(path) if self.config.domain_from_file_name else DEFAULT_DOMAIN

    def _parse(self, line: bytes, constant: str) -> Document:
        """The document of a line; `constant` is its domain where records have none."""
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise _BadRecordError(_explain(line, error)) from error
        if not isinstance(record, dict):
            raise _BadRecordError(f"a JSON {type(record).__name__}, not an object")
        text = _string(record, self.config.json_keys[0])
        if self.config.domain_key is None:
            return Document(text, constant)
        domain = _string(record, self.config.domain_key)
        if not domain:
            raise _BadRecordError(f"the domain {self.config.domain_key!r} is empty")
        return Document(text, domain)

    def _bad(self, what: str) -> None:
        if self.config.on_bad_record == "error":
            raise DataError(f"{what}; fix it, or skip such records with --on-bad-record skip")
        self.bad_records += 1
        if self.bad_records <= _LOGGED_BAD_RECORDS:
            get_logger().warning("skipped %s", what)
        if self.bad_records == _LOGGED_BAD_RECORDS:
            get_logger().warning("further bad records are counted, not shown")


def _string(record: Mapping[str, Any], key: str) -> str:
    """The string at `key`, which is a name or a path of names with dots."""
    value: Any = record.get(key)
    if type(value) is str:
        return value
    value = record
    for name in [key] if key in record else key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise _BadRecordError(f"no key {key!r}; the record has {sorted(record)}")
        value = value[name]
    return _checked(value, key)


def _checked(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise _BadRecordError(f"{key!r} is a JSON {type(value).__name__}, not a string")
    return value


def _explain(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as wrong:
        return f"invalid UTF-8 at byte {wrong.start + 1} of the line"
    return f"malformed JSON at column {error.colno}: {error.msg}"


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(said, paths[:3])) + more
