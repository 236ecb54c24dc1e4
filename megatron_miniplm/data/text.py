"""Documents from JSONL files: plain, ``.gz``, ``.xz``, ``.zst`` or standard input, as a stream.

One line is one record, a JSON object with a text and, if asked for, a domain. Whatever is wrong
with a record is said with its file and line; a compressed file that ends early is always an error.
"""

from __future__ import annotations

import glob
import gzip
import lzma
import stat
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import orjson
import zstandard

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.log import get_logger

DEFAULT_DOMAIN = "text"
STDIN = "-"
_BLOCK = 1 << 18
_LOGGED_BAD_RECORDS = 5
_UTF8_BOM = b"\xef\xbb\xbf"
_STREAMS: Mapping[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".xz": lzma.LZMAFile,
}
_CORRUPT = (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where documents come from."""

    input: tuple[str, ...]
    """JSONL files or quoted globs; .gz, .xz and .zst are decompressed, - is standard input."""
    json_keys: tuple[str, ...] = ("text",)
    """Key of a record's text (one key)."""
    domain_key: str | None = None
    """Key of a record's domain, dots lead inwards (meta.pile_set_name); default: one domain."""
    on_bad_record: Literal["error", "skip"] = "error"
    """At a malformed record: stop, or count it and go on."""

    def __post_init__(self) -> None:
        if len(self.json_keys) != 1:
            raise ConfigError(
                f"--json-keys takes one key, not {len(self.json_keys)}: a corpus has one text a "
                "record; run the command once for each key"
            )


class Document(NamedTuple):
    """One text and the domain that it belongs to."""

    text: str
    domain: str


class _BadRecordError(Exception):
    """What is wrong with a line."""


class TextReader:
    """Iterates over the documents of all inputs, once, and counts what it met.

    Inputs keep their order, the files of one glob are sorted by name. Refuses missing files,
    folders, a file given twice, and inputs without a document.
    """

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.paths = _expand(config.input)
        sizes = [_size(path) for path in self.paths]
        self.total_bytes = None if None in sizes else sum(size or 0 for size in sizes)
        """Size of all inputs as stored (compressed); None if one is no regular file."""
        self.documents = 0
        self.empty_documents = 0
        self.bad_records = 0
        self._finished_bytes = 0
        self._current: BinaryIO | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the inputs as stored that are read so far."""
        here = self._current.tell() if self._current and self._current.seekable() else 0
        return self._finished_bytes + here

    def __iter__(self) -> Iterator[Document]:
        for path in self.paths:
            yield from self._documents(path)
        if not self.documents:
            raise DataError(
                f"no document in {_listed(self.paths)}: {self.empty_documents} empty texts, "
                f"{self.bad_records} bad records"
            )

    def _documents(self, path: str) -> Iterator[Document]:
        number, records = 0, 0
        with closing(self._lines(path)) as lines:
            for number, line in enumerate(lines, start=1):
                if not line or line.isspace():
                    continue
                records += 1
                try:
                    document = self._parse(line.removeprefix(_UTF8_BOM) if number == 1 else line)
                except _BadRecordError as error:
                    self._bad(f"{_name(path)}, line {number}: {error}")
                    continue
                if document.text:
                    self.documents += 1
                    yield document
                else:
                    self.empty_documents += 1
        if not records:
            raise DataError(f"{_name(path)} holds no record: it has {number} blank lines")

    def _lines(self, path: str) -> Generator[bytes]:
        """Lines of one input, decompressed; refuses what is truncated or corrupt."""
        count = 0
        try:
            with _open(path) as self._current:
                for line in _split(_blocks(path, self._current)):
                    count += 1
                    yield line
                self._finished_bytes = self.bytes_read
        except _CORRUPT as error:
            raise DataError(
                f"{_name(path)}, after line {count}: {error}; the file is truncated, corrupt or "
                "not of the format its name says: get it again"
            ) from error
        finally:
            self._current = None

    def _parse(self, line: bytes) -> Document:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise _BadRecordError(_explain(line, error)) from error
        if not isinstance(record, dict):
            raise _BadRecordError(f"a JSON {type(record).__name__}, not an object")
        text = _string(record, self.config.json_keys[0])
        if self.config.domain_key is None:
            return Document(text, DEFAULT_DOMAIN)
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


def _expand(patterns: Sequence[str]) -> list[str]:
    """Files of all patterns, in order."""
    found: list[str] = []
    for pattern in patterns:
        # A name that exists is that file, whatever characters are in it.
        literal = pattern == STDIN or Path(pattern).exists()
        files = [pattern] if literal else sorted(glob.glob(pattern, recursive=True))
        if not files:
            raise DataError(f"--input {pattern} does not exist and matches no file")
        found += files
    seen: set[Path] = set()
    for path in found:
        if path != STDIN and Path(path).is_dir():
            raise ConfigError(f"--input {path} is a folder: give its files, as in '{path}/*.jsonl'")
        where = Path(path).resolve()
        if where in seen:
            raise ConfigError(f"--input has {_name(path)} twice: its documents would count twice")
        seen.add(where)
    return found


def _size(path: str) -> int | None:
    if path == STDIN:
        return None
    status = Path(path).stat()
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _open(path: str) -> BinaryIO:
    if path == STDIN:
        # Not closed with this handle: it belongs to the process.
        return open(sys.stdin.fileno(), "rb", closefd=False)
    return Path(path).open("rb")


def _blocks(path: str, raw: BinaryIO) -> Iterator[bytes]:
    """Decompressed content of one input."""
    suffix = "" if path == STDIN else Path(path).suffix
    if suffix == ".zst":
        yield from _zstd_blocks(raw)
        return
    stream: Any = _STREAMS.get(suffix, lambda file: file)(raw)
    while block := stream.read(_BLOCK):
        yield block


def _zstd_blocks(raw: BinaryIO) -> Iterator[bytes]:
    """Decompress zstd frames; unlike the package's own reader it sees that one is cut short."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    while block := raw.read(_BLOCK):
        while block:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(block)
            block = b""
            if frame.eof:
                block, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("compressed file ended before the end of its last frame")


def _split(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends; a line may span many blocks."""
    parts: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        parts.append(first)
        if others:
            yield b"".join(parts)
            yield from others[:-1]
            parts = [others[-1]]
    if last := b"".join(parts):
        yield last


def _string(record: Mapping[str, Any], key: str) -> str:
    """The string at `key`, which is a name or a path of names with dots."""
    value: Any = record
    for name in [key] if key in record else key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise _BadRecordError(f"no key {key!r}; the record has {sorted(record)}")
        value = value[name]
    if not isinstance(value, str):
        raise _BadRecordError(f"{key!r} is a JSON {type(value).__name__}, not a string")
    return value


def _explain(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as wrong:
        return f"invalid UTF-8 at byte {wrong.start + 1} of the line"
    return f"malformed JSON at column {error.colno}: {error.msg}"


def _name(path: str) -> str:
    return "standard input" if path == STDIN else path


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(_name, paths[:3])) + more
