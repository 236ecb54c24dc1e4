"""The embedded corpus: docstrings out, nothing held out is trained on, the same bytes again."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from megatron_miniplm.core.errors import ConfigError

PROJECT = Path(__file__).resolve().parents[2]
STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "build_corpus", PROJECT / "tools" / "build_corpus.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_corpus"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def documents(tool: ModuleType) -> list:
    """All of the standard library except its slow bulk, the test-suite; plus four test modules."""
    found = list(tool.topic_documents())
    names = [*STDLIB.glob("*.py"), *STDLIB.glob("json/*.py"), *STDLIB.glob("test/test_b*.py")]
    for path in sorted(names):
        found += tool.module_documents(path, path.relative_to(STDLIB))
    return found


@pytest.fixture(scope="module")
def small(tool: ModuleType, documents: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of half a megabyte, built by the tool from `documents`."""
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "stdlib_documents", lambda: iter(documents))
        tool.run(tool.Config(output=folder / "a", vocab_size=400, train_mb=0.5))
        tool.run(tool.Config(output=folder / "b", vocab_size=400, train_mb=0.5))
    return folder


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


SOURCE = '''"""Module text."""  # why
import os
# a comment

class A:
    """Only a docstring."""

class B: "one line"; x = 1

def f():
    r"""Raw.

        Indented.
    """
    def g():
        \'\'\'Inner, with "quotes" and \u00e4\u00f6\u00fc.\'\'\'
        return """not a docstring"""
    if os:
        async def h(): """Async."""
    else:
        def i():
            "Else."; return 1
    x = "also not"; return g
'''


def without_docstrings(tree: ast.Module) -> ast.Module:
    """The same syntax tree with every docstring gone: the independent statement of stripping."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        owner = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if owner and body and ast.get_docstring(node, clean=False) is not None:
            node.body = body[1:]
        if owner and len(node.body) > 0 and isinstance(node.body[0], ast.Pass):
            node.body = node.body[1:]
    return tree


def test_stripping_keeps_comments_layout_and_other_strings_and_collects_the_prose(tool):
    code, prose = tool.strip_docstrings(SOURCE, "pkg/mod")
    assert "# why" in code
    assert "# a comment\n\nclass A:\n    pass\n" in code
    assert "class B: pass; x = 1\n" in code
    assert "            pass; return 1\n" in code
    assert 'return """not a docstring"""' in code
    assert "def f():\n    def g():\n        return" in code
    assert prose == (
        "pkg.mod\n\nModule text.\n\npkg.mod.A\n\nOnly a docstring.\n\npkg.mod.B\n\none line\n\n"
        "pkg.mod.f\n\nRaw.\n\nIndented.\n\npkg.mod.f.g\n\n"
        'Inner, with "quotes" and \u00e4\u00f6\u00fc.\n\npkg.mod.f.h\n\nAsync.\n\n'
        "pkg.mod.f.i\n\nElse.\n"
    )


def test_stripped_standard_library_is_the_same_program_without_docstrings(tool):
    paths = sorted([*STDLIB.glob("[a-k]*.py"), *STDLIB.glob("asyncio/*.py")])
    assert len(paths) > 60
    for path in paths:
        source = path.read_text(encoding="utf-8")
        code, _ = tool.strip_docstrings(source, path.stem)
        expected = without_docstrings(ast.parse(source))
        assert ast.dump(without_docstrings(ast.parse(code))) == ast.dump(expected), path


def test_no_docstring_is_left_in_a_source_and_every_one_is_in_the_prose(tool):
    source = (STDLIB / "bisect.py").read_text()
    code, prose = tool.strip_docstrings(source, "bisect")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            first = ast.get_docstring(node).split("\n")[0]
            assert first in prose
            assert first not in code


def test_unparsable_source_and_a_cut_that_would_not_parse_give_no_document(tool, tmp_path):
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "paren.py").write_text('def f():\n    ("""In parentheses.""")\n    return 1\n')
    (tmp_path / "open.py").write_text('def f():\n    ("In parentheses."\n    )\n    return 1\n')
    for name in ("bad.py", "latin.py", "paren.py", "open.py"):
        assert list(tool.module_documents(tmp_path / name, Path(name))) == []


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("json/encoder.py", "json"),
        ("test/test_json/test_dump.py", "json"),
        ("bisect.py", "bisect"),
        ("_bisect.py", "bisect"),
        ("test/test_bisect.py", "bisect"),
        ("test/support/__init__.py", "support"),
    ],
)
def test_a_module_and_its_tests_are_held_out_together(tool, path: str, group: str):
    assert tool.module_group(Path(path)) == group


def test_no_group_is_in_both_parts_and_no_long_paragraph_either(tool, small: Path, documents: list):
    group = {(d.domain, d.source): d.group for d in documents}
    train, heldout = (records(small / "a" / f"{name}.jsonl") for name in ("train", "heldout"))
    assert train
    assert heldout
    groups = [{group[r["domain"], r["source"]] for r in part} for part in (train, heldout)]
    assert groups[0].isdisjoint(groups[1])
    long = [set().union(*(tool.paragraphs(r["text"]) for r in part)) for part in (train, heldout)]
    assert min(map(len, long)) > 50
    assert long[0].isdisjoint(long[1])


def test_shared_paragraphs_leave_the_training_part_only_and_the_rest_stays(tool):
    long, own = "shared " * 20, "own " * 30
    doc = tool.Document(text=f"{own}\n\n{long}\n\nshort", domain="d", source="s", group="g")
    held = tool.Document(text=f"{long}\n\nshort", domain="d", source="t", group="h")
    (kept,) = tool.without_shared_paragraphs([doc], [held])
    assert kept.text == f"{own}\n\nshort"
    whole = tool.Document(text=long, domain="d", source="u", group="i")
    assert tool.without_shared_paragraphs([whole], [held]) == []
    assert tool.without_shared_paragraphs([whole], [doc]) == []
    assert tool.without_shared_paragraphs([doc], []) == [doc]


def test_heldout_share_is_near_the_asked_fraction(tool):
    names = [f"module{n}" for n in range(4000)]
    assert sum(tool.is_heldout(name, 0.08) for name in names) / 4000 == pytest.approx(
        0.08, abs=0.02
    )


def test_what_is_held_out_is_decided_by_the_name_alone_on_every_machine(tool):
    names = ["bisect", "heapq", "struct", "json", "os", "re"]
    assert [tool.is_heldout(name, 0.08) for name in names] == [True] * 3 + [False] * 3


def test_no_topic_mostly_repeats_the_longer_ones_before_it(tool):
    kept = list(tool.topic_documents())
    seen: set[str] = set()
    for document in kept:
        own = tool.paragraphs(document.text)
        assert len(own & seen) <= len(own) / 2, document.source
        seen |= own
    assert 30 < len(kept) < len(tool.topics)
    assert max(map(len, tool.topics.values())) == len(kept[0].text)


def test_budget_gives_small_domains_all_they_have_and_the_rest_to_large_ones(tool):
    assert tool.share({"a": 10, "b": 400, "c": 500}, 300) == {"a": 10, "b": 145, "c": 145}
    assert tool.share({"a": 10, "b": 20}, 300) == {"a": 10, "b": 20}
    assert tool.share({"a": 10, "b": 20}, 0) == {"a": 10, "b": 20}


def test_heldout_budget_follows_the_proportions_of_the_training_part(tool):
    like = {"a": 30, "b": 10}
    assert tool.proportional(like, {"a": 500, "b": 500}, 80) == {"a": 60, "b": 20}
    assert tool.proportional(like, {"a": 60, "b": 500, "c": 9}, 0) == {"a": 60, "b": 20}
    assert tool.proportional(like, {"b": 15}, 0) == {"a": 45, "b": 15}


def test_same_interpreter_gives_the_same_bytes_and_the_budget_is_kept(small: Path):
    for name in ("train.jsonl", "heldout.jsonl", "tokenizer/tokenizer.json", "corpus.json"):
        assert (small / "a" / name).read_bytes() == (small / "b" / name).read_bytes(), name
    sizes = json.loads((small / "a/corpus.json").read_text())["train"]
    assert 300_000 < sizes["all"]["bytes"] <= 500_000
    assert {"code", "docstring", "topic", "test"} <= sizes.keys()
    size = sum(len(r["text"].encode()) for r in records(small / "a/train.jsonl"))
    assert sizes["all"]["bytes"] == size


def test_tokenizer_round_trips_any_bytes_and_has_the_separator(small: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(small / "a/tokenizer"))
    text = "def f(x):\n\treturn '\u00e4\U0001f600\x00' # <tag>\r\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer) == 400
    assert tokenizer.eos_token_id == 0
    assert tokenizer.eos_token == "<|endoftext|>"


def test_finished_corpus_is_kept_and_one_with_other_settings_refused(tool, small: Path):
    before = (small / "a/corpus.json").stat().st_mtime_ns
    tool.run(tool.Config(output=small / "a", vocab_size=400, train_mb=0.5))
    assert (small / "a/corpus.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="--overwrite"):
        tool.run(tool.Config(output=small / "a", vocab_size=300, train_mb=0.5))


@pytest.mark.parametrize("bad", [{"vocab_size": 256}, {"heldout_fraction": 1.0}, {"train_mb": -1}])
def test_settings_that_cannot_work_are_refused(tool, tmp_path: Path, bad: dict):
    with pytest.raises(ConfigError, match="--"):
        tool.Config(output=tmp_path, **bad)
