"""Hugging Face folders: what is refused on reading, and that writing is all or nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_miniplm.core.errors import CheckpointError, ConfigError, DataError
from megatron_miniplm.models.family import ModelConfig, get_family
from megatron_miniplm.models.hf_folder import HfFolder, is_hf_folder
from megatron_miniplm.models.hf_writer import HfExtras, write_hf_folder
from megatron_miniplm.models.mapping import whole
from megatron_miniplm.models.pretrained import check_same_shape

TIED = ModelConfig(
    model_family="qwen", num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4,
    num_query_groups=2, vocab_size=37,
)  # fmt: skip
UNTIED = dataclasses.replace(TIED, untie_embeddings_and_output_weights=True)
Parameters = Iterator[tuple[str, int | None, torch.Tensor]]


def parameters(config: ModelConfig) -> Parameters:
    """Random global tensors of that shape, with zero rows in the vocabulary's padding."""
    generator = torch.Generator().manual_seed(3)
    for rule in get_family(config.model_family).rules(config):
        for layer in range(config.num_layers) if rule.per_layer else (None,):
            parts = [torch.randn(shape, generator=generator) for shape in rule.hf_shapes]
            named = dict(zip(rule.hf_names(layer), parts, strict=True))
            yield rule.megatron, layer, rule.to_megatron(named, layer)


def write(path: Path, config: ModelConfig = TIED, **options) -> Path:
    write_hf_folder(path, config, parameters(config), **{"dtype": torch.float32, **options})
    return path


def change_tensors(path: Path, **new: torch.Tensor | None) -> None:
    tensors = load_file(path / "model.safetensors") | {
        name.replace("__", "."): tensor for name, tensor in new.items()
    }
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        path / "model.safetensors",
    )


def change_config(path: Path, **new) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | new))


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("limit", [10**9, 4096], ids=["one file", "sharded"])
def test_what_was_written_is_read_back_bit_for_bit(tmp_path, config, limit):
    folder = HfFolder(write(tmp_path / "hf", config, max_shard_bytes=limit))
    assert folder.config == config
    for key, layer, tensor in parameters(config):
        assert torch.equal(folder.load((key, layer, tensor.shape), torch.float32), tensor)
    files = sorted(file.name for file in folder.path.glob("*.safetensors"))
    if limit == 4096:
        assert len(files) > 3
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        assert all((folder.path / file).stat().st_size < 4096 + 2000 for file in files)
        total = json.loads((folder.path / "model.safetensors.index.json").read_text())["metadata"]
        assert total["total_size"] == sum(tensor.nbytes for tensor in folder.values())
    else:
        assert files == ["model.safetensors"]


def test_a_folder_in_bfloat16_says_so_and_holds_rounded_weights(tmp_path):
    folder = HfFolder(write(tmp_path / "hf", dtype=torch.bfloat16))
    assert folder.raw["torch_dtype"] == "bfloat16"
    for key, layer, tensor in parameters(TIED):
        rounded = folder.load((key, layer, tensor.shape), torch.float32)
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, tensor.bfloat16().float())


def test_the_fingerprint_follows_weights_and_shape_but_not_the_card(tmp_path):
    first = HfFolder(write(tmp_path / "a")).fingerprint
    card = HfExtras(lineage={"method": "MiniPLM"})
    assert HfFolder(write(tmp_path / "b", extras=card)).fingerprint == first
    change_tensors(tmp_path / "a", model__norm__weight=torch.zeros(16))
    assert HfFolder(tmp_path / "a").fingerprint != first
    change_config(tmp_path / "b", rope_theta=3.0)
    assert HfFolder(tmp_path / "b").fingerprint != first


def test_old_rotary_buffers_and_an_equal_tied_copy_are_tolerated(tmp_path):
    write(tmp_path / "hf")
    embedding = load_file(tmp_path / "hf/model.safetensors")["model.embed_tokens.weight"]
    change_tensors(
        tmp_path / "hf",
        lm_head__weight=embedding.clone(),
        model__layers__1__self_attn__rotary_emb__inv_freq=torch.ones(2),
    )
    assert HfFolder(tmp_path / "hf").config == TIED


REFUSED_TENSORS = [
    ({"model__norm__weight": None}, r"missing model\.norm\.weight; unknown none"),
    ({"model__extra": torch.ones(2)}, r"missing none; unknown model\.extra"),
    ({"model__layers__2__input_layernorm__weight": torch.ones(16)}, r"unknown model\.layers\.2"),
    ({"model__norm__weight": torch.ones(15)}, r"model\.norm\.weight .*\[15\].*\[16\]"),
    ({"model__norm__weight": torch.ones(16).to(torch.int8)}, "of type I8.*quantized"),
    ({"lm_head__weight": torch.zeros(37, 16)}, "the two differ.*tie_word_embeddings"),
    (
        {f"model__layers__{n}__self_attn__q_proj__bias": None for n in (0, 1)},
        r"missing model\.layers\.0\.self_attn\.q_proj\.bias, model\.layers\.1",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED_TENSORS)
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(tmp_path, change, message):
    write(tmp_path / "hf")
    HfFolder(tmp_path / "hf")
    change_tensors(tmp_path / "hf", **change)
    with pytest.raises(CheckpointError, match=message):
        HfFolder(tmp_path / "hf")


def test_an_untied_config_over_tied_weights_is_refused(tmp_path):
    write(tmp_path / "hf")
    change_config(tmp_path / "hf", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight"):
        HfFolder(tmp_path / "hf")


def test_an_unsupported_config_is_refused_with_the_folder_in_the_message(tmp_path):
    write(tmp_path / "hf")
    change_config(tmp_path / "hf", use_sliding_window=True)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/hf/config.json: use_sliding")):
        HfFolder(tmp_path / "hf")


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_weights_are_refused(tmp_path, keep):
    file = write(tmp_path / "hf") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        HfFolder(tmp_path / "hf")


def test_a_missing_shard_a_wrong_index_and_an_escaping_name_are_refused(tmp_path):
    path = write(tmp_path / "hf", max_shard_bytes=4096)
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shards = sorted(set(index["weight_map"].values()))

    def with_norm_in(shard: str | None) -> str:
        return json.dumps({"weight_map": index["weight_map"] | {"model.norm.weight": shard}})

    true_shard = index["weight_map"]["model.norm.weight"]
    file.write_text(with_norm_in(next(name for name in shards if name != true_shard)))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is not in model-0"):
        HfFolder(path)
    file.write_text(with_norm_in("../model.safetensors"))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        HfFolder(path)
    file.write_text(with_norm_in(true_shard))
    (path / true_shard).unlink()
    with pytest.raises(CheckpointError, match=f"{true_shard} is missing"):
        HfFolder(path)


def test_no_folder_and_no_weights_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        HfFolder(tmp_path)
    assert not is_hf_folder(tmp_path)
    write(tmp_path / "hf")
    assert is_hf_folder(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors, .*pytorch_model\.bin,"):
        HfFolder(tmp_path / "hf")


def test_any_part_of_a_parameter_is_read_without_the_rest(tmp_path):
    folder = HfFolder(write(tmp_path / "hf", UNTIED))
    generator = torch.Generator().manual_seed(1)
    for key, layer, tensor in parameters(UNTIED):
        for _ in range(5):
            ends = [torch.randint(0, size + 1, (2,), generator=generator).sort().values.tolist()
                    for size in tensor.shape]  # fmt: skip
            box = tuple(slice(*pair) for pair in ends)
            out = torch.full([stop - start for start, stop in ends], torch.nan)
            folder.read(key, layer, box, out)
            assert torch.equal(out, tensor[box]), (key, layer, box)


def test_weights_go_into_no_other_shape():
    check_same_shape(dataclasses.replace(TIED, make_vocab_size_divisible_by=32), TIED, "here")
    changes = {
        "num_layers": 1, "rotary_base": 1e4, "kv_channels": 8, "qk_layernorm": True,
        "vocab_size": 38,
    }  # fmt: skip
    for name, value in changes.items():
        with pytest.raises(CheckpointError, match=name):
            check_same_shape(dataclasses.replace(TIED, **{name: value}), TIED, "here")


def test_a_source_refuses_parameters_without_a_rule_and_of_another_shape(tmp_path):
    folder = HfFolder(write(tmp_path / "hf"))
    for wanted, message in [
        (("output_layer.weight", None, (128, 16)), r"no parameter output_layer\.weight"),
        (("decoder.final_layernorm.weight", 0, (16,)), "no parameter.*layer 0"),
        (("decoder.final_layernorm.weight", None, (15,)), r"\[15\].*\[16\]"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            folder.load(wanted, torch.float32)


def pickled(path: Path, *, shards: int = 1) -> Path:
    """The same folder with PyTorch's files instead of safetensors."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, path / "pytorch_model.bin")
        return path
    names = [f"pytorch_model-{at + 1:05d}-of-{shards:05d}.bin" for at in range(shards)]
    weight_map = {name: names[at % shards] for at, name in enumerate(tensors)}
    for file in names:
        part = {name: tensors[name] for name, its in weight_map.items() if its == file}
        torch.save(part, path / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_folders_hold_the_same_model(tmp_path, shards):
    expected = dict(HfFolder(write(tmp_path / "hf", UNTIED)))
    folder = HfFolder(pickled(tmp_path / "hf", shards=shards))
    assert set(folder) == set(expected)
    assert all(torch.equal(folder[name], tensor) for name, tensor in expected.items())
    for key, layer, tensor in parameters(UNTIED):
        out = torch.empty_like(tensor)
        folder.read(key, layer, whole(tensor.shape), out)
        assert torch.equal(out, tensor)


class Malicious:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["beside", "instead"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, where):
    file = pickled(write(tmp_path / "hf")) / "pytorch_model.bin"
    trap = Malicious(f"touch {tmp_path}/ran")
    tensors = torch.load(file, weights_only=True)
    torch.save({**tensors, "trap": trap} if where == "beside" else trap, file)
    with pytest.raises(CheckpointError, match="could run code"):
        HfFolder(tmp_path / "hf")
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists(), "the trap must work, or its refusal shows nothing"


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_truncated_pickled_weights_are_refused(tmp_path, keep):
    file = pickled(write(tmp_path / "hf")) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        HfFolder(tmp_path / "hf")


def given_twice(config: ModelConfig) -> Parameters:
    yield from parameters(config)
    yield next(parameters(config))


def without_last(config: ModelConfig) -> Parameters:
    yield from list(parameters(config))[:-1]


def unknown(config: ModelConfig) -> Parameters:
    yield "decoder.surprise", None, torch.ones(1)


def of_a_layer_too_many(config: ModelConfig) -> Parameters:
    yield "decoder.layers.mlp.linear_fc1.layer_norm_weight", 2, torch.ones(16)


def diverged(config: ModelConfig) -> Parameters:
    for key, layer, tensor in parameters(config):
        tensor.view(-1)[-1] = float("nan")
        yield key, layer, tensor


def killed(config: ModelConfig) -> Parameters:
    yield next(parameters(config))
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (given_twice, CheckpointError, "given twice"),
        (without_last, CheckpointError, r"1 parameters were not given.*final_layernorm"),
        (unknown, CheckpointError, r"decoder\.surprise.*no rule"),
        (of_a_layer_too_many, CheckpointError, "layer 2.*out of range"),
        (diverged, CheckpointError, "NaN"),
        (killed, KeyboardInterrupt, ""),
    ],
)
def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path, source, error, message):
    kept = write(tmp_path / "old")
    before = HfFolder(kept).fingerprint
    for path in (tmp_path / "new", kept):
        with pytest.raises(error, match=message):
            write_hf_folder(path, TIED, source(TIED), dtype=torch.float32, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]
    assert HfFolder(kept).fingerprint == before


def test_an_existing_folder_is_replaced_only_when_asked_and_only_if_a_conversion_made_it(tmp_path):
    path = write(tmp_path / "hf")
    (path / "stale.txt").write_text("from the first write")
    with pytest.raises(ConfigError, match="--overwrite"):
        write(path)
    write(path, UNTIED, overwrite=True)
    assert HfFolder(path).config == UNTIED
    assert not (path / "stale.txt").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]
    home = tmp_path / "home"
    home.mkdir()
    write(home)  # an empty folder is as good as none
    manifest = json.loads((home / "manifest.json").read_text())
    for foreign in ({**manifest, "kind": "scores"}, None):  # None: a downloaded model has none
        (home / "manifest.json").write_text(json.dumps(foreign))
        if foreign is None:
            (home / "manifest.json").unlink()
        with pytest.raises(ConfigError, match=r"was not made by `convert`.*does not remove"):
            write(home, overwrite=True)
        assert HfFolder(home).config == TIED


def test_leftovers_of_a_killed_write_are_removed_by_the_next(tmp_path):
    (tmp_path / ".hf.partial").mkdir()
    (tmp_path / ".hf.partial/part-0.safetensors").write_bytes(b"half")
    write(tmp_path / "hf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_token_ids_card_and_tokenizer_are_in_the_folder(tmp_path, tiny_tokenizer):
    ids = {"bos_token_id": 0, "eos_token_id": [0, 36]}
    lineage = {"objective": "lm | kd", "iterations": 100}
    extras = HfExtras(token_ids=ids, lineage=lineage, tokenizer_folder=tiny_tokenizer)
    folder = HfFolder(write(tmp_path / "hf", extras=extras))
    assert folder.token_ids == ids
    assert json.loads((folder.path / "generation_config.json").read_text())["eos_token_id"] == [
        0,
        36,
    ]
    card = (folder.path / "README.md").read_text()
    assert "| objective | lm \\| kd |" in card
    assert "| iterations | 100 |" in card
    copied = (folder.path / "tokenizer.json").read_bytes()
    assert copied == (tiny_tokenizer / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("ids", [{"eos_token_id": 37}, {"eos_token_id": -1}, {"foo": 1}])
def test_token_ids_outside_the_vocabulary_or_unknown_are_refused(tmp_path, ids):
    with pytest.raises(ConfigError, match=next(iter(ids))):
        write(tmp_path / "hf", extras=HfExtras(token_ids=ids))


def test_a_folder_without_tokenizer_files_is_refused_as_tokenizer(tmp_path):
    with pytest.raises(DataError, match="holds no tokenizer"):
        write(tmp_path / "hf", extras=HfExtras(tokenizer_folder=tmp_path))
    assert not (tmp_path / "hf").exists()
