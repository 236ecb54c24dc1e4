"""What every registered family must do, on tiny random models that `transformers` itself made.

The folders are written by `save_pretrained`, so names, layouts and config.json are those of the
installed transformers and not of our own writer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_miniplm.data.tokenizers import load_tokenizer
from megatron_miniplm.models.decoder import LLAMA3_SCALING
from megatron_miniplm.models.family import ModelFamily, all_families
from megatron_miniplm.models.flops import count_parameters, forward_flops_per_token
from megatron_miniplm.models.hf_folder import HfFolder
from megatron_miniplm.models.hf_writer import HfExtras, write_hf_folder
from megatron_miniplm.models.mamba_layer import MAMBA as MAMBA_LAYERS

transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")

BASE = {
    "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 203, "max_position_embeddings": 16384,
    "attn_implementation": "eager",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model to make: architecture and what differs from BASE."""

    architecture: str
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


MAMBA_BASE = {"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 203}
QWEN, LLAMA = "Qwen2ForCausalLM", "LlamaForCausalLM"
QWEN3, MISTRAL = "Qwen3ForCausalLM", "MistralForCausalLM"
MAMBA = "MambaForCausalLM"
ROPE = {"rope_theta": 1e6, "rope_type": "default"}
LLAMA3 = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, **LLAMA3_SCALING}
CASES = {
    "qwen-gqa-tied": Case(
        architecture=QWEN, settings={"tie_word_embeddings": True, "rope_parameters": ROPE}
    ),
    "qwen-mha-untied": Case(architecture=QWEN, settings={"num_key_value_heads": 6}),
    "qwen-bfloat16": Case(architecture=QWEN, dtype=torch.bfloat16),
    "qwen-padded-like-the-real-one": Case(
        architecture=QWEN, settings={"vocab_size": 256, "tie_word_embeddings": True}
    ),
    "llama-gqa-untied": Case(architecture=LLAMA),
    "llama-mqa-tied": Case(
        architecture=LLAMA, settings={"num_key_value_heads": 1, "tie_word_embeddings": True}
    ),
    "llama3-rope": Case(architecture=LLAMA, settings={"rope_parameters": LLAMA3}),
    "llama-wide-heads": Case(architecture=LLAMA, settings={"head_dim": 16}),
    "qwen3-gqa-tied-wide-heads": Case(
        architecture=QWEN3, settings={"head_dim": 16, "tie_word_embeddings": True}
    ),
    "qwen3-mha-untied": Case(
        architecture=QWEN3, settings={"head_dim": 8, "num_key_value_heads": 6}
    ),
    "mistral-gqa-untied": Case(architecture=MISTRAL, settings={"sliding_window": None}),
    "mistral-window-of-the-whole-context": Case(
        architecture=MISTRAL, settings={"sliding_window": 16384, "tie_word_embeddings": True}
    ),
    "mistral-bfloat16-odd-width-a-head": Case(
        architecture=MISTRAL,
        settings={"sliding_window": None, "head_dim": 10},
        dtype=torch.bfloat16,
    ),
    "mamba": Case(architecture=MAMBA),
    "mamba-other-widths": Case(
        architecture=MAMBA,
        settings={"state_size": 5, "conv_kernel": 3, "expand": 3, "time_step_rank": 7},
    ),
    "mamba-bfloat16": Case(architecture=MAMBA, dtype=torch.bfloat16),
}


def make(case: Case, path: Path) -> Any:
    """A random model of that case, saved to `path`; norms and biases are random too."""
    torch.manual_seed(1)
    model_class = getattr(transformers, case.architecture)
    base = MAMBA_BASE if case.architecture == MAMBA else BASE
    config = model_class.config_class(**{**base, **case.settings})
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.to(case.dtype).save_pretrained(path)
    # Loaded rather than cast: a cast would round the rotary frequencies too.
    return load(path)


def load(path: Path) -> Any:
    """A folder as transformers loads it; every tensor must be found and used."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory) -> tuple[Any, HfFolder]:
    """(transformers model, its folder as we read it)."""
    path = tmp_path_factory.mktemp("hf") / request.param
    return make(CASES[request.param], path), HfFolder(path)


def global_tensors(folder: HfFolder):
    """Every parameter of the folder as (megatron key, layer, global tensor)."""
    dtype = next(iter(folder.values())).dtype
    for parameter in folder.parameters():
        yield *parameter[:2], folder.load(parameter, dtype)


def test_cases_cover_every_registered_family():
    claimed = {kind for family in all_families() for kind in family.architectures}
    assert claimed == {case.architecture for case in CASES.values()}


def test_shape_is_that_of_the_model(made):
    model, folder = made
    theirs, ours = model.config, folder.config
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.untie_embeddings_and_output_weights != theirs.tie_word_embeddings
    assert ours.vocab_size == theirs.vocab_size
    assert count_parameters(ours) == model.num_parameters()
    if folder.family.architecture is MAMBA_LAYERS:
        assert ours.ffn_hidden_size == theirs.intermediate_size
        assert ours.norm_epsilon == theirs.layer_norm_epsilon
        return
    assert ours.query_groups == theirs.num_key_value_heads
    assert ours.head_dim == model.model.layers[0].self_attn.head_dim
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.rotary_base == theirs.rope_parameters["rope_theta"]
    assert ours.use_rope_scaling == (theirs.rope_parameters["rope_type"] == "llama3")


def test_to_megatron_and_back_is_bitwise_equal_and_loads_in_transformers(made, tmp_path):
    model, folder = made
    dtype = next(model.parameters()).dtype
    write_hf_folder(tmp_path / "hf", folder.config, global_tensors(folder), dtype=dtype)
    back = HfFolder(tmp_path / "hf")
    assert back.config == folder.config
    assert set(back) == set(folder)
    for name, tensor in folder.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name

    again = load(tmp_path / "hf")
    assert type(again) is type(model)
    assert again.dtype == dtype
    if folder.family.architecture is not MAMBA_LAYERS:
        assert again.config.rope_parameters == model.config.rope_parameters
    tokens = torch.arange(0, 200, 7)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_vocabulary_padding_is_zero_and_does_not_reach_the_folder(made):
    _, folder = made
    vocab, padded = folder.config.vocab_size, folder.config.padded_vocab_size
    whole = {key: tensor for key, layer, tensor in global_tensors(folder) if layer is None}
    embedding = whole["embedding.word_embeddings.weight"]
    assert embedding.shape[0] == padded == 256
    assert not embedding[vocab:].any()
    (name,) = (name for name in folder if "embed" in name)
    assert folder[name].shape[0] == vocab


def test_forward_flops_equal_a_count_of_the_matrix_products_of_transformers(made):
    from torch.utils.flop_counter import FlopCounterMode

    model, folder = made
    config, length = folder.config, 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    if folder.family.architecture is MAMBA_LAYERS:
        # The scan is no matrix product but for its readout; the convolution runs over its padding.
        states = config.ffn_hidden_size * config.mamba_state_dim * length
        padded = config.mamba_conv_kernel * config.ffn_hidden_size * (config.mamba_conv_kernel - 1)
        different = 2 * config.num_layers * (padded - 2 * states)
    else:
        # Ours halves attention, which is causal; transformers does not.
        query = config.num_attention_heads * config.head_dim
        different = 2 * config.num_layers * query * length * length
    # Ours counts the padded head.
    padding = 2 * config.hidden_size * (config.padded_vocab_size - config.vocab_size) * length
    expected = counter.get_total_flops() - different + padding
    assert forward_flops_per_token(config, length) * length == expected


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
def test_presets_are_understood_by_transformers(family: ModelFamily, tmp_path):
    for preset in family.presets.values():
        raw = family.config_to_hf(preset)
        (tmp_path / "config.json").write_text(json.dumps(raw))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(theirs)
        assert model.num_parameters() == count_parameters(preset)
        if family.architecture is not MAMBA_LAYERS:
            assert theirs.rope_parameters["rope_theta"] == preset.rotary_base
        assert family.config_from_hf(theirs.to_dict()) == family.config_from_hf(raw)


def test_written_tokenizer_loads_in_transformers(tmp_path, tiny_tokenizer):
    path = tmp_path / "model"
    make(CASES["qwen-gqa-tied"], path)
    folder = HfFolder(path)
    saved = load_tokenizer(tiny_tokenizer)
    saved.save(tmp_path / "saved")
    extras = HfExtras(tokenizer_folder=tmp_path / "saved")
    write_hf_folder(
        tmp_path / "hf", folder.config, global_tensors(folder), dtype=torch.float32, extras=extras
    )
    text = "def test(path): return 'naïve \N{SNOWMAN}'\n"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == saved.eod_id
    assert tokenizer.model_max_length == folder.config.max_position_embeddings
