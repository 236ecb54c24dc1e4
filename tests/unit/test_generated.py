"""Corpora that a model continued: prompts, windows on disk, and what is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.generated import GenerationWriter, ShortInstances, prompt_lengths
from megatron_miniplm.data.instances import PADDING_ROW, make_batch, training_mask
from megatron_miniplm.data.journal import Journal
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.data.verify import verify
from tests.small_artifacts import SEQ_LENGTH, flip_byte, random_instances, visible, write_corpus

IDENTITY = {"model": "m", "seed": 1}


class Small(GenerationWriter):
    window = 16


@pytest.fixture
def source(tmp_path: Path, tiny_tokenizer: Path) -> Corpus:
    return write_corpus(tmp_path / "source", tiny_tokenizer, random_instances(40))


def open_writer(
    source: Corpus, prefix: Path, *, overwrite: bool = False, prompt_length: int = 8,
    short: ShortInstances = "fraction", **identity,
) -> Small:  # fmt: skip
    return Small(
        prefix, source=source, prompt_length=prompt_length, short_instances=short,
        identity={**IDENTITY, **identity},
        parents={"source": source.as_parent(prefix.with_name("made.json"))},
        instances_per_shard=25, overwrite=overwrite,
    )  # fmt: skip


def continued(source: Corpus, writer: Small, row: int) -> np.ndarray:
    """The prompt, and some of a token that tells rows apart."""
    prompt, rest = source.tokens(row)[: writer.prompts[row]], max(1, row % 4)
    return np.append(prompt, np.full(min(rest, source.lengths[row] - len(prompt)), 100 + row))


def fill(source: Corpus, writer: Small) -> None:
    for number in writer.todo():
        rows = writer.rows(number)
        writer.write_window(number, [continued(source, writer, int(row)) for row in rows])


def finish(source: Corpus, writer: Small) -> Corpus:
    fill(source, writer)
    assert writer.finish()
    return Corpus.open(writer.prefix)


def test_prompts_of_short_instances_follow_the_rule():
    lengths = np.array([1025, 769, 768, 767, 5, 4, 2], np.int32)
    found = prompt_lengths(lengths, 768, "fraction")
    assert found.tolist() == [768, 768, 576, 575, 3, 3, 1]
    assert prompt_lengths(lengths, 768, "copy").tolist() == [768, 768, 768, 767, 5, 4, 2]
    assert (found < lengths).all(), "something is left to write"


@pytest.mark.parametrize("short", ["fraction", "copy"])
@pytest.mark.parametrize("prompt_length", [8, SEQ_LENGTH + 1, 768])
def test_instances_that_are_not_longer_than_a_prompt_are_counted(
    prompt_length: int, short: ShortInstances, source: Corpus, tmp_path: Path
):
    writer = open_writer(source, tmp_path / "made", prompt_length=prompt_length, short=short)
    made = finish(source, writer)
    expected = int((source.lengths <= prompt_length).sum())
    assert expected == 40 or 0 < expected < 40 == len(made)
    assert made.manifest.content["statistics"]["short_instances"] == expected


def test_rows_keep_order_domain_and_prompt(source: Corpus, tmp_path: Path):
    writer = open_writer(source, tmp_path / "made")
    made = finish(source, writer)
    assert len(made) == len(source)
    assert np.array_equal(made.domains, source.domains)
    for row in range(len(made)):
        assert np.array_equal(made.tokens(row), continued(source, writer, row))
        assert made.prompt_length(row) == writer.prompts[row]
    counts = made.manifest.content["statistics"]
    assert counts["prompt_tokens"] + counts["generated_tokens"] == made.num_tokens
    assert made.manifest.parents["source"].fingerprint == source.fingerprint
    assert verify(made.prefix) == []
    assert not [name for name in visible(tmp_path) if name.startswith(".")]


def test_what_was_written_is_not_asked_for_again(source: Corpus, tmp_path: Path):
    whole = finish(source, open_writer(source, tmp_path / "whole"))
    first = open_writer(source, tmp_path / "made")
    rows = first.rows(1)
    first.write_window(1, [continued(source, first, int(row)) for row in rows])
    again = open_writer(source, tmp_path / "made")
    assert again.todo() == [0, 2]
    assert (again.todo((0, 2)), again.todo((1, 2))) == ([0, 2], [])
    assert not again.finish()
    assert not (tmp_path / "made.json").exists()
    assert finish(source, again).fingerprint == whole.fingerprint
    done = open_writer(source, tmp_path / "made")
    assert done.finished
    assert done.todo() == []


def test_another_job_does_not_continue_it(source: Corpus, tmp_path: Path):
    writer = open_writer(source, tmp_path / "made")
    with pytest.raises(LineageError, match="seed is 1 there and 2 here"):
        open_writer(source, tmp_path / "made", seed=2)
    finish(source, writer)
    with pytest.raises(ConfigError, match="--overwrite"):
        open_writer(source, tmp_path / "made", seed=2)
    assert open_writer(source, tmp_path / "made", seed=2, overwrite=True).todo() == [0, 1, 2]
    assert Corpus.open(tmp_path / "made"), "the old one is there until the new one is"


def test_a_job_that_wakes_up_after_the_corpus_was_made_leaves_nothing_for_the_next(
    source: Corpus, tmp_path: Path
):
    asleep, journal = open_writer(source, tmp_path / "made"), tmp_path / ".made.generated"
    made = finish(source, open_writer(source, tmp_path / "made"))
    rows = asleep.rows(1)
    late = [continued(source, asleep, int(row)) for row in rows]
    asleep.write_window(1, late)
    assert not journal.exists()
    assert Corpus.open(made.prefix).fingerprint == made.fingerprint
    # One that writes while the folder is taken away may still make it anew.
    Journal(journal).write("00000001", b"of nobody")
    assert open_writer(source, tmp_path / "made", seed=2, overwrite=True).todo() == [0, 1, 2]


def test_damaged_window_is_removed_and_named(source: Corpus, tmp_path: Path):
    writer = open_writer(source, tmp_path / "made")
    fill(source, writer)
    flip_byte(tmp_path / ".made.generated" / "00000001.window", 90)
    with pytest.raises(DataError, match="was removed"):
        writer.finish()
    assert writer.todo() == [1]
    assert not (tmp_path / "made.json").exists()


def test_prompts_belong_to_the_fingerprint(source: Corpus, tmp_path: Path):
    made = finish(source, open_writer(source, tmp_path / "made"))
    flip_byte(tmp_path / "made.prompt_len.npy", 140)
    with pytest.raises(DataError, match="changed since"):
        made.prompt_length(0)


def test_mask_of_a_continuation_starts_at_its_first_token_as_a_label():
    tokens = torch.tensor([[5, 6, 7, 0, 8, 9]])
    count = torch.tensor([5])

    def mask(first: int) -> list[int]:
        return (
            training_mask(tokens, count, eod_id=0, first_label_b=torch.tensor([first]))[0]
            .int()
            .tolist()
        )

    assert mask(1) == [1, 1, 1, 0, 1, 0]
    assert mask(3) == [0, 0, 1, 0, 1, 0]
    assert mask(4) == [0, 0, 0, 0, 1, 0]
    assert mask(6) == [0] * 6


@pytest.mark.parametrize("of_subset", [False, True])
def test_loss_on_continuation_counts_what_was_generated(
    of_subset: bool, source: Corpus, tmp_path: Path
):
    made = finish(source, open_writer(source, tmp_path / "made"))
    prefix = made.prefix
    if of_subset:
        prefix = tmp_path / "some"
        write_subset(made, np.arange(3, 40, 3), prefix, config={}, selection={})
    blend = Blend.open([str(prefix)], seed=1, loss_on="continuation")
    rows = np.arange(len(blend))
    batch = make_batch(blend, [*rows, PADDING_ROW], length=SEQ_LENGTH)
    opened = Corpus.open(prefix)
    for row, mask in zip(rows.tolist(), batch.mask_bs[:-1], strict=True):
        tokens = opened.tokens(row)
        expected = [
            at for at in range(opened.prompt_length(row), len(tokens))
            if tokens[at - 1] != opened.eod_id
        ]  # fmt: skip
        assert (mask.nonzero()[:, 0] + 1).tolist() == expected
    whole = Blend.open([str(prefix)], seed=1)
    everything = make_batch(whole, [*rows, PADDING_ROW], length=SEQ_LENGTH)
    assert everything.mask_bs.sum() > batch.mask_bs.sum() > 0
    assert torch.equal(blend.whole_mask(batch), everything.mask_bs)
    assert torch.equal(whole.whole_mask(everything), everything.mask_bs)


def test_loss_on_continuation_refuses_a_corpus_without_one(source: Corpus):
    with pytest.raises(ConfigError, match="was not generated"):
        Blend.open([str(source.prefix)], seed=1, loss_on="continuation")
