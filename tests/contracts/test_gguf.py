"""GGUF files of every family that has them: the same tensors as Hugging Face's, or refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import CheckpointError, ConfigError
from megatron_miniplm.data.tokenizers import load_tokenizer
from megatron_miniplm.models.family import ModelConfig, ModelFamily, all_families
from megatron_miniplm.models.gguf import GgufFile, is_gguf_file
from megatron_miniplm.models.gguf_tokenizer import token_bytes, write_tokenizer
from megatron_miniplm.models.hf_folder import HfFolder
from tests.unit.test_hf_folder import write

gguf = pytest.importorskip("gguf", reason="the [hf] extra is not installed")

from tests.gguf_files import write_gguf  # noqa: E402 - needs gguf

FAMILIES = [family for family in all_families() if family.gguf_architecture]
SHAPE = ModelConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2,
    kv_channels=32, vocab_size=519, norm_epsilon=1e-5, rotary_base=5e5,
)  # fmt: skip


def shape_of(family: ModelFamily, **change) -> ModelConfig:
    flags = {"add_qkv_bias": family.name == "qwen", "qk_layernorm": family.name == "qwen3"}
    return dataclasses.replace(SHAPE, model_family=family.name, **flags, **change)


def folder_of(path: Path, family: ModelFamily, **change) -> HfFolder:
    return HfFolder(write(path, shape_of(family, **change)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_tensors_and_shape_are_those_of_the_folder_it_was_made_from(tmp_path, family, tied):
    folder = folder_of(tmp_path / "hf", family, untie_embeddings_and_output_weights=not tied)
    found = GgufFile(write_gguf(folder, tmp_path / "model.gguf"))
    assert found.config == folder.config
    assert set(found) == set(folder)
    for name, tensor in folder.items():
        assert torch.equal(found[name], tensor), name
    for key, layer, shape in folder.parameters():  # in parts, as a tensor parallel rank does
        box = (slice(shape[0] // 4, shape[0] // 2), *(slice(1, size) for size in shape[1:]))
        ours, theirs = (torch.empty([part.stop - part.start for part in box]) for _ in range(2))
        found.read(key, layer, box, ours)
        folder.read(key, layer, box, theirs)
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_quantised_tensors_are_those_that_transformers_reads(tmp_path, family):
    transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")
    pytest.importorskip("accelerate", reason="transformers needs it to read GGUF")
    # transformers takes its own default for the width of a head, whatever the file says.
    folder = folder_of(tmp_path / "hf", family, kv_channels=128 if family.name == "qwen3" else 16)
    found = GgufFile(write_gguf(folder, tmp_path / "model.gguf", quantise=True))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    assert theirs.config.architectures in (None, list(family.architectures))
    state = theirs.state_dict()
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name]), name
    embedding = found["model.embed_tokens.weight"]
    assert not torch.equal(embedding, folder["model.embed_tokens.weight"]), "it was quantised"


def test_rotary_scaling_comes_back_from_the_divisors_of_the_frequencies(tmp_path):
    (llama,) = (family for family in FAMILIES if family.name == "llama")
    for factor in (8.0, 32.0):
        folder = folder_of(
            tmp_path / f"hf{factor}", llama, use_rope_scaling=True, rope_scaling_factor=factor
        )
        path = write_gguf(folder, tmp_path / "model.gguf")
        assert GgufFile(path).config == folder.config
        data = path.read_bytes()
        divisor = np.float32(factor).tobytes()
        at = data.rindex(divisor)  # the last frequency's
        path.write_bytes(data[:at] + np.float32(factor / 2).tobytes() + data[at + 4 :])
        with pytest.raises(ConfigError, match="not Llama 3's scaling"):
            GgufFile(path)


def test_the_embedded_tokenizer_gives_the_ids_of_the_original(tmp_path, tiny_tokenizer):
    folder = folder_of(tmp_path / "hf", FAMILIES[0])
    model = GgufFile(write_gguf(folder, tmp_path / "model.gguf", tiny_tokenizer))
    write_tokenizer(model.metadata, tmp_path, model.path)
    found, expected = load_tokenizer(tmp_path), load_tokenizer(tiny_tokenizer)
    texts = ["def f(x):\n\treturn 'naïve \N{SNOWMAN}' + str(12345)", "<|endoftext|> it's  two"]
    for one, two in zip(found.encode_flat(texts), expected.encode_flat(texts), strict=True):
        assert np.array_equal(one, two)
    assert found.eod_id == expected.eod_id
    assert token_bytes(model.metadata) == expected.token_bytes() == found.token_bytes()


def test_a_converted_file_is_the_folder_it_was_made_from(tmp_path, tiny_tokenizer):
    folder = folder_of(tmp_path / "hf", FAMILIES[0])
    path = write_gguf(folder, tmp_path / "model.gguf", tiny_tokenizer)
    out = ["--to", "hf", "--save", str(tmp_path / "out")]
    assert main(["convert", "--from", "gguf", "--load", str(path), *out]) == 0
    back = HfFolder(tmp_path / "out")
    assert back.config == folder.config
    assert all(torch.equal(back[name], tensor) for name, tensor in folder.items())
    assert load_tokenizer(tmp_path / "out").vocab_size == 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope__scaling__type": "yarn"}, r"rope\.scaling\.type = 'yarn'"),
        ({"rope__dimension_count": 16}, r"rope\.dimension_count = 16.*32"),
        ({"attention__value_length": 16}, r"attention\.value_length = 16"),
        ({"attention__sliding_window": 64}, "sliding_window = 64"),
        ({"expert_count": 8}, "unknown metadata expert_count = 8"),
        ({"vocab_size": 518}, "vocab_size = 518.*519"),
        ({"attention__head_count": 2}, "q_proj.weight has shape"),
        ({"attention__head_count": 0}, "0 is not a usable value for num_attention_heads"),
        ({"block_count": 3}, r"missing model\.layers\.2"),
        ({"feed_forward_length": None}, "lacks intermediate_size"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, change, message):
    folder = folder_of(tmp_path / "hf", FAMILIES[0])
    path = write_gguf(folder, tmp_path / "model.gguf", **change)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        GgufFile(path)


def test_an_embedding_that_is_no_matrix_is_refused(tmp_path):
    folder = folder_of(tmp_path / "hf", FAMILIES[0])
    folder.tensors["model.embed_tokens.weight"] = folder.tensors["model.norm.weight"]
    with pytest.raises(ConfigError, match=r"no matrix token_embd\.weight"):
        GgufFile(write_gguf(folder, tmp_path / "model.gguf"))


def test_other_architectures_and_broken_files_are_refused(tmp_path):
    folder = folder_of(tmp_path / "hf", FAMILIES[0])
    path = write_gguf(folder, tmp_path / "model.gguf")
    data = path.read_bytes()
    assert is_gguf_file(path)
    path.write_bytes(data.replace(b"llama", b"gamma"))
    with pytest.raises(ConfigError, match=r"general\.architecture is 'gamma'; supported: llama"):
        GgufFile(path)
    for keep in (4, 60, len(data) // 2, -10):
        path.write_bytes(data[:keep])
        with pytest.raises(CheckpointError, match="truncated"):
            GgufFile(path)
    assert not is_gguf_file(tmp_path / "hf/config.json")
    assert not is_gguf_file(tmp_path)


def test_a_tokenizer_that_cannot_be_written_faithfully_is_asked_for(tmp_path, tiny_tokenizer):
    folder = folder_of(tmp_path / "hf", FAMILIES[0])
    path = write_gguf(folder, tmp_path / "model.gguf", tiny_tokenizer)
    path.write_bytes(path.read_bytes().replace(b"gpt-2", b"other"))
    convert = ["convert", "--from", "gguf", "--load", str(path), "--to", "hf", "--save"]
    assert main([*convert, str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    given = ["--tokenizer-model", str(tiny_tokenizer)]
    assert main([*convert, str(tmp_path / "out"), *given]) == 0
