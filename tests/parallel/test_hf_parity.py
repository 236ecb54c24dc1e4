"""A converted Hugging Face model computes what `transformers` computes, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_miniplm.__main__ import main
from tests.pool import RankPool

transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")

TOLERANCE = 1e-5  # fp32; logits are of order 1

BASE: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 205, "max_position_embeddings": 16384,
    "attn_implementation": "eager", "initializer_range": 0.12,
}  # fmt: skip
MAMBA = {"hidden_size": 48, "num_hidden_layers": 4, "vocab_size": 205, "time_step_rank": 5}
LLAMA3 = {
    "rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
NO_WINDOW = {"sliding_window": None}
MODELS = {
    "qwen, GQA, tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen, MHA, untied": ("Qwen2ForCausalLM", {"num_key_value_heads": 4}),
    "llama, GQA, untied": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "qwen3, GQA, tied, wide heads": (
        "Qwen3ForCausalLM", {"tie_word_embeddings": True, "head_dim": 16},
    ),
    "mistral, MHA, untied": (
        "MistralForCausalLM", {"num_key_value_heads": 4, "sliding_window": None},
    ),
    "mamba": ("MambaForCausalLM", {}),
}  # fmt: skip
LAYOUTS = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
}
# Every family with every kind of attention, tied and untied, at sizes that padding must fill up.
MATRIX = {
    f"{architecture}, {groups} groups, {'tied' if tied else 'untied'}, {vocab}": (
        f"{architecture}ForCausalLM",
        {
            "num_key_value_heads": groups, "tie_word_embeddings": tied, "vocab_size": vocab,
            **(NO_WINDOW if architecture == "Mistral" else {}),
        },
    )
    for architecture in ("Qwen2", "Qwen3", "Llama", "Mistral")
    for groups in (2, 4)
    for tied in (True, False)
    for vocab in (131, 384)
}  # fmt: skip
BOTH = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


def make(folder: Path, model: tuple[str, dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, logits) of a tiny random model, saved; biases and norms are random too."""
    architecture, settings = model
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    base = MAMBA if architecture.startswith("Mamba") else BASE
    config = cls.config_class(**{**base, **settings})
    made = cls(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3)
    made.save_pretrained(folder)
    ids = torch.randint(0, config.vocab_size, (2, 40))
    with torch.no_grad():
        return ids, made(ids).logits


@pytest.fixture(scope="module", params=MODELS)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """(folder, ids, logits) of a model."""
    folder = tmp_path_factory.mktemp("hf")
    return folder, *make(folder, MODELS[request.param])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_those_of_transformers(
    layout: str, made: tuple[Path, torch.Tensor, torch.Tensor], pool: RankPool
) -> None:
    folder, ids, expected = made
    world, flags = LAYOUTS[layout]
    results = pool.run(
        "tests.parallel.jobs:hf_logits", world, folder=str(folder), ids=ids, flags=flags
    )
    answers = [found for found in results if found is not None]
    assert len(answers) == flags.get("tensor_model_parallel_size", 1), "the last stage answers"
    for found in answers:
        worst = float((found - expected).abs().max())
        print(f"\n{layout}: max |logit - transformers' logit| = {worst:.2e}")
        assert expected.std() > 0.2, "logits must vary, or parity shows nothing"
        assert worst <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("model", MATRIX)
def test_logits_of_the_whole_matrix_at_tp2_pp2(model: str, pool: RankPool, tmp_path: Path) -> None:
    ids, expected = make(tmp_path, MATRIX[model])
    job = "tests.parallel.jobs:hf_logits"
    found = pool.run(job, 4, folder=str(tmp_path), ids=ids, flags=BOTH)
    for logits in (one for one in found if one is not None):
        assert float((logits - expected).abs().max()) <= TOLERANCE


def test_checkpoint_converts_back_to_the_very_same_tensors(
    made: tuple[Path, torch.Tensor, torch.Tensor], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    folder, _, _ = made
    small = tmp_path / "tokenizer"
    _shrink_tokenizer(tiny_tokenizer, small)
    there = ["--from", "hf", "--to", "megatron", "--load", str(folder)]
    back = ["--from", "megatron", "--to", "hf", "--load", str(tmp_path / "m")]
    tokenizer = ["--tokenizer-model", str(small)]
    assert main(["convert", *there, *tokenizer, "--save", str(tmp_path / "m")]) == 0
    assert main(["convert", *back, "--save", str(tmp_path / "hf")]) == 0
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def _shrink_tokenizer(source: Path, target: Path) -> None:
    """The tiny tokenizer cut to 200 entries, fewer than the models' 205 logit columns."""
    import json

    raw = json.loads((source / "tokenizer.json").read_text())
    raw["model"]["vocab"] = {token: at for token, at in raw["model"]["vocab"].items() if at < 200}
    raw["model"]["merges"] = []
    target.mkdir()
    (target / "tokenizer.json").write_text(json.dumps(raw))
