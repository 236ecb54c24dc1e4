"""Tokenizers: both back ends agree, token bytes are the text, separators, sizes, saved folders."""

from __future__ import annotations

import json
import logging
import lzma
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.data import tokenizers as module
from megatron_miniplm.data.packing import EndTable
from megatron_miniplm.data.tokenizers import (
    HuggingFaceTokenizer,
    Tokenizer,
    load_saved,
    load_tokenizer,
)

REAL = ["smollm2_hf", pytest.param("qwen2.5_hf", marks=pytest.mark.slow), "gpt2_hf"]
TEXTS = [
    "Hello, wörld!\n\n  def f(x):\r\n\treturn 3.14  # 你好 🙂 \x00\x7f",
    "",
    " ",
    "<|endoftext|> in a text <|endoftext|>",
    "e\u0301 \u00e9 \ufb01 \u200b\u2028 ﷽ \U0001f468\u200d\U0001f469\u200d\U0001f467",
]


@pytest.fixture(scope="session")
def real_texts(shared_dir: Path) -> list[str]:
    """1 MB of the shared corpus, every 20th document."""
    with lzma.open(shared_dir / "corpus" / "sample20.jsonl.xz") as file:
        return [json.loads(line)["text"] for line in file.readlines()[::20]]


@pytest.fixture(scope="module", params=REAL)
def real_folder(request: pytest.FixtureRequest, shared_tokenizers: Path) -> Path:
    return shared_tokenizers / str(request.param)


@pytest.fixture(scope="module")
def real_tokenizer(real_folder: Path) -> HuggingFaceTokenizer:
    return hugging_face(real_folder)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE of 400 pieces with byte fallback that keeps every character."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = [line for line in Path(__file__).read_text().splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tiny"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    return folder / "tiny.model"


def hugging_face(folder: Path, *, backend: module.Backend = "fast") -> HuggingFaceTokenizer:
    tokenizer = load_tokenizer(folder, backend=backend)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


def pieces_of(flat: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    ids, offsets = flat
    assert ids.dtype == np.int32
    assert offsets.dtype == np.int64
    assert offsets[0] == 0
    assert offsets[-1] == len(ids)
    return [ids[a:b].tolist() for a, b in pairwise(offsets)]


def hf_ids(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    engine = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [item.ids for item in engine.encode_batch_fast(texts, add_special_tokens=False)]


def assert_bytes_are_the_text(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    table = tokenizer.token_bytes()
    assert len(table) == tokenizer.vocab_size
    for text, ids in zip(texts, pieces_of(tokenizer.encode_flat(texts)), strict=True):
        assert b"".join(table[at] for at in ids) == text.encode()


def edit_json(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of a tokenizer folder with top-level entries of tokenizer.json replaced."""
    shutil.copytree(folder, target)
    path = target / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


# ------------------------------------------------------------------------------------------------
# Encoding


def test_fast_ids_equal_the_reference_on_real_text(
    real_folder: Path, real_tokenizer: HuggingFaceTokenizer, real_texts: list[str]
) -> None:
    assert sum(map(len, real_texts)) > 900_000
    assert real_tokenizer.uses_fast
    texts = [*real_texts, *TEXTS]
    assert pieces_of(real_tokenizer.encode_flat(texts)) == hf_ids(real_folder, texts)


def test_token_bytes_of_a_real_text_are_that_text(real_folder: Path, real_texts: list[str]) -> None:
    texts = [*real_texts, *TEXTS[1:]]
    assert_bytes_are_the_text(load_tokenizer(real_folder), texts)


def test_both_back_ends_agree_without_shared_data(tiny_tokenizer: Path) -> None:
    texts = [*TEXTS, Path(module.__file__).read_text()]
    fast, slow = hugging_face(tiny_tokenizer), hugging_face(tiny_tokenizer, backend="hf")
    assert fast.uses_fast
    assert not slow.uses_fast
    found = pieces_of(fast.encode_flat(texts))
    assert found == pieces_of(slow.encode_flat(texts)) == hf_ids(tiny_tokenizer, texts)
    assert_bytes_are_the_text(fast, texts)


@pytest.mark.parametrize("backend", ["fast", "hf"])
def test_no_text_gives_no_ids(tiny_tokenizer: Path, backend: module.Backend) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer, backend=backend)
    assert pieces_of(tokenizer.encode_flat([])) == []
    assert pieces_of(tokenizer.encode_flat([""])) == [[]]


def test_documents_with_bytes_outside_the_vocabulary_go_to_the_reference(
    shared_tokenizers: Path,
) -> None:
    folder = shared_tokenizers / "smollm2_hf"
    texts = ["before", "a \U00040000 b", "between", "", "\x04\x05", "after"] * 3
    tokenizer = hugging_face(folder)
    assert pieces_of(tokenizer.encode_flat(texts)) == hf_ids(folder, texts)
    assert tokenizer.fallback_documents == 6


def test_a_vocabulary_without_some_bytes_still_encodes_the_rest(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    model = json.loads((tiny_tokenizer / "tokenizer.json").read_text())["model"]
    missing = "ñ"  # stands for byte 0xF1
    kept = (token for token in sorted(model["vocab"], key=model["vocab"].get) if missing != token)
    model["vocab"] = {token: at for at, token in enumerate(kept)}
    assert not any(missing in "".join(pair) for pair in model["merges"])
    folder = edit_json(tiny_tokenizer, tmp_path / "t", model=model)
    tokenizer = hugging_face(folder)
    found = pieces_of(tokenizer.encode_flat(["ok", "x\U00040000", "ok"]))
    assert tokenizer.decode(found[0]) == "ok"
    assert found == hf_ids(folder, ["ok", "x\U00040000", "ok"])
    assert tokenizer.fallback_documents == 1


def test_a_lone_surrogate_is_refused(tiny_tokenizer: Path) -> None:
    with pytest.raises(DataError, match="not valid Unicode"):
        load_tokenizer(tiny_tokenizer).encode_flat(["fine", "a\ud800b"])


def test_truncation_and_padding_of_the_file_are_ignored(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    engine = hf.Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    engine.enable_truncation(2)
    engine.enable_padding(length=9)
    engine.save(str(tmp_path / "tokenizer.json"))
    texts = ["a much longer text than that", "x"]
    for backend in ("fast", "hf"):
        tokenizer = hugging_face(tmp_path, backend=backend)
        assert tokenizer.uses_fast == (backend == "fast")
        assert pieces_of(tokenizer.encode_flat(texts)) == hf_ids(tiny_tokenizer, texts)


class LyingFastokens:
    """Stands for a fastokens release with a bug: it swaps the first two ids."""

    class Tokenizer:
        def __init__(self, path: str) -> None:
            self.engine = hf.Tokenizer.from_file(path)

        from_file = classmethod(lambda cls, path: cls(path))

        def no_truncation(self) -> None: ...

        def no_padding(self) -> None: ...

        def encode_batch_flat(self, texts: list[str]) -> tuple[bytes, bytes]:
            (text,) = texts
            ids = self.engine.encode(text).ids
            ids[:2] = ids[:2][::-1]
            offsets = np.array([0, len(ids)], np.uint64)
            return np.array(ids, np.uint32).tobytes(), offsets.tobytes()


@pytest.mark.parametrize("engine", [LyingFastokens, None])
def test_an_untrustworthy_or_absent_fast_back_end_is_not_used(
    tiny_tokenizer: Path,
    engine: object,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "fastokens", engine)
    monkeypatch.setattr(logging.getLogger("megatron_miniplm"), "propagate", True)
    caplog.set_level(logging.INFO)
    tokenizer = hugging_face(tiny_tokenizer)
    assert pieces_of(tokenizer.encode_flat(TEXTS)) == hf_ids(tiny_tokenizer, TEXTS)
    assert not tokenizer.uses_fast
    assert ("differs" if engine else "not installed") in caplog.text


# ------------------------------------------------------------------------------------------------
# Separator and vocabulary


@pytest.mark.parametrize(
    ("name", "eod", "size"),
    [("smollm2_hf", 0, 49152), ("qwen2.5_hf", 151643, 151665), ("gpt2_hf", 50256, 50257)],
)
def test_separator_and_real_size_of_real_tokenizers(
    shared_tokenizers: Path, name: str, eod: int, size: int
) -> None:
    # Qwen's file lists 151,936 entries; the last 271 are [PADn] rows that no text produces.
    tokenizer = load_tokenizer(shared_tokenizers / name)
    assert (tokenizer.eod_token, tokenizer.eod_id) == ("<|endoftext|>", eod)
    assert tokenizer.vocab_size == size
    assert tokenizer.decode([tokenizer.eod_id]) == "<|endoftext|>"


def test_padding_rows_at_the_end_of_a_vocabulary_are_not_counted(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    model = json.loads((tiny_tokenizer / "tokenizer.json").read_text())["model"]
    size = len(model["vocab"])
    model["vocab"] |= {f"[PAD{at}]": at for at in range(size, size + 9)}
    assert load_tokenizer(edit_json(tiny_tokenizer, tmp_path / "t", model=model)).vocab_size == size


def test_a_single_character_at_the_end_of_a_vocabulary_is_counted(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": ["a b"]}
    folder = edit_json(tiny_tokenizer, tmp_path / "t", model=model, added_tokens=[])
    assert load_tokenizer(folder, eod_token="a").vocab_size == 4


def test_byte_level_tokens_cover_every_byte_once(tiny_tokenizer: Path) -> None:
    single = [token for token in load_tokenizer(tiny_tokenizer).token_bytes() if len(token) == 1]
    assert sorted(single) == [bytes([byte]) for byte in range(256)]


def test_an_added_token_after_padding_rows_is_counted(tiny_tokenizer: Path, tmp_path: Path) -> None:
    spec = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    size = len(spec["model"]["vocab"])
    added = [*spec["added_tokens"], {**spec["added_tokens"][0], "id": size + 5, "content": "<é>"}]
    folder = edit_json(tiny_tokenizer, tmp_path / "t", added_tokens=added)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == size + 6
    assert tokenizer.token_bytes()[size + 5] == "<é>".encode()


@pytest.mark.parametrize("eos", ["def", {"content": "def", "lstrip": False}])
def test_the_eos_of_the_configuration_is_the_second_choice(
    tiny_tokenizer: Path, tmp_path: Path, eos: object
) -> None:
    spec = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    assert "def" in vocab
    vocab["<sep>"] = vocab.pop("<|endoftext|>")
    folder = edit_json(tiny_tokenizer, tmp_path / "t", model=spec["model"], added_tokens=[])
    with pytest.raises(ConfigError, match="--eod-token"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert load_tokenizer(folder).eod_token == "def"
    assert load_tokenizer(folder, eod_token="<sep>").eod_id == 0


def test_a_separator_that_the_vocabulary_lacks_is_refused(tiny_tokenizer: Path) -> None:
    with pytest.raises(ConfigError, match=r"'<none>'.*512"):
        load_tokenizer(tiny_tokenizer, eod_token="<none>")


def test_the_fingerprint_tells_separators_and_files_apart(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    same = shutil.copytree(tiny_tokenizer, tmp_path / "same")
    other = edit_json(tiny_tokenizer, tmp_path / "other", version="1.1")
    mine = load_tokenizer(tiny_tokenizer).fingerprint
    assert load_tokenizer(same / "tokenizer.json").fingerprint == mine
    assert load_tokenizer(tiny_tokenizer, eod_token="def").fingerprint != mine
    assert load_tokenizer(other).fingerprint != mine


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, ConfigError),
        ("", DataError),
        ("[1]", DataError),
        ('{"model": {}}', DataError),
        ('{"model": {"vocab": 3}}', DataError),
        ('{"model": {"vocab": {"a": 0}}}', DataError),  # no merges
    ],
)
def test_what_is_no_tokenizer_json_is_refused(
    tmp_path: Path, content: str | None, error: type[Exception]
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(error, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_tokenizer_whose_token_bytes_are_unknown_is_refused(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    folder = edit_json(tiny_tokenizer, tmp_path / "t", decoder={"type": "WordPiece"})
    with pytest.raises(ConfigError, match="WordPiece"):
        load_tokenizer(folder).token_bytes()


def test_metaspace_and_byte_pieces_of_a_hugging_face_file(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    model = {"type": "BPE", "vocab": {"▁": 0, "a": 1, "<0x0A>": 2, "▁a": 3}, "merges": [["▁", "a"]]}
    decoder = {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}}]}
    folder = edit_json(
        tiny_tokenizer, tmp_path / "t", model=model, decoder=decoder, added_tokens=[]
    )
    tokenizer = load_tokenizer(folder, eod_token="a")
    assert tokenizer.token_bytes() == [b" ", b"a", b"\n", b" a"]


# ------------------------------------------------------------------------------------------------
# SentencePiece


def test_sentencepiece_encodes_like_its_package_and_its_bytes_are_the_text(
    sentencepiece_model: Path,
) -> None:
    tokenizer = load_tokenizer(sentencepiece_model, kind="SentencePieceTokenizer", workers=1)
    texts = ["def test(a):\n    return 'ñ 你好'", "", "  two  spaces "]
    engine = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    assert pieces_of(tokenizer.encode_flat(texts)) == [engine.encode(text) for text in texts]
    assert pieces_of(tokenizer.encode_flat([])) == []
    assert_bytes_are_the_text(tokenizer, texts)
    assert (tokenizer.eod_token, tokenizer.vocab_size) == ("</s>", 400)
    assert tokenizer.decode(tokenizer.encode_flat(texts[:1])[0]) == texts[0]


def test_a_newline_ends_a_sentence_in_a_sentencepiece_model(sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model, kind="SentencePieceTokenizer")
    table = EndTable.build(tokenizer.token_bytes(), tokenizer.eod_id)
    ids, _ = tokenizer.encode_flat(["a\nb"])
    assert table.cuts(ids).tolist() == [b"\n" in tokenizer.token_bytes()[at] for at in ids]


def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.model"
    path.write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"bad\.model"):
        load_tokenizer(path, kind="SentencePieceTokenizer")


# ------------------------------------------------------------------------------------------------
# Saved folders


def test_a_saved_tokenizer_is_the_same_tokenizer(tiny_tokenizer: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_tokenizer, tmp_path / "source")
    (source / "tokenizer_config.json").write_text('{"eos_token": "def"}')
    original = load_tokenizer(source, eod_token="self")
    original.save(tmp_path / "saved")
    saved = load_saved(tmp_path / "saved")
    assert (saved.fingerprint, saved.eod_id) == (original.fingerprint, original.eod_id)
    assert (tmp_path / "saved" / "tokenizer_config.json").is_file()
    assert pieces_of(saved.encode_flat(TEXTS)) == pieces_of(original.encode_flat(TEXTS))


def test_a_saved_sentencepiece_model_is_the_same(sentencepiece_model: Path, tmp_path: Path) -> None:
    original = load_tokenizer(sentencepiece_model, kind="SentencePieceTokenizer")
    original.save(tmp_path / "saved")
    saved = load_saved(tmp_path / "saved")
    assert (saved.kind, saved.fingerprint) == (original.kind, original.fingerprint)


def test_a_saved_tokenizer_that_changed_is_refused(tiny_tokenizer: Path, tmp_path: Path) -> None:
    load_tokenizer(tiny_tokenizer).save(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataError, match="fingerprint"):
        load_saved(tmp_path / "saved")
