"""``convert`` both ways on tiny models, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.config import parse_flags, write_run
from megatron_miniplm.core.errors import CheckpointError, ConfigError, LineageError, MiniPLMError
from megatron_miniplm.data.staging import exclusive
from megatron_miniplm.data.tokenizers import load_saved, load_tokenizer
from megatron_miniplm.models.checkpoint import latest_checkpoint, read_trained_model
from megatron_miniplm.models.family import ModelConfig, get_family
from megatron_miniplm.models.global_tensors import GlobalTensors
from megatron_miniplm.models.hf_folder import HfFolder
from megatron_miniplm.models.hf_writer import HfExtras, write_hf_folder
from megatron_miniplm.stages import convert

QWEN = ModelConfig(
    model_family="qwen", num_layers=3, hidden_size=24, ffn_hidden_size=20, num_attention_heads=6,
    num_query_groups=2, vocab_size=519,
)  # fmt: skip
LLAMA = dataclasses.replace(
    QWEN, model_family="llama", add_qkv_bias=False, num_query_groups=6,
    untie_embeddings_and_output_weights=True, use_rope_scaling=True,
)  # fmt: skip


MAMBA = ModelConfig(
    model_family="mamba", num_layers=2, hidden_size=16, ffn_hidden_size=32, vocab_size=519,
    num_attention_heads=1, add_qkv_bias=False, norm_epsilon=1e-5,
)  # fmt: skip
BACK = ["--from", "megatron", "--to", "hf", "--load", "a", "--save", "b"]


@pytest.fixture(params=[QWEN, LLAMA], ids=["qwen-gqa-tied", "llama-mha-untied"])
def hf(request, tmp_path, tiny_tokenizer) -> Path:
    """A Hugging Face folder with random weights and a tokenizer of 512 entries."""
    return make(request.param, tmp_path / "hf", tiny_tokenizer)


@pytest.fixture
def qwen(tmp_path, tiny_tokenizer) -> Path:
    """The first of `hf` only, for what does not depend on the family."""
    return make(QWEN, tmp_path / "hf", tiny_tokenizer)


def make(config: ModelConfig, path: Path, tokenizer: Path, dtype=torch.float32) -> Path:
    def parameters():
        generator = torch.Generator().manual_seed(5)
        for rule in get_family(config.model_family).rules(config):
            for layer in range(config.num_layers) if rule.per_layer else (None,):
                parts = [torch.randn(shape, generator=generator) for shape in rule.hf_shapes]
                named = dict(zip(rule.hf_names(layer), parts, strict=True))
                yield rule.megatron, layer, rule.to_megatron(named, layer)

    ids = {"bos_token_id": 3, "eos_token_id": [4, 5]}
    extras = HfExtras(tokenizer_folder=tokenizer, token_ids=ids)
    write_hf_folder(path, config, parameters(), dtype=dtype, extras=extras)
    return path


def run(source: str, load: Path, to: str, save: Path, *more: str) -> None:
    words = ["--from", source, "--load", str(load), "--to", to, "--save", str(save), *more]
    convert.run(parse_flags(convert.Config, words, prog="convert"))


def assert_equal(first: HfFolder, second: HfFolder) -> None:
    assert first.config == second.config
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def test_there_and_back_is_bitwise_equal(hf, tmp_path):
    run("hf", hf, "megatron", tmp_path / "megatron")
    run("megatron", tmp_path / "megatron", "hf", tmp_path / "back")
    first, second = HfFolder(hf), HfFolder(tmp_path / "back")
    assert_equal(first, second)
    assert second.token_ids == {"bos_token_id": 3, "eos_token_id": [4, 5]}
    assert (hf / "tokenizer.json").read_bytes() == (tmp_path / "back/tokenizer.json").read_bytes()
    assert first.fingerprint in (tmp_path / "back/README.md").read_text()


def test_the_checkpoint_names_its_tokenizer_and_its_parent(qwen, tmp_path, tiny_tokenizer):
    run("hf", qwen, "megatron", tmp_path / "megatron")
    manifest, trained = read_trained_model(latest_checkpoint(tmp_path / "megatron"))
    assert trained.config == HfFolder(qwen).config
    assert trained.valid_vocab == 512
    assert trained.tokenizer_fingerprint == load_tokenizer(tiny_tokenizer).fingerprint
    assert load_saved(tmp_path / "megatron/tokenizer").fingerprint == trained.tokenizer_fingerprint
    assert manifest.parents["huggingface"].fingerprint == HfFolder(qwen).fingerprint


def test_bfloat16_weights_survive_a_float32_detour(tmp_path, tiny_tokenizer):
    hf = make(QWEN, tmp_path / "hf", tiny_tokenizer, torch.bfloat16)
    for dtype in ("float32", "bfloat16"):
        run("hf", hf, "megatron", tmp_path / dtype, "--dtype", dtype)
        back = tmp_path / f"back-{dtype}"
        run("megatron", tmp_path / dtype, "hf", back, "--dtype", "bfloat16")
        assert_equal(HfFolder(hf), HfFolder(back))
    wide = tmp_path / "wide"
    run("megatron", tmp_path / "bfloat16", "hf", wide, "--dtype", "float32")
    for name, tensor in HfFolder(hf).items():
        assert torch.equal(tensor.float(), HfFolder(wide)[name])


def test_a_run_file_repeats_a_conversion(qwen, tmp_path):
    words = ["--from", "hf", "--load", str(qwen), "--to", "megatron", "--save", str(tmp_path / "m")]
    asked = parse_flags(convert.Config, words, prog="convert")
    write_run(tmp_path / "run.json", "convert", asked)
    words = ["--from-run", str(tmp_path / "run.json")]
    assert parse_flags(convert.Config, words, prog="convert") == asked


def test_a_finished_result_is_replaced_only_when_asked(qwen, tmp_path):
    run("hf", qwen, "megatron", tmp_path / "megatron")
    run("megatron", tmp_path / "megatron", "hf", tmp_path / "back")
    for arguments in (
        ("hf", qwen, "megatron", tmp_path / "megatron"),
        ("megatron", tmp_path / "megatron", "hf", tmp_path / "back"),
    ):
        with pytest.raises(ConfigError, match="--overwrite"):
            run(*arguments)
        run(*arguments, "--overwrite")
    assert_equal(HfFolder(qwen), HfFolder(tmp_path / "back"))


def test_overwriting_a_run_removes_its_other_iterations(qwen, tmp_path):
    run("hf", qwen, "megatron", tmp_path / "megatron")
    later = tmp_path / "megatron/iter_0000007"
    (tmp_path / "megatron/iter_0000000").rename(later)
    (tmp_path / "megatron/latest_checkpointed_iteration.txt").write_text("7\n")
    run("hf", qwen, "megatron", tmp_path / "megatron", "--overwrite")
    assert not later.exists()
    assert latest_checkpoint(tmp_path / "megatron").name == "iter_0000000"


def test_a_failed_conversion_to_megatron_keeps_the_old_checkpoint(qwen, tmp_path):
    run("hf", qwen, "megatron", tmp_path / "megatron")
    before = read_trained_model(latest_checkpoint(tmp_path / "megatron"))
    weights = qwen / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        run("hf", qwen, "megatron", tmp_path / "megatron", "--overwrite")
    assert read_trained_model(latest_checkpoint(tmp_path / "megatron")) == before


def test_a_corrupt_checkpoint_gives_no_folder(qwen, tmp_path):
    run("hf", qwen, "megatron", tmp_path / "megatron")
    part = next((tmp_path / "megatron").glob("iter_*/*.distcp"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(CheckpointError, match="corrupt"):
        run("megatron", tmp_path / "megatron", "hf", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, tiny_tokenizer):
    small = dataclasses.replace(QWEN, vocab_size=500)
    hf = make(small, tmp_path / "hf", tiny_tokenizer)
    with pytest.raises(ConfigError, match=r"500 logit columns.*512 tokens"):
        run("hf", hf, "megatron", tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_another_tokenizer_than_the_checkpoints_is_refused(tmp_path, tiny_tokenizer):
    hf = make(QWEN, tmp_path / "hf", tiny_tokenizer)
    run("hf", hf, "megatron", tmp_path / "megatron")
    other = tmp_path / "other"
    other.mkdir()
    raw = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    first, second = [name for name in vocabulary if len(name) == 1][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(LineageError, match="is not the tokenizer"):
        run(
            "megatron", tmp_path / "megatron", "hf", tmp_path / "back",
            "--tokenizer-model", str(other),
        )  # fmt: skip
    (tmp_path / "megatron/tokenizer/tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(MiniPLMError, match="fingerprint"):
        run("megatron", tmp_path / "megatron", "hf", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_run_folder_with_a_foreign_tokenizer_is_refused(qwen, tmp_path, tiny_tokenizer):
    run("hf", qwen, "megatron", tmp_path / "megatron")
    raw = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    foreign = tmp_path / "tokenizer.json"
    foreign.write_text(json.dumps(raw | {"truncation": None}, indent=1))
    load_tokenizer(foreign).save(tmp_path / "megatron/tokenizer")
    with pytest.raises(LineageError, match="but the checkpoint was trained with"):
        run("megatron", tmp_path / "megatron", "hf", tmp_path / "back")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "hf", "--to", "hf", "--load", "a", "--save", "b"], "nothing to convert"),
        (["--from", "hf", "--to", "megatron", "--load", "a", "--save", "a"], "are both"),
        ([*BACK, "--eod-token", "x"], "--eod-token x says how to read --tokenizer-model"),
        ([*BACK, "--tokenizer-type", "SentencePieceTokenizer"], "--tokenizer-type Sent.* which is"),
        ([*BACK, "--tensor-model-parallel-size", "0"], "0 must be at least 1"),
    ],
)
def test_senseless_flags_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_flags(convert.Config, words, prog="convert")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tensor-model-parallel-size", "4"], r"--num-attention-heads \(6\) cannot.* 4 ranks"),
        (["--pipeline-model-parallel-size", "4"], "--num-layers 3 are not enough for.* 4 stages"),
    ],
)
def test_one_process_refuses_a_layout_of_many_that_does_not_divide_the_model(
    flags, message, qwen, tmp_path
):
    with pytest.raises(ConfigError, match=message):
        run("hf", qwen, "megatron", tmp_path / "megatron", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_one_process_accepts_a_layout_of_many(qwen, tmp_path):
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "3"]
    run("hf", qwen, "megatron", tmp_path / "megatron", *layout)
    assert latest_checkpoint(tmp_path / "megatron")


def test_what_must_stay_is_refused_before_the_source_is_looked_at(qwen, tmp_path):
    run("hf", qwen, "megatron", tmp_path / "megatron")
    with pytest.raises(ConfigError, match="hf exists; choose another"):
        run("megatron", tmp_path / "none", "hf", qwen)
    with pytest.raises(ConfigError, match="holds a checkpoint"):
        run("hf", tmp_path / "none", "megatron", tmp_path / "megatron")


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_two_conversions_do_not_share_a_place(to, tmp_path):
    source = "megatron" if to == "hf" else "hf"
    lock = tmp_path / ".out.lock"
    with (
        exclusive(lock, wait=False),
        pytest.raises(ConfigError, match=r"another process is writing .*/out:"),
    ):
        run(source, tmp_path / "none", to, tmp_path / "out")
    assert lock.exists(), "it belongs to the other one"


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"])
def test_a_text_that_cannot_be_verified_on_is_refused_before_the_source_is_looked_at(
    content, tmp_path
):
    pytest.importorskip("transformers", reason="the [hf] extra is not installed")
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    flags = ["--verify", "--verify-text", str(text)]
    with pytest.raises(ConfigError, match=r"--verify-text .* is (not a UTF-8 text|empty)"):
        run("hf", tmp_path / "none", "megatron", tmp_path / "out", *flags)


def test_a_chunk_that_is_no_tensor_is_refused(qwen, tmp_path):
    run("hf", qwen, "megatron", tmp_path / "megatron")
    source = GlobalTensors(latest_checkpoint(tmp_path / "megatron"))
    key = "decoder.final_layernorm.weight"
    place = source._metadata.storage_data[MetadataIndex(key, torch.Size([0]))]
    with (source.folder / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\x80\x02cos\nsystem\n." + bytes(place.length - 16))
    with pytest.raises(CheckpointError, match=f"{key} cannot be read"):
        source.load((key, None, (24,)), torch.float32)


@pytest.mark.parametrize(("shape", "expected"), [(QWEN, True), (MAMBA, False)])
def test_states_of_modules_that_a_model_lacks_are_not_saved(
    shape, expected, tmp_path, tiny_tokenizer
):
    run("hf", make(shape, tmp_path / "hf", tiny_tokenizer), "megatron", tmp_path / "m")
    stored = GlobalTensors(latest_checkpoint(tmp_path / "m"))._metadata.state_dict_metadata
    assert any("_extra_state" in name for name in stored) == expected


def test_the_command_ends_with_code_2_and_no_folder_on_missing_input(tmp_path):
    words = ["convert", "--from", "megatron", "--load", str(tmp_path / "none"), "--to", "hf"]
    assert main([*words, "--save", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
