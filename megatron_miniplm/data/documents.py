"""Tokenised documents in stock Megatron files: opened with checks, or written.

`preprocess_data.py` of Megatron-LM makes ``PREFIX_text_document.{bin,idx}``: one sequence a
document (several when it split sentences), ``document_indices`` telling where documents start, all
tokens back to back in document order. Layout of the bytes: `indexed`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.manifest import fsync_directory
from megatron_miniplm.data.indexed import HEADER, Index, contiguous_index, read_index
from megatron_miniplm.data.staging import exclusive, remove_index_cache, sync, with_suffix

_BLOCK = 1 << 20
_DOCUMENTS_AT_ONCE = 1 << 14
_TOKEN_TYPES = (np.dtype(np.uint16), np.dtype(np.int32))


@dataclass(frozen=True, kw_only=True)
class TokenizedDocuments:
    """Documents of one stock prefix, their tokens mapped."""

    prefix: Path
    """Absolute path without ``.bin`` and ``.idx``."""
    tokens: np.ndarray
    """The ``.bin``: uint16[T] or int32[T], every token of every document in order."""
    mapped: mmap.mmap
    """The mapping behind `tokens`."""
    index: Index
    starts: np.ndarray
    """int64[D + 1]: documents d's first sequence; the last entry is the number of sequences."""

    @classmethod
    def open(cls, prefix: str | Path) -> TokenizedDocuments:
        """Open PREFIX (or PREFIX.idx, PREFIX.bin).

        Refuses what cannot be seen as one run of tokens: a ``.bin`` that is truncated or longer
        than the index says, sequences that are not back to back and in order, boundaries of
        documents that do not ascend, token types other than uint16 and int32, and no token at all.
        """
        prefix = _stock_prefix(Path(prefix).absolute())
        idx, bin_path = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
        index = read_index(idx)
        if index.dtype not in _TOKEN_TYPES:
            raise DataError(
                f"{idx} holds {index.dtype} tokens; only uint16 and int32 are read in place "
                f"(Megatron's choices below and from a vocabulary of 65,500). Tokenise again with "
                f"tools/preprocess_data.py"
            )
        starts = _document_starts(index, idx)
        total = _check_contiguous(index, starts, idx)
        size = bin_path.stat().st_size
        if size != total * index.dtype.itemsize:
            what = "truncated" if size < total * index.dtype.itemsize else "not the index's own"
            raise DataError(
                f"{bin_path} has {size} bytes, but {idx.name} describes {total} tokens of "
                f"{index.dtype.itemsize} bytes, {total * index.dtype.itemsize} in all: the .bin is "
                f"{what}; get both files again"
            )
        if not total:
            raise DataError(f"{prefix} holds no token in {len(starts) - 1} documents")
        with bin_path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tokens = np.frombuffer(mapped, index.dtype)
        return cls(prefix=prefix, tokens=tokens, mapped=mapped, index=index, starts=starts)

    @property
    def bin_path(self) -> Path:
        """The file of the tokens."""
        return with_suffix(self.prefix, ".bin")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def ends(self, begin: int, stop: int) -> np.ndarray:
        """int64: the token after each of the documents `begin` to `stop` (clipped to those)."""
        sequences = self.starts[begin + 1 : stop + 1].astype(np.int64)
        ends = np.full(len(sequences), len(self.tokens), np.int64)
        inside = sequences < len(self.index.pointers)
        ends[inside] = self.index.pointers[sequences[inside]] // self.tokens.itemsize
        return ends

    def release(self, stop: int) -> None:
        """Take the tokens before `stop` out of this process's memory; they can be read again."""
        size = stop * self.tokens.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
        if size:
            self.mapped.madvise(mmap.MADV_DONTNEED, 0, size)

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """All documents in runs of at most `size` tokens, or of one that is longer.

        Each run as its first token and the `ends` of its documents.
        """
        document, token = 0, 0
        while document < len(self):
            ends = self.ends(document, document + _DOCUMENTS_AT_ONCE)
            ends = ends[: max(1, int(np.searchsorted(ends, token + size, side="right")))]
            yield token, ends
            document, token = document + len(ends), int(ends[-1])

    def document_of(self, token: int) -> int:
        """Number of the document that holds the token at this position."""
        document = 0
        for _, ends in self.blocks(1 << 20):
            if ends[-1] > token:
                return document + int(np.searchsorted(ends, token, side="right"))
            document += len(ends)
        raise IndexError(f"token {token} of {self.prefix}, which has {len(self.tokens)}")


def _stock_prefix(path: Path) -> Path:
    if path.suffix in (".idx", ".bin"):
        path = path.with_name(path.name[:-4])
    missing = [s for s in (".idx", ".bin") if not with_suffix(path, s).is_file()]
    if missing:
        ours = with_suffix(path, ".json").is_file()
        hint = (
            f"; {path.name}.json is a manifest: a corpus is instances already"
            if ours
            else "; give the name that Megatron's --data-path takes, as in data/web_text_document"
        )
        raise DataError(f"there is no {path}{missing[0]}{hint}")
    return path


def _document_starts(index: Index, idx: Path) -> np.ndarray:
    """``document_indices`` of the file, mapped; refuses boundaries that do not ascend to N."""
    count = len(index.lengths)
    boundaries = (len(index.raw) - HEADER.size - 12 * count) // 8
    starts = np.frombuffer(index.raw, "<i8", boundaries, HEADER.size + 12 * count)
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != count:
        shown = f"{starts[0]} to {starts[-1]}" if len(starts) else "nothing"
        raise DataError(
            f"{idx}: its {len(starts)} document boundaries span {shown} of {count} sequences, "
            f"expected 0 to {count}: it does not say where documents end (the released MiniPLM "
            f"writer leaves that out); make it again with tools/preprocess_data.py"
        )
    for begin in range(0, len(starts) - 1, _BLOCK):
        steps = np.diff(starts[begin : begin + _BLOCK + 1])
        if (steps < 0).any():
            at = begin + int(np.argmax(steps < 0))
            raise DataError(f"{idx}: document {at} ends before it starts; the index is corrupt")
    return starts


def _check_contiguous(index: Index, starts: np.ndarray, idx: Path) -> int:
    """Number of tokens; refuses sequences that do not lie back to back from byte 0 on."""
    total = 0
    for begin in range(0, len(index.lengths), _BLOCK):
        lengths = index.lengths[begin : begin + _BLOCK].astype(np.int64)
        ends = total + np.cumsum(lengths)
        expected = (ends - lengths) * index.dtype.itemsize
        bad = (index.pointers[begin : begin + _BLOCK] != expected) | (lengths < 0)
        if bad.any():
            at = begin + int(np.argmax(bad))
            raise DataError(
                f"{idx}: document {int(np.searchsorted(starts, at, side='right')) - 1} (sequence "
                f"{at}, {index.lengths[at]} tokens) lies at byte {index.pointers[at]}, expected "
                f"{expected[at - begin]}: documents must lie back to back in their order, so that "
                f"instances are runs of the .bin. A subset or a shuffled index cannot be adopted; "
                f"adopt the prefix that it was made from"
            )
        total = int(ends[-1])
    return total


class DocumentWriter:
    """Context manager that writes one stock prefix; it has its names only after `finish`.

    Leaving it otherwise removes what was written. Refuses a prefix that another process writes.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, *, overwrite: bool = False) -> None:
        self.prefix, self.dtype, self.overwrite = Path(prefix), dtype, overwrite
        self.num_tokens = 0
        self._lengths = bytearray()  # int32 each

    def __enter__(self) -> DocumentWriter:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            lock = self._draft(".lock")
            stack.enter_context(exclusive(lock, wait=False, guards=self.prefix))
            for suffix in (".bin", ".idx", ".lock"):
                stack.callback(self._draft(suffix).unlink, missing_ok=True)
            self.refuse_existing(self.prefix, overwrite=self.overwrite)
            self._file = stack.enter_context(self._draft(".bin").open("wb"))
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    @staticmethod
    def refuse_existing(prefix: Path, *, overwrite: bool) -> None:
        """Refuse to replace a finished prefix unless it is asked for."""
        present = [p for p in (with_suffix(prefix, s) for s in (".idx", ".bin")) if p.exists()]
        if present and not overwrite:
            raise ConfigError(
                f"{present[0]} exists: choose another --output-prefix, or pass --overwrite"
            )

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their tokens end to end (int[sum]) and lengths (int[n], tokens)."""
        self._file.write(np.ascontiguousarray(tokens, self.dtype).data.cast("B"))
        self._lengths += np.asarray(lengths).astype(np.int32).tobytes()
        self.num_tokens += len(tokens)

    def finish(self) -> None:
        """Make the files durable, then visible, the ``.idx`` (without which nothing opens) last."""
        index = contiguous_index(np.frombuffer(self._lengths, np.int32), self.dtype)
        self._draft(".idx").write_bytes(index)
        self._file.flush()
        os.fsync(self._file.fileno())
        sync(self._draft(".idx"))
        with_suffix(self.prefix, ".idx").unlink(missing_ok=True)
        remove_index_cache(with_suffix(self.prefix, ".idx"))
        for suffix in (".bin", ".idx"):
            self._draft(suffix).rename(with_suffix(self.prefix, suffix))
        fsync_directory(self.prefix.parent)

    def _draft(self, suffix: str) -> Path:
        return self.prefix.with_name(f".{self.prefix.name}.partial{suffix}")


def join_documents(
    ids: np.ndarray, offsets: np.ndarray, *, eod_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (int32[T]) and lengths (int64[n]) of the documents of a flat encoding.

    Each is followed by the separator, unless `eod_id` is None. Documents without a token are left
    out, as nothing is there to separate.
    """
    lengths = np.diff(offsets)
    lengths = lengths[lengths > 0]
    if eod_id is None:
        return ids, lengths
    lengths = lengths + 1
    ends = np.cumsum(lengths)
    of_text = np.ones(len(ids) + len(lengths), bool)
    of_text[ends - 1] = False
    tokens = np.full(len(of_text), eod_id, np.int32)
    tokens[of_text] = ids
    return tokens, lengths


def output_prefixes(prefix: Path, json_keys: Sequence[str]) -> dict[str, Path]:
    """Key -> stock prefix of its documents, ``PREFIX_KEY_document`` as in Megatron-LM."""
    return {key: with_suffix(prefix, f"_{key}_document") for key in json_keys}
