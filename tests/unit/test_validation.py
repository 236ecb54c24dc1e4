"""Validation sets by name: which are given, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.training.validation import open_validation_sets
from tests.small_artifacts import random_instances, write_corpus


@pytest.fixture
def held_out(tmp_path: Path, tiny_tokenizer: Path) -> Corpus:
    return write_corpus(tmp_path / "lr=3" / "held-out", tiny_tokenizer, random_instances(9))


def test_one_set_may_have_no_name_and_a_path_may_have_an_equals_sign(held_out: Corpus) -> None:
    prefix = str(held_out.prefix)
    sets = open_validation_sets([prefix, f"code={prefix}"], held_out)
    assert list(sets) == ["", "code"]
    assert {corpus.fingerprint for corpus in sets.values()} == {held_out.fingerprint}
    assert open_validation_sets([], held_out) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=X", "a=X"], "two sets of the name a"),
        (["X", "X"], "two sets of no name"),
        (["=x"], "give NAME=PREFIX"),
        (["a="], "give NAME=PREFIX"),
    ],
)
def test_names_that_say_nothing_are_refused(
    words: list[str], message: str, held_out: Corpus
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_validation_sets([w.replace("X", str(held_out.prefix)) for w in words], held_out)
