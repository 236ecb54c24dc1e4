"""retokenize: no text is lost or invented on the way to another tokenizer, or it is counted."""

from __future__ import annotations

import functools
import json
import lzma
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_miniplm.__main__ import main
from megatron_miniplm.data import continuity
from megatron_miniplm.data import retokenize as retokenize_module
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.indexed import contiguous_index
from megatron_miniplm.data.lineage import ancestors
from megatron_miniplm.data.retokenize import Converter, Instances
from megatron_miniplm.data.subset import write_subset
from megatron_miniplm.data.tokenizers import Tokenizer, load_tokenizer
from megatron_miniplm.data.verify import verify
from tests.small_artifacts import visible, write_corpus

PROJECT = Path(__file__).resolve().parents[2]
SEQ_LENGTH = 32


def train(folder: Path, *, vocab_size: int, specials: Sequence[str], sources: str) -> Path:
    """A byte-level BPE whose separator is its second token."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(specials), show_progress=False,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = [path.read_text() for path in sorted(PROJECT.glob(sources))]
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another vocabulary, where the separator has another name and id."""
    folder = tmp_path_factory.mktemp("other")
    return train(folder / "bpe", vocab_size=700, specials=["<pad>", "<eos>"], sources="csrc/*.cpp")


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    """Two domains of this project's sources, with text beyond ASCII."""
    parts = [
        paragraph.replace("<|endoftext|>", "EOD") + (" naïve 你好 🙂\n" if at % 3 == 0 else "")
        for path in sorted((PROJECT / "megatron_miniplm/core").glob("*.py"))
        for at, paragraph in enumerate(path.read_text().split("\n\n\n"))
    ]
    return {"code": parts[::2], "prose": parts[1::2]}


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_tokenizer, texts) -> Corpus:
    """Some hundred instances; documents of the domains take turns, all tails are there."""
    folder = tmp_path_factory.mktemp("source")
    length = min(map(len, texts.values()))
    pairs = [(name, texts[name][at]) for at in range(length) for name in texts]
    records = [{"text": text, "domain": name} for name, text in pairs]
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [
        "preprocess", "--input", folder / "a.jsonl", "--domain-key", "domain", "--tokenizer-model",
        tiny_tokenizer, "--seq-length", SEQ_LENGTH, "--flush-tails", "--output-prefix",
        folder / "source", "--instances-per-shard", 100,
    ]  # fmt: skip
    assert main(list(map(str, words))) == 0
    return Corpus.open(folder / "source")


def retokenize(source: Corpus, tokenizer: Path, prefix: Path, *words: object) -> Corpus:
    fixed = ["--data-path", source.prefix, "--tokenizer-model", tokenizer, "--output-prefix",
             prefix, "--eod-token", "<eos>"]  # fmt: skip
    assert main(["retokenize", *map(str, fixed), *map(str, words)]) == 0
    return Corpus.open(prefix)


@functools.cache  # a real vocabulary's table takes a while
def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    return tokenizer.token_bytes()


def text_of(tokens: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> bytes:
    """Bytes of the tokens, separators as a byte that UTF-8 does not have."""
    table = token_bytes(tokenizer)
    return b"".join(b"\xff" if at == tokenizer.eod_id else table[at] for at in tokens)


def domain_text(corpus: Corpus, name: str) -> bytes:
    """All text of a domain, in order."""
    rows = np.flatnonzero(corpus.domains == corpus.domain_names.index(name))
    tokenizer = corpus.tokenizer()
    return b"".join(text_of(tokens, tokenizer) for tokens in corpus.gather(rows))


def counts(corpus: Corpus) -> dict[str, int]:
    return dict(corpus.manifest.content["statistics"])


# ------------------------------------------------------------------------------------------------
# Repacked


def test_a_whole_corpus_keeps_every_byte_and_every_document(tmp_path, source, other):
    old = source.tokenizer()
    split = [ids for ids in source.gather(range(len(source))) if not is_utf8(text_of(ids, old))]
    assert split, "no character is split by the border of two instances"
    # Long enough that the packer meets no instance of a single token, which it drops.
    found = retokenize(source, other, tmp_path / "new", "--seq-length", "200")
    added = 0
    for name in source.domain_names:
        expected = domain_text(source, name)
        assert expected.count(b"\xff") > 10
        added += not expected.endswith(b"\xff")  # the last one may be dropped as a single token
        assert domain_text(found, name) == expected.removesuffix(b"\xff") + b"\xff"
    said = counts(found)
    num_bytes = counts(source)["packed_text_bytes"]
    for figure in ("source_text_bytes", "text_bytes", "text_bytes_in_tokens", "packed_text_bytes"):
        assert said[figure] == num_bytes, figure
    assert said["source_instances"] == len(source)
    assert said["source_tokens"] == source.num_tokens
    assert said["packing"]["tokens_in"] == said["packed_tokens"] == found.num_tokens
    assert said["added_separators"] == added
    for loss in ("broken_characters", "special_tokens", "truncated_tokens", "padded_instances"):
        assert said[loss] == 0, loss


def is_utf8(raw: bytes) -> bool:
    try:
        raw.replace(b"\xff", b"").decode()
    except UnicodeDecodeError:
        return False
    return True


def test_the_result_is_a_root_corpus_with_its_source_as_parent(tmp_path, source, other):
    found = retokenize(source, other, tmp_path / "deep/new", "--seq-length", "48")
    assert (found.kind, found.seq_length, found.eod_id, found.vocab_size) == ("corpus", 48, 1, 700)
    assert found.tokenizer().fingerprint == load_tokenizer(other, eod_token="<eos>").fingerprint
    assert found.domain_names == source.domain_names
    assert found.ids.tolist() == list(range(len(found)))
    (parent,) = ancestors(found.manifest, found.manifest_path)
    assert (parent.role, parent.state, parent.path) == ("source", "present", source.prefix)
    assert parent.fingerprint == source.fingerprint
    assert verify(found.prefix) == []
    assert found.lengths.max() == 49


def test_windows_and_threads_change_nothing(tmp_path, source, other, monkeypatch):
    expected = retokenize(source, other, tmp_path / "one", "--workers", "1")
    monkeypatch.setattr(retokenize_module, "WINDOW", 7)
    monkeypatch.setattr(continuity, "BLOCK_ROWS", 13)
    found = retokenize(source, other, tmp_path / "two")
    assert found.fingerprint == expected.fingerprint
    assert counts(found) == counts(expected)


def choose(source: Corpus, rows: Sequence[int], prefix: Path) -> Corpus:
    write_subset(source, np.array(rows), prefix, config={}, selection={})
    return Corpus.open(prefix)


def test_text_that_was_never_adjacent_is_separated_and_what_was_is_not(tmp_path, source, other):
    rows = sorted({0, 1, 2, 5, 6, 9, 20, 21, len(source) - 1})
    subset = choose(source, rows, tmp_path / "subset")
    # Long enough that the packer meets no instance of a single token, which it drops.
    found = retokenize(subset, other, tmp_path / "new", "--seq-length", "200")
    plain = retokenize(
        subset, other, tmp_path / "plain", "--seq-length", "200", "--no-end-fragments"
    )
    expected = dict.fromkeys(source.domain_names, b"")
    added = 0
    for row in rows:
        same = np.flatnonzero(source.domains == source.domains[row])
        following = same[same > row][:1]
        text = text_of(source.tokens(row), source.tokenizer())
        if not text.endswith(b"\xff") and not set(following.tolist()) & set(rows):
            text += b"\xff"
            added += 1
        expected[source.domain_names[source.domains[row]]] += text
    assert 0 < added < len(rows)
    assert counts(found)["added_separators"] == added
    for name, text in expected.items():
        assert domain_text(found, name) == text
        whole = [text_of(source.tokens(r), source.tokenizer()) for r in rows
                 if source.domain_names[source.domains[r]] == name]  # fmt: skip
        assert domain_text(plain, name) == b"".join(whole)
    assert counts(plain)["added_separators"] == 0


@settings(max_examples=40)
@given(st.data())
def test_followed_is_the_next_of_the_domain(tmp_path_factory, tiny_tokenizer, data):
    domains = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=30))
    rows = data.draw(st.sets(st.integers(0, len(domains) - 1), min_size=1).map(sorted))
    folder = tmp_path_factory.mktemp("followed")
    instances = [np.array([5, 6])] * len(domains)
    root = write_corpus(folder / "root", tiny_tokenizer, instances, domains=domains)
    subset = choose(root, rows, folder / "subset")
    following = {
        at: next((i for i in range(at + 1, len(domains)) if domains[i] == domains[at]), -1)
        for at in rows
    }
    expected = [following[at] in rows for at in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuity, "BLOCK_ROWS", data.draw(st.integers(1, 8)))
        assert continuity.followed(subset).tolist() == expected


def test_prefixes_of_an_adopted_domain_do_not_continue_one_another(tmp_path, source, other):
    for number in range(2):
        tokens = np.array([40 + number, 50, 51, 52, 0], np.uint16)
        (tmp_path / f"p{number}.bin").write_bytes(tokens.tobytes())
        index = contiguous_index(np.array([5]), np.dtype(np.uint16))
        (tmp_path / f"p{number}.idx").write_bytes(index)
    words = ["adopt", "--input", tmp_path / "p0", tmp_path / "p1", "--domain", "d", "d",
             "--tokenizer-model", source.tokenizer().source, "--seq-length", "3",
             "--no-sentence-cuts", "--output-prefix", tmp_path / "adopted"]  # fmt: skip
    assert main(list(map(str, words))) == 0
    adopted = Corpus.open(tmp_path / "adopted")
    assert len(adopted) == 2  # each prefix's tail, with its separator, is dropped
    assert continuity.followed(adopted).tolist() == [False, False]
    assert counts(retokenize(adopted, other, tmp_path / "new"))["added_separators"] == 2


def test_tails_are_dropped_on_request(tmp_path, source, other):
    whole = retokenize(source, other, tmp_path / "whole")
    found = retokenize(source, other, tmp_path / "new", "--no-flush-tails")
    assert len(found) == len(whole) - 2
    assert counts(found)["packing"]["dropped_tail_tokens"] == whole.num_tokens - found.num_tokens


# ------------------------------------------------------------------------------------------------
# One to one


def test_row_by_row_the_text_is_the_same_unless_it_was_cut(tmp_path, source, other):
    rows = np.arange(1, len(source), 2)
    subset = choose(source, rows, tmp_path / "subset")
    found = retokenize(subset, other, tmp_path / "new", "--no-repack")
    assert len(found) == len(subset)
    assert found.domains.tolist() == subset.domains.tolist()
    old, new = subset.tokenizer(), found.tokenizer()
    cut = cut_tokens = 0
    for row in range(len(subset)):
        raw = text_of(subset.tokens(row), old)
        parts = [part.decode(errors="replace") for part in raw.split(b"\xff")]
        ids = [new.encode_flat([part])[0].tolist() for part in parts]
        expected = [at for part in ids for at in [*part, new.eod_id]][:-1]
        assert found.tokens(row).tolist() == expected[: SEQ_LENGTH + 1]
        cut += len(expected) > SEQ_LENGTH + 1
        cut_tokens += max(len(expected) - SEQ_LENGTH - 1, 0)
    said = counts(found)
    assert cut > 10
    assert (said["truncated_instances"], said["truncated_tokens"]) == (cut, cut_tokens)
    assert said["packed_tokens"] == found.num_tokens
    assert said["tokens"] == found.num_tokens + cut_tokens
    for number, name in enumerate(found.domain_names):
        mine = [found.tokens(row) for row in np.flatnonzero(found.domains == number)]
        text = b"".join(text_of(tokens, new) for tokens in mine).replace(b"\xff", b"")
        own = said["domains"][name]
        assert (own["instances"], own["packed_text_bytes"]) == (len(mine), len(text))


def test_instances_that_become_too_short_are_filled_up_and_counted(tmp_path, tiny_tokenizer, other):
    old, new = load_tokenizer(tiny_tokenizer), load_tokenizer(other, eod_token="<eos>")
    letter = next(at for at, raw in enumerate(old.token_bytes()) if raw == b"r")
    word = next(
        raw.decode()
        for raw in new.token_bytes()[2:]
        if len(raw) > 2 and raw.isalpha() and len(new.encode_flat([raw.decode()])[0]) == 1
    )
    merged = new.encode_flat([word])[0]
    word = [at for letter in word for at in old.encode_flat([letter])[0].tolist()]
    instances = [np.array(word), np.array([letter, letter]), np.array([0, 0])]
    source = write_corpus(tmp_path / "source", tiny_tokenizer, instances)
    found = retokenize(source, other, tmp_path / "new", "--no-repack")
    rows = [tokens.tolist() for tokens in found.gather(range(3))]
    assert rows[0] == [merged[0], new.eod_id]
    assert rows[1] == new.encode_flat(["rr"])[0].tolist()
    assert rows[2] == [new.eod_id, new.eod_id]
    assert counts(found)["padded_instances"] == 1


# ------------------------------------------------------------------------------------------------
# What text cannot say


def bytes_to_ids(tokenizer: Tokenizer, raw: bytes) -> list[int]:
    """One token a byte."""
    table = tokenizer.token_bytes()
    return [table.index(bytes([byte])) for byte in raw]


def convert(old: Tokenizer, new: Tokenizer, ids: Sequence[int], broken="replace"):
    converter = Converter(old, new, broken=broken)
    found = converter.convert(one_instance(ids), end_fragments=False)
    return text_of(found.ids, new), converter.counters


def one_instance(ids: Sequence[int]) -> Instances:
    return Instances([np.array(ids, np.uint16)], np.array([0], np.uint16), np.array([False]))


@pytest.mark.parametrize(
    ("raw", "replaced", "dropped", "broken"),
    [
        ("naïve 🙂".encode(), "naïve 🙂", "naïve 🙂", 0),
        (" ïx".encode()[2:], "�x", "x", 1),  # starts inside a character
        ("a🙂".encode()[:-1], "a�", "a", 1),
        ("a�b".encode(), "a�b", "a�b", 0),  # was in the text
        ("�🙂".encode()[:-2], "��", "�", 1),
    ],
)
def test_parts_of_characters_are_replaced_or_dropped_and_counted(
    tiny_tokenizer, other, raw, replaced, dropped, broken
):
    old, new = load_tokenizer(tiny_tokenizer), load_tokenizer(other, eod_token="<eos>")
    for how, expected in (("replace", replaced), ("drop", dropped)):
        text, counters = convert(old, new, bytes_to_ids(old, raw), how)
        assert text.decode() == expected
        assert (counters.broken_characters, counters.broken_instances) == (broken, min(broken, 1))
        assert counters.source_text_bytes == len(raw)
        assert counters.text_bytes == counters.text_bytes_in_tokens == len(expected.encode())


@pytest.mark.parametrize("text", ["ñ", "你", "🙂", "a你"])
def test_a_character_split_between_followed_instances_is_whole(tiny_tokenizer, other, text):
    old, new = load_tokenizer(tiny_tokenizer), load_tokenizer(other, eod_token="<eos>")
    raw = text.encode()
    for at in range(1, len(raw)):
        parts = [b"x" + raw[:at], raw[at:] + b"y"]
        tokens = [np.array(bytes_to_ids(old, part)) for part in parts]
        tokens.insert(1, np.array(bytes_to_ids(old, b"zz")))  # of another domain
        instances = Instances(
            tokens, np.array([1, 0, 1], np.uint16), np.array([True, False, False])
        )
        converter = Converter(old, new, broken="replace")
        found = converter.convert(instances, end_fragments=True)
        whole = raw[:at].decode(errors="ignore")  # the characters before the split one
        expected = [f"x{whole}", "zz", f"{text.removeprefix(whole)}y"]
        pieces = np.split(found.ids, found.offsets[1:-1])
        assert [text_of(ids, new).rstrip(b"\xff").decode() for ids in pieces] == expected
        assert converter.counters.broken_characters == 0


def test_leading_spaces_and_empty_documents_are_kept(tiny_tokenizer, other):
    old, new = load_tokenizer(tiny_tokenizer), load_tokenizer(other, eod_token="<eos>")
    ids = [*old.encode_flat([" of it"])[0], 0, 0, *old.encode_flat(["  x "])[0], 0]
    assert convert(old, new, ids)[0] == b" of it\xff\xff  x \xff"


def test_special_tokens_become_no_text(tmp_path, other):
    chat = train(tmp_path / "chat", vocab_size=300, specials=["<sep>", "<|im_start|>"],
                 sources="csrc/*.h")  # fmt: skip
    old = load_tokenizer(chat, eod_token="<sep>")
    new = load_tokenizer(other, eod_token="<eos>")
    text, counters = convert(old, new, [*old.encode_flat(["a<|im_start|>b<sep>c"])[0]])
    assert text == b"ab\xffc"
    assert counters.special_tokens == 1
    assert counters.source_text_bytes == 3


def test_a_separator_spelled_out_in_the_text_is_counted(tiny_tokenizer, other):
    old, new = load_tokenizer(tiny_tokenizer), load_tokenizer(other, eod_token="<eos>")
    text, counters = convert(old, new, old.encode_flat(["a<eos>b"])[0].tolist())
    assert text == b"a\xffb"
    assert counters.separators_in_text == 1


def test_the_space_that_sentencepiece_puts_before_a_text_comes_and_goes(tmp_path, tiny_tokenizer):
    lines = [line for line in Path(__file__).read_text().splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "tiny"), vocab_size=400,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=True, minloglevel=2,
    )  # fmt: skip
    llama = load_tokenizer(tmp_path / "tiny.model", kind="SentencePieceTokenizer")
    plain = load_tokenizer(tiny_tokenizer)
    ids = [*plain.encode_flat([" of it"])[0], 0, *plain.encode_flat(["def"])[0], 0]
    there, _ = convert(plain, llama, ids)
    assert there == b" of it\xff def\xff"
    converter = Converter(plain, llama, broken="replace")
    made = converter.convert(one_instance(ids), end_fragments=False).ids
    assert convert(llama, plain, made)[0] == b" of it\xffdef\xff"


@pytest.mark.parametrize("pair", [("qwen2.5_hf", "smollm2_hf"), ("gpt2_hf", "qwen2.5_hf")])
def test_real_text_survives_between_real_tokenizers(tmp_path, shared_dir, shared_tokenizers, pair):
    with lzma.open(shared_dir / "corpus/heldout.jsonl.xz") as file:
        lines = [file.readline() for _ in range(50)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    old, new = (shared_tokenizers / name for name in pair)
    fixed = ["--seq-length", "256", "--output-prefix"]
    words = ["preprocess", "--input", tmp_path / "a.jsonl", "--tokenizer-model", old,
             "--flush-tails", *fixed, tmp_path / "source"]  # fmt: skip
    assert main(list(map(str, words))) == 0
    source = Corpus.open(tmp_path / "source")
    words = ["retokenize", "--data-path", source.prefix, "--tokenizer-model", new, *fixed]
    assert main(list(map(str, [*words, tmp_path / "new"]))) == 0
    found = Corpus.open(tmp_path / "new")
    said = counts(found)
    assert domain_text(found, "text") == domain_text(source, "text")
    assert said["broken_characters"] == said["added_separators"] == 0
    texts = [json.loads(line)["text"] for line in lines]
    assert said["packed_text_bytes"] == sum(len(text.encode()) for text in texts)


# ------------------------------------------------------------------------------------------------
# What is refused


def test_the_result_never_takes_the_place_of_its_source(tmp_path, source, other, capsys):
    subset = choose(source, [0, 1, 2], tmp_path / "subset")
    before = visible(source.prefix.parent)
    words = ["--tokenizer-model", other, "--eod-token", "<eos>", "--overwrite"]
    for data, prefix in ((source, source.prefix), (subset, source.prefix), (subset, subset.prefix)):
        flags = ["--data-path", data.prefix, "--output-prefix", prefix, *words]
        assert main(["retokenize", *map(str, flags)]) == 2
        assert "cannot take the place of its own input" in capsys.readouterr().err
    assert visible(source.prefix.parent) == before
    assert verify(subset.prefix) == []


def test_bad_flags_and_ids_are_refused_and_leave_nothing(tmp_path, tiny_tokenizer, other, capsys):
    source = write_corpus(tmp_path / "source", tiny_tokenizer, [np.array([5, 6, 7])])
    fixed = ["retokenize", "--data-path", tmp_path / "source", "--tokenizer-model", other,
             "--output-prefix", tmp_path / "refused"]  # fmt: skip
    path = Path(f"{source.shards[0]}.bin")
    for words, reason in (
        (["--eod-token", "<nothing>"], "not in the vocabulary"),
        (["--eod-token", "<eos>", "--seq-length", "0"], "--seq-length 0 must be at least 1"),
        (["--eod-token", "<eos>", "--no-flush-tails"], "would hold no instance"),
        (["--eod-token", "<eos>"], "token ids from 5 to 999"),
    ):
        if "999" in reason:
            path.write_bytes(np.array([5, 999, 7], np.uint16).tobytes())
        assert main(list(map(str, [*fixed, *words]))) == 2
        assert reason in capsys.readouterr().err
        assert not [name for name in visible(tmp_path) if "refused" in name]
