"""Packing: hand-made examples, a literal second implementation on real text, and its invariants."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import event, given, settings
from hypothesis import strategies as st

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.data.packing import EndTable, Packed, Packer, PackingConfig
from megatron_miniplm.data.packing_reference import ReferencePacker
from megatron_miniplm.data.tokenizers import load_tokenizer

EOD = 0

# ------------------------------------------------------------------------------------------------
# The second implementation: the rules of data/packing.py, word by word, on lists and decoded texts.


def naive_end_tokens(texts: Sequence[str], eod: int) -> set[int]:
    found = {eod}
    for token, text in enumerate(texts):
        has_end = any(end in text for end in [".", "!", "?", ";", "\n"])
        unmatched = any(
            left in text and right not in text
            for left, right in [("[", "]"), ("(", ")"), ("{", "}"), ("<", ">")]
        )
        if has_end and not unmatched:
            found.add(token)
    return found


def naive_pack(
    documents: Sequence[tuple[int, list[int]]],
    decode: Callable[[list[int]], str],
    end_tokens: set[int],
    *,
    eod: int,
    max_length: int,
) -> list[tuple[int, list[int]]]:
    pairs: dict[tuple[int, ...], bool] = {}

    def pair_has_space(tokens: list[int]) -> bool:
        key = tuple(tokens)
        if key not in pairs:
            pairs[key] = " " in decode(tokens)
        return pairs[key]

    buffers: dict[int, list[int]] = {}
    instances = []
    for domain, document in documents:
        buf = buffers.get(domain, []) + document
        chunks = 0
        while len(buf) >= max_length:
            c, buf = buf[:max_length], buf[max_length:]
            for i in range(max_length - 1, -1, -1):
                following = (c + buf[:1])[i + 1 : i + 2]
                if (
                    c[i] == eod
                    or (c[i] in end_tokens and "\n" in decode([c[i]]))
                    or (
                        c[i] in end_tokens
                        and (not following or pair_has_space([c[i], following[0]]))
                    )
                ):
                    buf = c[i + 1 :] + buf
                    c = c[: i + 1]
                    break
            if len(c) <= 1:
                continue
            chunks += 1
            if chunks > 2000:
                buf = []
                break
            if any(token != eod for token in c[:-1]):  # section 4: never an empty loss mask
                instances.append((domain, c))
        buffers[domain] = buf
    return instances


def pack(
    documents: Sequence[tuple[int, list[int]]], table: EndTable, *, seq_length: int, **options: int
) -> tuple[list[tuple[int, list[int]]], Packer]:
    """Instances in the form that `naive_pack` returns, tails last; one document a call."""
    packer = Packer(table, seq_length=seq_length, **options)
    instances = []
    for document in documents:
        instances += listed(packer.add(*flat([document])))
    return [*instances, *listed(packer.finish())], packer


def flat(documents: Sequence[tuple[int, list[int]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arguments of `Packer.add`."""
    ids = np.array([at for _, ids in documents for at in ids], np.int32)
    offsets = np.cumsum([0, *(len(ids) for _, ids in documents)], dtype=np.int64)
    return ids, offsets, np.array([domain for domain, _ in documents], np.uint16)


def listed(packed: Packed) -> list[tuple[int, list[int]]]:
    """(domain, ids) of each instance."""
    assert packed.lengths.dtype == np.int32
    assert packed.domains.dtype == np.uint16
    bounds = np.cumsum([0, *packed.lengths])
    assert bounds[-1] == len(packed.tokens)
    pieces = [packed.tokens[a:b].tolist() for a, b in pairwise(bounds)]
    return list(zip(packed.domains.tolist(), pieces, strict=True))


def reference_pack(
    documents: Sequence[tuple[int, list[int]]], table: EndTable, *, seq_length: int, **options: int
) -> tuple[list[tuple[int, list[int]]], ReferencePacker]:
    """The same by the numpy packer."""
    packer = ReferencePacker(table, seq_length=seq_length, **options)
    added = [(domain, packer.add(domain, np.array(ids, np.int32))) for domain, ids in documents]
    instances = []
    for domain, packed in [*added, *packer.finish()]:
        bounds = np.cumsum([0, *packed.lengths])
        instances += [(domain, packed.tokens[a:b].tolist()) for a, b in pairwise(bounds)]
    return instances, packer


# ------------------------------------------------------------------------------------------------
# Real text


def assert_equals_naive(
    folder: Path, records: Sequence[tuple[str, str]], *, seq_length: int
) -> int:
    """Compare both on (domain, text) records; returns the number of instances."""
    tokenizer = load_tokenizer(folder)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def decode(ids: list[int]) -> str:
        return reference.decode(ids, skip_special_tokens=False)

    ids, offsets = tokenizer.encode_flat([text for _, text in records])
    domains: dict[str, int] = {}
    documents = [
        (domains.setdefault(domain, len(domains)), [*ids[a:b].tolist(), tokenizer.eod_id])
        for (domain, _), a, b in zip(records, offsets[:-1], offsets[1:], strict=True)
    ]
    eod = tokenizer.eod_id
    singles = [[token] for token in range(tokenizer.vocab_size)]
    ends = naive_end_tokens(reference.decode_batch(singles, skip_special_tokens=False), eod)
    expected = naive_pack(documents, decode, ends, eod=eod, max_length=seq_length + 1)
    table = EndTable.build(tokenizer.token_bytes(), eod)
    found, packer = pack(documents, table, seq_length=seq_length)
    assert found == expected
    by_numpy, reference = reference_pack(documents, table, seq_length=seq_length)
    assert by_numpy == expected
    assert packer.counters == reference.counters
    return len(expected)


@pytest.fixture(scope="module")
def sample_records(shared_dir: Path) -> list[tuple[str, str]]:
    with lzma.open(shared_dir / "corpus" / "sample20.jsonl.xz") as file:
        records = [json.loads(line) for line in file]
    return [(record["domain"], record["text"]) for record in records]


def stdlib_records(size: int) -> list[tuple[str, str]]:
    """Source files of this interpreter's standard library, at least `size` characters."""
    records: list[tuple[str, str]] = []
    for path in sorted(Path(os.__file__).parent.glob("*/*.py")):
        if "site-packages" not in path.parts:
            records.append((path.parent.name, path.read_text(errors="replace")))
        if sum(len(text) for _, text in records) >= size:
            break
    return records


@pytest.mark.slow
def test_equals_the_literal_algorithm_on_19_mb_of_real_text(
    shared_tokenizers: Path, sample_records: list[tuple[str, str]]
) -> None:
    assert sum(len(text.encode()) for _, text in sample_records) > 19_000_000
    folder = shared_tokenizers / "smollm2_hf"
    count = assert_equals_naive(folder, sample_records, seq_length=1024)
    assert count > 5000


def test_equals_the_literal_algorithm_with_qwens_vocabulary(
    shared_tokenizers: Path, sample_records: list[tuple[str, str]]
) -> None:
    folder = shared_tokenizers / "qwen2.5_hf"
    count = assert_equals_naive(folder, sample_records[:1000], seq_length=1024)
    assert count > 1000


@pytest.mark.parametrize("seq_length", [1024, 33])
def test_equals_the_literal_algorithm_on_python_source(
    tiny_tokenizer: Path, seq_length: int
) -> None:
    records = stdlib_records(600_000)
    assert len({domain for domain, _ in records}) > 1
    count = assert_equals_naive(tiny_tokenizer, records, seq_length=seq_length)
    assert count > 200_000 // seq_length


def test_end_list_of_qwen_differs_from_the_released_one_by_the_brace_fix_only(
    shared_tokenizers: Path,
) -> None:
    # The released list of Qwen1.5 (the same 151,643 BPE tokens) has 8,714 entries. It was made with
    # a four-character entry for braces, so `\` and `{` were taken for a pair of brackets.
    tokenizer = load_tokenizer(shared_tokenizers / "qwen2.5_hf")
    texts = [token.decode(errors="replace") for token in tokenizer.token_bytes()]
    released = {
        at
        for at, text in enumerate(texts)
        if any(end in text for end in ".!?;\n")
        and not any(pair[0] in text and pair[1] not in text for pair in ["[]", "()", "\\{", "<>"])
    } | {tokenizer.eod_id}
    assert len(released) == 8714
    table = EndTable.build(tokenizer.token_bytes(), tokenizer.eod_id)
    ours = set(np.flatnonzero(table.flags & 3).tolist())
    difference = ours ^ released
    assert difference
    assert all("{" in texts[at] or "\\" in texts[at] for at in difference)


# ------------------------------------------------------------------------------------------------
# By hand

# fmt: off
WORDS = [
    "<eod>", "I", " am", " D", ".", "A", " he", " is", "3", "14", "!", " (", ".)", " (see.", " ok.",
    "\n", ";\n", "x", "?", "{.", "{.}", "\\.", " end", ". So",
]
# fmt: on


def word_table() -> EndTable:
    return EndTable.build([word.encode() for word in WORDS], EOD)


def decode_words(ids: list[int]) -> str:
    return "".join(WORDS[token] for token in ids)


def ids_of(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


def pack_words(*documents: str, seq_length: int, **options: bool) -> list[str]:
    """Pack documents written as words with `|` between; instances in the same form."""
    split = [(0, ids_of(*document.split("|"))) for document in documents]
    instances, _ = pack(split, word_table(), seq_length=seq_length, **options)
    return ["|".join(WORDS[token] for token in ids) for _, ids in instances]


def test_end_tokens_by_hand() -> None:
    flags = word_table().flags
    ends = {word for word, flag in zip(WORDS, flags, strict=True) if flag & 3}
    # "{." has an open brace; "\." has none; "(see." has an open bracket.
    assert ends == {"<eod>", ".", "!", ".)", " ok.", "\n", ";\n", "?", "{.}", "\\.", ". So"}


@pytest.mark.parametrize(
    ("document", "seq_length", "expected"),
    [
        # The cut is after the sentence, and what follows starts the next instance.
        pytest.param(
            "I| am|.| he| is|A|x|.| he|<eod>",
            6,
            ["I| am|.", " he| is|A|x|.| he|<eod>"],
            id="sentence end, rest pushed back",
        ),
        pytest.param(
            "x|!| am| D|.|A|.| he| is|<eod>",
            5,
            ["x|!", " am| D|.|A|."],
            id="D.A. is not cut at its first dot",
        ),
        pytest.param(
            "x|!| is|3|.|14|x|<eod>",
            4,
            ["x|!", " is|3|.|14|x"],
            id="3.14 is not cut at its point",
        ),
        pytest.param(
            "x|x|x|.| he| is|A|A|<eod>",
            3,
            ["x|x|x|.", " he| is|A|A"],
            id="the token after the chunk tells whether its last token ends a sentence",
        ),
        pytest.param(
            "x|.| am|.|14|3|A|A|<eod>",
            3,
            ["x|.", " am|.|14|3"],
            id="no space after the chunk's last dot",
        ),
        pytest.param(
            "x|?| am| (see.| he| is|<eod>",
            4,
            ["x|?", " am| (see.| he| is|<eod>"],
            id="an open bracket ends no sentence",
        ),
        pytest.param(
            "x|.| am|.)| he| is|x|x|x|<eod>",
            5,
            ["x|.| am|.)", " he| is|x|x|x|<eod>"],
            id="a closed bracket does",
        ),
        pytest.param(
            "x|\n|x|A|3|<eod>|x|x|x|x",
            3,
            ["x|\n", "x|A|3|<eod>", "x|x|x|x"],
            id="a newline needs no space, the separator neither, no cut takes all",
        ),
        pytest.param(
            "x|.|x|. So|x|x|<eod>",
            4,
            ["x|.|x|. So"],
            id="a space inside the end token counts",
        ),
        pytest.param(
            "x|.| am|.",
            3,
            ["x|.| am|."],
            id="nothing after the last token: it ends",
        ),
    ],
)
def test_packing_by_hand(document: str, seq_length: int, expected: list[str]) -> None:
    assert pack_words(document, seq_length=seq_length) == expected


def test_documents_share_an_instance_and_keep_their_separators() -> None:
    packed = pack_words("I| am|<eod>", " he| is|<eod>", "x|x|x|<eod>", seq_length=5)
    assert packed == ["I| am|<eod>| he| is|<eod>"]


def test_one_token_instances_are_dropped_and_counted() -> None:
    # The only cut is the first token: the other three return to the buffer.
    packed, packer = pack([(0, ids_of("\n", "x", "x", "x", "A"))], word_table(), seq_length=3)
    assert packed == [(0, ids_of("x", "x", "x", "A"))]
    assert packer.counters.dropped_short_tokens == 1
    assert packer.counters.pushed_back_tokens == 3
    assert packer.counters.uncut_instances == 1


def test_instances_that_train_nothing_are_dropped_and_counted() -> None:
    document = ids_of("<eod>", "<eod>", "<eod>", "<eod>", "x", "<eod>", "<eod>", "<eod>")
    packed, packer = pack([(0, document)], word_table(), seq_length=3)
    assert packed == [(0, ids_of("x", "<eod>", "<eod>", "<eod>"))]
    assert packer.counters.dropped_separator_instances == 1
    assert packer.counters.dropped_separator_tokens == 4


def test_tails_are_dropped_or_flushed() -> None:
    documents = ["x|x|x|<eod>", "x|A|<eod>"]
    assert pack_words(*documents, seq_length=3) == ["x|x|x|<eod>"]
    assert pack_words(*documents, seq_length=3, flush_tails=True) == ["x|x|x|<eod>", "x|A|<eod>"]


@pytest.mark.parametrize("tail", [["x"], ["<eod>"], ["<eod>", "<eod>"]])
def test_a_tail_that_trains_nothing_is_not_flushed(tail: list[str]) -> None:
    packed, packer = pack([(0, ids_of(*tail))], word_table(), seq_length=3, flush_tails=True)
    assert packed == []
    counters = packer.counters
    assert counters.dropped_short_tokens + counters.dropped_separator_tokens == len(tail)
    assert counters.flushed_tails == 0


@pytest.mark.parametrize(("chunks", "kept"), [(2000, 2000), (2001, 2000), (2600, 2000)])
def test_a_document_of_more_than_2000_chunks_loses_the_rest(chunks: int, kept: int) -> None:
    runaway = ids_of("A", "x") * chunks + ids_of("A")
    documents = [(0, ids_of("3")), (0, runaway), (0, ids_of("x", "x"))]
    ends = naive_end_tokens(WORDS, EOD)
    expected = naive_pack(documents, decode_words, ends, eod=EOD, max_length=2)
    found, packer = pack(documents, word_table(), seq_length=1)
    assert found == expected
    # The document's first token completes an instance with the buffered "3".
    overlong = chunks + 1 > 2000
    assert packer.counters.overlong_documents == overlong
    assert packer.counters.instances == kept + 1
    assert packer.counters.dropped_overlong_tokens == (2 * (chunks + 1 - 2000) if overlong else 0)


@pytest.mark.parametrize("wrong", [-1, len(WORDS)])
def test_ids_outside_the_vocabulary_are_refused(wrong: int) -> None:
    packer = Packer(word_table(), seq_length=3)
    before = packer.counters
    with pytest.raises(DataError, match=f"{wrong}.* {len(WORDS)} tokens"):
        packer.add(*flat([(0, ids_of("x", "x", "x", "x")), (0, [1, wrong, 2])]))
    assert packer.counters == before


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 4], "offsets up to 4, but 3 ids"),
        ([-1, 3], "document 0 is from -1 to 3"),
        ([0, 2, 1], "document 1 is from 2 to 1"),
        ([0, 2**62], "offsets up to 4611686018427387904"),
        ([], "0 offsets for 1 documents"),
    ],
)
def test_offsets_that_lead_outside_are_refused(offsets: list[int], message: str) -> None:
    packer = Packer(word_table(), seq_length=3)
    domains = np.zeros(max(len(offsets) - 1, 1), np.uint16)
    with pytest.raises(DataError, match=message):
        packer.add(np.ones(3, np.int32), np.array(offsets, np.int64), domains)
    assert packer.counters.tokens_in == 0


def test_arrays_of_other_types_are_refused() -> None:
    packer = Packer(word_table(), seq_length=3)
    ids, offsets, domains = flat([(0, [1, 2, 3])])
    for wrong in [
        (ids.astype(np.int64), offsets, domains),
        (ids, offsets.astype(np.int32), domains),
        (ids, offsets, domains.astype(np.int64)),
        (np.ones(6, np.int32)[::2], offsets, domains),
    ]:
        with pytest.raises(TypeError, match="must be a contiguous one-dimensional"):
            packer.add(*wrong)


def test_options_that_make_no_packer_are_refused() -> None:
    table = word_table()
    for wrong, message in [
        ({"table": EndTable(table.flags, EOD, table.byte_lengths[1:])}, "23 byte lengths"),
        ({"table": EndTable(table.flags, 24)}, "separator 24"),
        ({"seq_length": 0}, "sequence length 0"),
        ({"dtype": np.int64}, "tokens of 8 bytes"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Packer(**{"table": table, "seq_length": 3} | wrong)
    wide = np.zeros(65_537, np.uint16)
    with pytest.raises(ConfigError, match="65537 does not fit tokens of 2 bytes"):
        Packer(EndTable(wide.astype(np.uint8), EOD, wide), seq_length=3, dtype=np.uint16)
    with pytest.raises(DataError, match="token 1 stands for 65536 bytes"):
        EndTable.build([b"", b"x" * 65_536], EOD)


def test_a_sequence_length_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="--seq-length 0"):
        PackingConfig(seq_length=0)


# ------------------------------------------------------------------------------------------------
# Properties

TOKENS = st.integers(1, len(WORDS) - 1) | st.sampled_from(ids_of("x", "A", " am"))
DOCUMENTS = st.lists(
    st.tuples(st.integers(0, 2), st.lists(TOKENS, max_size=30).map(lambda ids: [*ids, EOD])),
    max_size=12,
)
SEQ_LENGTHS = st.integers(1, 9)


def streams(documents: Sequence[tuple[int, list[int]]]) -> dict[int, list[int]]:
    joined: dict[int, list[int]] = {}
    for domain, ids in documents:
        joined.setdefault(domain, []).extend(ids)
    return joined


@given(DOCUMENTS, SEQ_LENGTHS, st.booleans())
def test_equals_the_literal_algorithm_on_any_tokens(
    documents: list[tuple[int, list[int]]], seq_length: int, separated: bool
) -> None:
    documents = [(domain, ids if separated else ids[:-1]) for domain, ids in documents]
    ends = naive_end_tokens(WORDS, EOD)
    expected = naive_pack(documents, decode_words, ends, eod=EOD, max_length=seq_length + 1)
    assert pack(documents, word_table(), seq_length=seq_length)[0] == expected


@given(DOCUMENTS, SEQ_LENGTHS, st.booleans(), st.integers(1, 9))
def test_equals_the_reference_in_tokens_and_counters(
    documents: list[tuple[int, list[int]]], seq_length: int, flush: bool, max_chunks: int
) -> None:
    options = {"seq_length": seq_length, "flush_tails": flush, "max_chunks": max_chunks}
    expected, reference = reference_pack(documents, word_table(), **options)
    found, packer = pack(documents, word_table(), **options)
    assert found == expected
    assert packer.counters == reference.counters


@given(DOCUMENTS, SEQ_LENGTHS, st.data())
def test_any_batches_give_what_single_documents_give(
    documents: list[tuple[int, list[int]]], seq_length: int, data: st.DataObject
) -> None:
    expected, single = pack(documents, word_table(), seq_length=seq_length)
    packer = Packer(word_table(), seq_length=seq_length, dtype=np.uint16)
    found, rest = [], documents
    while rest:
        count = data.draw(st.integers(1, len(rest)))
        found += listed(packer.add(*flat(rest[:count])))
        rest = rest[count:]
    assert [*found, *listed(packer.finish())] == expected
    assert packer.counters == single.counters
    assert packer.text_counters == single.text_counters
    assert packer.domain_counters == single.domain_counters


@given(DOCUMENTS, SEQ_LENGTHS)
def test_the_packer_appends_the_separator_to_documents_that_have_tokens(
    documents: list[tuple[int, list[int]]], seq_length: int
) -> None:
    bare = [(domain, ids[:-1]) for domain, ids in documents]
    expected, _ = pack(
        [(domain, [*ids, EOD]) for domain, ids in bare if ids], word_table(), seq_length=seq_length
    )
    found, packer = pack(bare, word_table(), seq_length=seq_length, append_eod=True)
    assert found == expected
    assert packer.text_counters.documents_without_tokens == sum(not ids for _, ids in bare)


@given(DOCUMENTS, SEQ_LENGTHS, st.booleans())
def test_starts_say_where_instances_lie_in_their_domain(
    documents: list[tuple[int, list[int]]], seq_length: int, flush: bool
) -> None:
    packer = Packer(word_table(), seq_length=seq_length, flush_tails=flush)
    bare = Packer(word_table(), seq_length=seq_length, flush_tails=flush, keep_tokens=False)
    whole = streams(documents)
    for full, light in [
        (packer.add(*flat(documents)), bare.add(*flat(documents))),
        (packer.finish(), bare.finish()),
    ]:
        assert len(light.tokens) == 0
        for name in ["lengths", "domains", "starts"]:
            assert getattr(light, name).tolist() == getattr(full, name).tolist()
        for (domain, ids), start in zip(listed(full), full.starts, strict=True):
            assert ids == whole[domain][start : start + len(ids)]
    assert bare.counters == packer.counters


@given(DOCUMENTS, SEQ_LENGTHS, st.booleans(), st.integers(1, 9))
def test_counts_are_what_a_recount_gives(
    documents: list[tuple[int, list[int]]], seq_length: int, flush: bool, max_chunks: int
) -> None:
    options = {"flush_tails": flush, "max_chunks": max_chunks}
    found, packer = pack(documents, word_table(), seq_length=seq_length, **options)
    text = packer.text_counters
    everything = [token for _, ids in documents for token in ids]
    assert text.separators_in_text == everything.count(EOD)
    assert text.text_bytes_in_tokens == len(decode_words(everything).encode())
    for domain, counts in enumerate(packer.domain_counters):
        own = [ids for number, ids in found if number == domain]
        assert counts.tokens == sum(len(ids) for number, ids in documents if number == domain)
        assert counts.instances == len(own)
        assert counts.packed_tokens == sum(map(len, own))
        text_ids = [token for ids in own for token in ids if token != EOD]
        assert counts.packed_text_bytes == len(decode_words(text_ids))


@given(DOCUMENTS, SEQ_LENGTHS, st.booleans())
def test_no_token_is_lost_uncounted(
    documents: list[tuple[int, list[int]]], seq_length: int, flush: bool
) -> None:
    instances, packer = pack(documents, word_table(), seq_length=seq_length, flush_tails=flush)
    counters = packer.counters
    assert counters.tokens_in == sum(len(ids) for _, ids in documents)
    assert counters.tokens == sum(len(ids) for _, ids in instances)
    assert counters.instances == len(instances)
    dropped = {name: count for name, count in asdict(counters).items() if "dropped" in name}
    tokens_dropped = sum(count for name, count in dropped.items() if name.endswith("tokens"))
    assert counters.tokens_in == counters.tokens + tokens_dropped
    assert counters.pending_tokens == 0
    assert (counters.dropped_tail_tokens == 0) if flush else (counters.flushed_tails == 0)


@given(DOCUMENTS, SEQ_LENGTHS)
def test_instances_in_order_are_the_domains_tokens_in_order(
    documents: list[tuple[int, list[int]]], seq_length: int
) -> None:
    instances, packer = pack(documents, word_table(), seq_length=seq_length, flush_tails=True)
    whole = packer.counters.tokens == packer.counters.tokens_in
    event(f"nothing dropped: {whole}")
    packed = streams(instances)
    for domain, stream in streams(documents).items():
        mine = packed.get(domain, [])
        if whole:
            assert mine == stream
        rest = iter(stream)
        assert all(token in rest for token in mine)  # a subsequence: `in` consumes


@given(DOCUMENTS, SEQ_LENGTHS, st.booleans())
def test_every_instance_fits_and_trains_something(
    documents: list[tuple[int, list[int]]], seq_length: int, flush: bool
) -> None:
    for _, ids in pack(documents, word_table(), seq_length=seq_length, flush_tails=flush)[0]:
        assert 2 <= len(ids) <= seq_length + 1
        assert any(token != EOD for token in ids[:-1])


@given(DOCUMENTS, SEQ_LENGTHS)
def test_a_domain_is_packed_as_if_it_were_alone(
    documents: list[tuple[int, list[int]]], seq_length: int
) -> None:
    together, _ = pack(documents, word_table(), seq_length=seq_length, flush_tails=True)
    for domain in {domain for domain, _ in documents}:
        own = [item for item in documents if item[0] == domain]
        alone, _ = pack(own, word_table(), seq_length=seq_length, flush_tails=True)
        assert [item for item in together if item[0] == domain] == alone


@given(DOCUMENTS, SEQ_LENGTHS, st.data())
@settings(max_examples=60)
def test_documents_added_in_one_call_or_in_several_give_the_same_instances(
    documents: list[tuple[int, list[int]]], seq_length: int, data: st.DataObject
) -> None:
    documents = [(0, ids) for _, ids in documents]
    groups: list[tuple[int, list[int]]] = []
    for _, ids in documents:
        if groups and data.draw(st.booleans()):
            groups[-1] = (0, groups[-1][1] + ids)
        else:
            groups.append((0, ids))
    expected, one_by_one = pack(documents, word_table(), seq_length=seq_length)
    found, grouped = pack(groups, word_table(), seq_length=seq_length)
    assert found == expected
    assert grouped.counters == one_by_one.counters
