"""A module that is named at the top of a file and runs when it is first used."""

from __future__ import annotations

import sys

import pytest

from megatron_miniplm.core.lazy import lazy_module


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Name of a module that notes when it runs."""
    name = f"lazily_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("import sys\nsys.flags_of_the_test.append(1)\nvalue = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "flags_of_the_test", [], raising=False)
    yield name
    sys.modules.pop(name, None)


def test_its_body_runs_once_and_only_when_something_of_it_is_read(written):
    module = lazy_module(written)
    assert not sys.flags_of_the_test
    assert module.value == 7
    assert lazy_module(written).value == 7
    assert sys.flags_of_the_test == [1]


def test_an_import_statement_gets_the_same_module(written):
    module = lazy_module(written)
    assert __import__(written) is module
    assert module.value == 7


def test_a_missing_library_is_named_where_the_module_is_used(tmp_path, monkeypatch):
    (tmp_path / "lazily_broken.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = lazy_module("lazily_broken")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        module.value  # noqa: B018
    sys.modules.pop("lazily_broken", None)
