"""The embedded corpus: the text of the Python standard library of the interpreter that runs this.

`make quickstart` needs real text without a download. Every interpreter carries about 30 MB of it:
module sources (domain ``code``; ``test`` for the noisier test-suite), the prose of their
docstrings (``docstring``), the language reference behind ``help()`` (``topic``) and a few plain
text files (``text``). A document is one file, or one topic.

Two things keep the held-out part honest. Docstrings are cut out of the sources, so that prose is
not seen twice; and the split is by module (a module, its docstrings and its tests go together),
after which every long paragraph of the held-out part is removed from the training part.

Written to ``--output``, the same bytes for the same interpreter: ``train.jsonl`` and
``heldout.jsonl`` (``{"text", "domain", "source"}``, one document a line), ``tokenizer/`` (a
byte-level BPE trained on the training part) and last ``corpus.json`` (sizes), which says that the
rest is complete.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import platform
import re
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_miniplm.core.config import parse_flags, print_json, to_flat
from megatron_miniplm.core.errors import ConfigError, MiniPLMError
from megatron_miniplm.core.log import get_logger, setup_logging
from megatron_miniplm.core.manifest import atomic_file, hash_file, read_json, write_json

EOD = "<|endoftext|>"
# Other people's packages, the topics (read as such), and generated code tables, which are no text.
_SKIP = {"site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"}
_TESTS = {"test", "tests", "idle_test"}
_PARAGRAPH = re.compile(r"\n\s*\n")
_LONG = 80
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write the text of this interpreter's standard library as a corpus, and a tokenizer for it."""

    output: Path
    """Folder for train.jsonl, heldout.jsonl, tokenizer/ and corpus.json."""
    vocab_size: int = 4096
    """Entries of the byte-level BPE, the separator included."""
    train_mb: float = 0.0
    """At most this many megabytes (10^6 bytes) of training text; 0: all there is."""
    heldout_mb: float = 0.0
    """At most this many megabytes of held-out text; 0: all there is."""
    heldout_fraction: float = 0.08
    """Share of the modules that is held out."""
    overwrite: bool = False
    """Replace a corpus that was built with other settings."""

    def __post_init__(self) -> None:
        if not 0 < self.heldout_fraction < 1:
            raise ConfigError(f"--heldout-fraction {self.heldout_fraction} must be in (0, 1)")
        if self.vocab_size < 257:
            raise ConfigError(
                f"--vocab-size {self.vocab_size} is too small: 256 bytes and the separator need 257"
            )
        if self.train_mb < 0 or self.heldout_mb < 0:
            raise ConfigError("--train-mb and --heldout-mb must not be negative; 0 means all")


class _Docstring(NamedTuple):
    """A docstring, the dotted name of what it documents, and whether it is the whole body."""

    node: ast.Constant
    text: str
    owner: str
    alone: bool


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, what kind it is, where it is from, and what it is held out together with."""

    text: str
    domain: str
    source: str
    group: str

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return len(self.text.encode())


def run(config: Config) -> None:
    """Build the corpus and its tokenizer under `config.output`; a finished one is kept."""
    asked = to_flat(config) | {"python": platform.python_version()}
    del asked["output"], asked["overwrite"]
    if _finished(config.output / "corpus.json", asked, overwrite=config.overwrite):
        return
    documents = list(stdlib_documents())
    heldout = [d for d in documents if is_heldout(d.group, config.heldout_fraction)]
    train = [d for d in documents if not is_heldout(d.group, config.heldout_fraction)]
    train = without_shared_paragraphs(train, heldout)
    train = take(train, share(sizes_of(train), int(config.train_mb * 1e6)))
    budget = int(config.heldout_mb * 1e6)
    heldout = take(heldout, proportional(sizes_of(train), sizes_of(heldout), budget))
    for name, part in (("train", train), ("heldout", heldout)):
        write_jsonl(config.output / f"{name}.jsonl", part)
    tokenizer = train_tokenizer([d.text for d in train], config.vocab_size)
    save_tokenizer(tokenizer, config.output / "tokenizer")
    summary = {
        "config": asked,
        "vocab_size": tokenizer.get_vocab_size(),
        "train": statistics(train),
        "heldout": statistics(heldout),
        "train_hash": hash_file(config.output / "train.jsonl"),
        "heldout_hash": hash_file(config.output / "heldout.jsonl"),
    }
    write_json(config.output / "corpus.json", summary)
    print_json(summary)


def _finished(path: Path, asked: Mapping[str, object], *, overwrite: bool) -> bool:
    """Whether the same corpus is there; another one is refused, or (`overwrite`) declared gone."""
    if not path.exists():
        return False
    made = read_json(path).get("config")
    if made == asked and not overwrite:
        get_logger().info("%s: already built with these settings", path.parent)
        return True
    if not overwrite:
        raise ConfigError(
            f"{path.parent} holds a corpus built with {made}, not {asked}: "
            "choose another --output, or pass --overwrite"
        )
    path.unlink()
    return False


def stdlib_documents() -> Iterator[Document]:
    """All documents of this interpreter's standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(name for name in inner if name not in _SKIP and "config-" not in name)
        for name in sorted(files):
            path = Path(folder) / name
            relative = path.relative_to(root)
            if path.suffix == ".py":
                yield from module_documents(path, relative)
            elif path.suffix in (".txt", ".rst") and not _TESTS & set(relative.parts):
                source = relative.as_posix()
                text = path.read_text(encoding="utf-8", errors="replace")
                yield Document(text=text, domain="text", source=source, group=source)
    yield from topic_documents()


def topic_documents() -> Iterator[Document]:
    """The texts behind ``help("topic")``, the longest first.

    Many are a section of a longer one: those that mostly repeat what came before are left out.
    """
    seen: set[str] = set()
    for name in sorted(topics, key=lambda topic: (-len(topics[topic]), topic)):
        own = paragraphs(topics[name])
        if 2 * len(own & seen) <= len(own):
            seen |= own
            yield Document(text=topics[name], domain="topic", source=f"topic/{name}", group=name)


def module_documents(path: Path, relative: Path) -> Iterator[Document]:
    """The source of one module without its docstrings, and the docstrings; nothing if unparsable.

    The test-suite holds files that are wrong on purpose (bad syntax, bad encoding).
    """
    try:
        with tokenize.open(path) as file, warnings.catch_warnings(action="ignore"):
            code, prose = strip_docstrings(file.read(), relative.with_suffix("").as_posix())
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    source, group = relative.as_posix(), module_group(relative)
    domain = "test" if _TESTS & set(relative.parts[:-1]) else "code"
    if code.strip():
        yield Document(text=code, domain=domain, source=source, group=group)
    if prose:
        yield Document(text=prose, domain="docstring", source=source, group=group)


def strip_docstrings(source: str, module: str) -> tuple[str, str]:
    """Split a module into its source without docstrings (comments stay) and their prose.

    A docstring that is a whole body becomes ``pass``. Raises SyntaxError where either the source
    or what is left of it does not parse.
    """
    lines = source.encode().splitlines(keepends=True)
    found = sorted(_docstrings(ast.parse(source), module), key=lambda item: item.node.lineno)
    patched = [_cut(lines, item) for item in reversed(found)]
    code = b"".join(lines).decode().strip("\n") + "\n"
    if any(patched):
        ast.parse(code)
    prose = "\n\n".join(f"{item.owner}\n\n{inspect.cleandoc(item.text)}" for item in found)
    return code, prose + "\n" if prose else ""


def _docstrings(tree: ast.AST, name: str) -> Iterator[_Docstring]:
    """All docstrings below `tree`; it looks into statements only."""
    if isinstance(tree, _DOCUMENTED) and tree.body and isinstance(tree.body[0], ast.Expr):
        first = tree.body[0].value
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield _Docstring(first, first.value, name.replace("/", "."), len(tree.body) == 1)
    for block in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(tree, block, ()):
            inner = f"{name}.{child.name}" if isinstance(child, _DOCUMENTED[1:]) else name
            yield from _docstrings(child, inner)


def _cut(lines: list[bytes], docstring: _Docstring) -> bool:
    """Remove the docstring's lines, but not a comment behind it.

    Where other code is on them, ``pass`` takes its place; True then: that needs to be checked.
    """
    node = docstring.node
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
    if docstring.alone or before.strip() or after.lstrip()[:1] not in (b"", b"#"):
        lines[first : last + 1] = [before + b"pass" + after]
        return True
    lines[first : last + 1] = [before + after.lstrip()] if after.strip() else []
    return False


def module_group(relative: Path) -> str:
    """What a module is held out with: ``json/encoder.py`` and ``test/test_json/x.py``: ``json``."""
    parts = relative.with_suffix("").parts
    at = 1 if parts[0] == "test" and len(parts) > 1 else 0
    return parts[at].removeprefix("test_").lstrip("_")


def is_heldout(group: str, fraction: float) -> bool:
    """Whether a group is in the held-out share; decided by its name alone."""
    return _order(group) < fraction * 2**64


def _order(name: str) -> int:
    """A fixed pseudo-random 64-bit number of a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def paragraphs(text: str) -> set[str]:
    """The long paragraphs of a text; short ones (``import sys``) are everybody's."""
    return {p.strip() for p in _PARAGRAPH.split(text) if len(p.strip()) >= _LONG}


def without_shared_paragraphs(
    train: Sequence[Document], heldout: Sequence[Document]
) -> list[Document]:
    """The training documents without any long paragraph that a held-out document has, too."""
    forbidden: set[str] = set().union(*(paragraphs(d.text) for d in heldout))
    kept = []
    for document in train:
        text = document.text
        if not forbidden.isdisjoint(paragraphs(text)):
            parts = [p for p in _PARAGRAPH.split(text) if p.strip() not in forbidden]
            text = "\n\n".join(parts)
        if text.strip():
            kept.append(replace(document, text=text))
    return kept


def sizes_of(documents: Sequence[Document]) -> dict[str, int]:
    """Bytes of each domain."""
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.domain] += document.size
    return dict(sizes)


def take(documents: Sequence[Document], budgets: Mapping[str, int]) -> list[Document]:
    """Documents in shuffled order, of each domain at most its budget of bytes."""
    left = dict(budgets)
    kept = []
    for document in sorted(documents, key=lambda d: (_order(f"{d.domain}:{d.source}"), d.source)):
        if document.size <= left.get(document.domain, 0):
            left[document.domain] -= document.size
            kept.append(document)
    return kept


def share(sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Divide a budget of bytes (0: all there is) equally over domains.

    What a small domain leaves goes to the rest.
    """
    budget = budget or sum(sizes.values())
    shares: dict[str, int] = {}
    for done, (domain, size) in enumerate(sorted(sizes.items(), key=lambda item: item[1])):
        shares[domain] = min(size, (budget - sum(shares.values())) // (len(sizes) - done))
    return shares


def proportional(like: Mapping[str, int], sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Divide a budget over domains in the proportions of `like`; 0: as much as `sizes` allow."""
    if not budget:
        both = [name for name in like if like[name] and sizes.get(name)]
        budget = int(min(sizes[name] / like[name] for name in both) * sum(like.values()))
    return {name: budget * size // sum(like.values()) for name, size in like.items()}


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries; id 0 is the separator."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face tokenizer folder."""
    with atomic_file(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str().encode())
    names = {"eos_token": EOD, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", names)


def write_jsonl(path: Path, documents: Sequence[Document]) -> None:
    """One JSON object a line: text, domain, source."""
    with atomic_file(path) as file:
        for document in documents:
            record = {
                "text": document.text,
                "domain": document.domain,
                "source": document.source,
            }
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def statistics(documents: Sequence[Document]) -> dict[str, dict[str, int]]:
    """Documents and bytes, in all and by domain."""
    names = ["all", *sorted({d.domain for d in documents})]
    parts = {name: [d for d in documents if name in ("all", d.domain)] for name in names}
    return {
        name: {"documents": len(part), "bytes": sum(d.size for d in part)}
        for name, part in parts.items()
    }


def main() -> int:
    """Parse the flags and build."""
    setup_logging()
    try:
        run(parse_flags(Config, sys.argv[1:], prog="build_corpus"))
    except MiniPLMError as error:
        get_logger().error("build_corpus: %s: %s", type(error).__name__, error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
