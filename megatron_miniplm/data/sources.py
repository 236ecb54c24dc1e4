"""Input files of text: which there are, and their raw records as a stream.

JSONL files come plain, ``.gz``, ``.xz``, ``.zst`` or through standard input, as runs of whole
lines; ``.parquet`` files (extra ``[parquet]``) as columns. A file that ends early is always an
error.
"""

from __future__ import annotations

import glob
import gzip
import importlib
import lzma
import re
import stat
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatron_miniplm.core.errors import ConfigError, DataError

STDIN = "-"
_BLOCK = 1 << 18
_PARQUET_ROWS = 1024
_STREAMS: Mapping[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".xz": lzma.LZMAFile,
}
_CORRUPT = (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
_SHARD_NUMBER = re.compile(r"([-_.](part|shard)?[-_]?\d+([-_]of[-_]\d+)?)+$")


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files of all patterns: in the order of the patterns, those of one glob sorted by name.

    Refuses patterns without a file, folders, and a file given twice.
    """
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
            raise ConfigError(f"--input has {said(path)} twice: its documents would count twice")
        seen.add(where)
    return found


def stored_size(path: str) -> int | None:
    """Bytes of an input as stored; None if it is no regular file."""
    if path == STDIN:
        return None
    status = Path(path).stat()
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def said(path: str) -> str:
    """An input as messages name it."""
    return "standard input" if path == STDIN else path


def is_parquet(path: str) -> bool:
    """Whether an input is read as columns."""
    return path != STDIN and Path(path).suffix == ".parquet"


def domain_of_file(path: str) -> str:
    """A file's name without its suffixes and shard number: ``wiki-00003-of-00010.jsonl.gz``, wiki.

    Refuses standard input, which has no name.
    """
    if path == STDIN:
        raise ConfigError("--domain-from-file-name: standard input has no name, give --domain-key")
    name = Path(path).name
    for suffix in (".gz", ".xz", ".zst", ".jsonl", ".json", ".ndjson", ".parquet", ".txt"):
        name = name.removesuffix(suffix)
    return _SHARD_NUMBER.sub("", name) or name


class LineFile:
    """One JSONL input, read once."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._raw: BinaryIO | None = None
        self._size = 0

    @property
    def bytes_read(self) -> int:
        """Bytes as stored that are read so far."""
        if self._raw is not None and not self._raw.closed and self._raw.seekable():
            self._size = self._raw.tell()
        return self._size

    def blocks(self) -> Generator[bytes, None, None]:
        """The content in runs of whole lines, ends included; refuses what is truncated or corrupt.

        The last line may lack its end. A run is some hundred kilobytes, or a line if it is longer.
        """
        count = 0
        try:
            with _open(self.path) as self._raw:
                for block in _whole_lines(_blocks(self.path, self._raw)):
                    count += block.count(b"\n")
                    yield block
                self._size = self.bytes_read
        except _CORRUPT as error:
            raise DataError(
                f"{said(self.path)}, after line {count}: {error}; the file is truncated, corrupt "
                "or not of the format its name says: get it again"
            ) from error


def parquet_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[list[Any], ...]]:
    """Values of some columns, 1,024 rows at a time; None where a row has none.

    A column is a name or a path of names with dots. Refuses files without these columns.
    """
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(
            f"{path} is a Parquet file: reading it takes pyarrow, "
            "pip install 'megatron-miniplm[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            names = {name: name.split(".") for name in columns}
            known = file.schema_arrow.names
            tops = {name: name if name in known else parts[0] for name, parts in names.items()}
            for name, top in tops.items():
                if top not in known:
                    raise DataError(f"{path} has no column {name!r}; it has {sorted(known)}")
            for batch in file.iter_batches(_PARQUET_ROWS, columns=sorted(set(tops.values()))):
                yield tuple(_column(batch, tops[name], name) for name in columns)
    except DataError:
        raise
    except (OSError, ValueError, KeyError) as error:  # what pyarrow's own errors derive from
        raise DataError(f"{path} is no readable Parquet file: {error}; get it again") from error


def _column(batch: Any, top: str, name: str) -> list[Any]:
    values = batch.column(top).to_pylist()
    for part in name.split(".")[1:] if top != name else ():
        values = [value.get(part) if isinstance(value, dict) else None for value in values]
    return values


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


def _whole_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes, cut at ends of lines only; a line may span blocks."""
    begun: list[bytes] = []
    for block in blocks:
        end = block.rfind(b"\n") + 1
        if end:
            yield b"".join([*begun, memoryview(block)[:end]])
            begun = []
        begun.append(block[end:])
    if last := b"".join(begun):
        yield last
