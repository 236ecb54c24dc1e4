"""The native scanner finds in a line what orjson finds there, or leaves the line to it."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_miniplm._C import RecordReader

TEXTS = st.text() | st.text('a"\\/\b\f\n\r\t\0\x1f\x7f éß中🙂﻿\u2028', max_size=40)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=8
)
KEYS = st.sampled_from(["text", "domain", "meta", "set", "meta.set", "x", "é"])
RECORDS = st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=3))


def found(line: bytes, text_key: str = "text", domain_key: str | None = None) -> Any:
    """(text, domain) of the one line; None if it is left to a complete parser."""
    texts, domains, unusual, empty, records, lines = RecordReader(text_key, domain_key).read(line)
    assert (records, lines) == (1, 1)
    assert len(texts) + len(unusual) + empty == 1
    if unusual:
        assert unusual == [(0, 0, line)]
        return None
    return (texts[0] if texts else ""), (domains[0] if domains else None)


def lookup(record: Any, path: str) -> Any:
    for name in [path] if path in record else path.split("."):
        record = record[name]
    return record


def agree(line: bytes, text_key: str, domain_key: str | None) -> bool:
    """Whether what is found is what orjson finds; True for lines that are left to it."""
    scanned = found(line, text_key, domain_key)
    if scanned is None:
        return True
    record = orjson.loads(line)
    text, domain = scanned
    same_text = type(lookup(record, text_key)) is str and lookup(record, text_key) == text
    if not text or domain_key is None:
        return same_text
    return same_text and lookup(record, domain_key) == domain != ""


@given(RECORDS, st.sampled_from([None, "domain", "meta.set", "text"]), st.booleans())
def test_it_never_finds_what_orjson_does_not(
    record: dict[str, Any], domain_key: str | None, escaped: bool
) -> None:
    line = json.dumps(record, ensure_ascii=escaped).encode()
    assert agree(line, "text", domain_key)


@given(TEXTS, TEXTS, VALUES, st.booleans(), st.sampled_from(["", " ", "\t\r "]))
def test_ordinary_records_are_all_read_here(
    text: str, domain: str, other: Any, escaped: bool, space: str
) -> None:
    record = {"id": "é-1", "n": -12.5, "text": text, "meta": {"a": [1, {}], "set": domain + "d"}}
    line = json.dumps(record, ensure_ascii=escaped, indent=None).encode()
    line = space.encode() + line.replace(b": ", f"{space}:{space}".encode()) + space.encode()
    if b": " in json.dumps([text, domain]).encode():  # it was in a string, too
        line = json.dumps(record, ensure_ascii=escaped).encode()
    assert found(line, "text", "meta.set") == (text, domain + "d" if text else None)


@given(st.binary(max_size=60) | st.text().map(str.encode), st.data())
def test_damaged_lines_are_found_as_orjson_finds_them_or_left(
    noise: bytes, data: st.DataObject
) -> None:
    line = b'{"domain": "web", "text": "one \\u00e9 two \xc3\xa9", "n": [1, 2.5, true, null]}'
    at = data.draw(st.integers(0, len(line)))
    cut = data.draw(st.integers(0, 3))
    damaged = (line[:at] + noise + line[at + cut :]).replace(b"\n", b"")
    if damaged and not damaged.isspace():
        assert agree(damaged, "text", "domain")


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "text": "b"}',
        b'{"te\\u0078t": "a"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": "a\tb"}',
        b'{"text": 1}',
        b'{"text": "a"} x',
        b'{"text": "a",}',
        b'{"text": "a", "n": 01}',
        b'{"text": "a", "n": 1e999}',
        b'{"text": "a", "n": 123456789012345678901}',
        b'{"text": "a", "x": "\xff"}',
        b'{"text": "a", "\xff": 1}',
        b'{"text": "a", "x": "\\q"}',
        b'{"text": "a", "x": "\xed\xa0\x80"}',
        b'{"text": "a", "x": "\xe0\x80\x80"}',
        b'{"text": "a", "x": "\xf4\x90\x80\x80"}',
        b'["text"]',
        b'{"other": "a"}',
        b'{"text": "a"',
        b'{"text": "a", "x": ' + b"[" * 200 + b"]" * 200 + b"}",
    ],
)
def test_unusual_lines_are_left_to_a_complete_parser(line: bytes) -> None:
    assert found(line) is None


def test_keys_with_dots_are_names_where_there_is_such_a_name() -> None:
    assert found(b'{"text": "a", "meta": {"set": "b"}}', "text", "meta.set") == ("a", "b")
    both = b'{"text": "a", "meta": {"set": "b"}, "meta.set": "c"}'
    assert found(both, "text", "meta.set") is None
    again = b'{"text": "a", "meta": {"set": "b"}, "meta": {}}'
    assert found(again, "text", "meta.set") is None


def test_lines_are_counted_and_unusual_ones_keep_their_place() -> None:
    block = b'{"text": "a"}\n\n{"text": ""}\r\n{"text": 3}\n \t\n{"text": "b"}'
    texts, domains, unusual, empty, records, lines = RecordReader("text", None).read(block)
    assert (texts, domains, empty, records, lines) == (["a", "b"], [], 1, 4, 6)
    assert unusual == [(1, 3, b'{"text": 3}')]


def test_equal_domains_are_one_string() -> None:
    line = b'{"text": "a", "d": "web"}\n'
    _, domains, *_ = RecordReader("text", "d").read(line + line)
    assert domains[0] is domains[1]
