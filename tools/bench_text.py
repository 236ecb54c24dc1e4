"""Real text and tokenizers for benchmarks: those of a folder (``--text``), or what Python carries.

The folder has ``corpus/train-*.jsonl.xz``, records with the keys ``text`` and ``domain``, and
``tokenizers/NAME.tar.xz``, of Hugging Face folders. Without one, and for quick runs: the sources of
the standard library and a byte-level BPE trained on some of them.
"""

from __future__ import annotations

import lzma
import shutil
import sysconfig
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import tokenizers
from bench_core import Bench
from bench_machine import PROJECT

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.tokenizers import DEFAULT_EOD

_BESIDE = PROJECT.parent / "shared" / "data"  # taken without --text if it is there
MAIN_TOKENIZER = "qwen2.5"  # the vocabulary of the paper
_QUICK_BYTES = 400_000
_STDLIB = Path(sysconfig.get_paths()["stdlib"])


@dataclass(frozen=True, kw_only=True)
class Text:
    """An uncompressed JSONL file with the keys ``text`` and ``domain``."""

    path: Path
    source: str
    """Where the text comes from, for the names of rows."""
    documents: int
    text_bytes: int
    """UTF-8 bytes of the texts alone; every MB/s counts these."""

    def records(self) -> Iterator[tuple[str, str]]:
        """(text, domain) of every document."""
        with self.path.open("rb") as file:
            for line in file:
                record = orjson.loads(line)
                yield record["text"], record["domain"]


def make_text(bench: Bench, *, shards: int | None = None) -> Text:
    """Write the benchmark's text into the scratch folder (of the folder, `shards` files)."""
    path = bench.scratch / "text.jsonl"
    packed = _packed(bench, "corpus/train-*.jsonl.xz")[:shards]
    if packed and not bench.sizes.quick:
        folder = bench.sizes.text
        source = f"{len(packed)} shards of {folder.name if folder else 'the shared corpus'}"
        with path.open("wb") as output:
            for shard in packed:
                with lzma.open(shard) as file:
                    shutil.copyfileobj(file, output, 1 << 22)
    else:
        source = "standard library sources"
        limit = _QUICK_BYTES if bench.sizes.quick else None
        with path.open("wb") as output:
            for text, domain in stdlib_texts(limit):
                output.write(orjson.dumps({"text": text, "domain": domain}) + b"\n")
    with path.open("rb") as file:
        lengths = [len(orjson.loads(line)["text"].encode()) for line in file]
    return Text(path=path, source=source, documents=len(lengths), text_bytes=sum(lengths))


def _packed(bench: Bench, pattern: str) -> list[Path]:
    folder = bench.sizes.text
    found = sorted((folder or _BESIDE).glob(pattern))
    if folder and not found:
        raise ConfigError(f"--text {folder} has no {pattern}")
    return found


def repeat_text(text: Text, size: int, path: Path) -> Text:
    """The same documents again and again, at least once, until the file has `size` bytes."""
    copies = max(1, -(-size // text.path.stat().st_size))
    with path.open("wb") as output:
        for _ in range(copies):
            with text.path.open("rb") as file:
                shutil.copyfileobj(file, output, 1 << 22)
    return Text(
        path=path,
        source=f"{text.source}, {copies} times",
        documents=copies * text.documents,
        text_bytes=copies * text.text_bytes,
    )


def first_bytes(text: Text, size: int, path: Path) -> Text:
    """The first documents, up to about `size` bytes of JSONL."""
    documents = text_bytes = written = 0
    with text.path.open("rb") as file, path.open("wb") as output:
        for line in file:
            if written and written + len(line) > size:
                break
            written += output.write(line)
            documents += 1
            text_bytes += len(orjson.loads(line)["text"].encode())
    return Text(path=path, source=text.source, documents=documents, text_bytes=text_bytes)


def stdlib_texts(limit: int | None) -> Iterator[tuple[str, str]]:
    """(text, domain) of the library's modules, by path, up to `limit` characters."""
    total = 0
    for path in sorted(_STDLIB.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # the test-suite has files in other encodings
            continue
        if not text:
            continue
        yield text, path.relative_to(_STDLIB).parts[0] if path.parent != _STDLIB else "top"
        total += len(text)
        if limit is not None and total >= limit:
            return


def make_tokenizers(bench: Bench, *names: str) -> dict[str, Path]:
    """Folders of the named tokenizers (all three if none is named), or of a small trained one."""
    packed = _packed(bench, "tokenizers/*.tar.xz")
    if not packed or bench.sizes.quick:
        return {"small BPE": make_bpe(bench.scratch / "tokenizer", 2000)}
    folders = {}
    for archive in packed:
        name = archive.name.removesuffix(".tar.xz")
        if not names or name in names:
            with tarfile.open(archive) as tar:
                tar.extractall(bench.scratch / name, filter="data")
            folders[name] = next((bench.scratch / name).rglob("tokenizer.json")).parent
    return folders


def make_tokenizer(bench: Bench) -> tuple[str, Path]:
    """(name, folder) of the tokenizer that most cases use."""
    return next(iter(make_tokenizers(bench, MAIN_TOKENIZER).items()))


def make_bpe(folder: Path, vocabulary: int) -> Path:
    """Folder of a byte-level BPE of that size, trained on sources of the standard library."""
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[DEFAULT_EOD], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = [text for text, _ in stdlib_texts(40 * vocabulary)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
