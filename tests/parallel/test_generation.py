"""Generation on Megatron models: the tokens of transformers, and the same in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.generate import Prompts, generate
from megatron_miniplm.models.sampling import Sampler, SamplingConfig
from tests.parallel.generation_jobs import continued, models_of
from tests.parallel.test_hf_parity import LLAMA3, NO_WINDOW, make
from tests.pool import RankFailedError, RankPool

transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")

MODELS = {
    "qwen, GQA, tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "llama, GQA, untied": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "qwen3, GQA, wide heads": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "mistral, MHA, untied": ("MistralForCausalLM", {"num_key_value_heads": 4, **NO_WINDOW}),
}
PROMPTS = [np.random.default_rng(at).integers(0, 205, size) for at, size in enumerate((9, 5, 17))]
LIMITS = [40, 33, 40]
IDS = [12, 7, 1_000_003]
STOP = 7
SAMPLE = {"decoding": "sample", "seed": 3}
GREEDY = {"decoding": "greedy"}
JOB = "tests.parallel.generation_jobs:continued"


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hf")
    make(made, MODELS[request.param])
    return made


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hf")
    make(made, MODELS["qwen, GQA, tied"])
    return made


def asked(**changes: Any) -> dict[str, Any]:
    usual = {"prompts": PROMPTS, "ids": IDS, "limits": LIMITS, "sampling": SAMPLE, "batch": 3}
    return {**usual, **changes}


def theirs(folder: Path, prompt: np.ndarray, limit: int, stop: int | None) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(prompt)[None]
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_length=limit,
            eos_token_id=stop, pad_token_id=0,
        )  # fmt: skip
    return found[0].tolist()


def test_greedy_is_that_of_transformers_token_for_token(folder: Path) -> None:
    ours, _ = continued([str(folder)], **asked(sampling=GREEDY))
    expected = [theirs(folder, *row, None) for row in zip(PROMPTS, LIMITS, strict=True)]
    assert len({tuple(row[20:30]) for row in expected}) > 1, "prompts matter"
    assert ours == expected


def test_a_row_ends_with_the_first_separator_that_it_draws(folder: Path) -> None:
    endless, _ = continued([str(folder)], **asked(sampling=GREEDY))
    stop = endless[1][20]
    prompts = [np.append(stop, prompt) for prompt in PROMPTS]  # one inside a prompt ends nothing
    ours, parts = continued(
        [str(folder)], **asked(sampling=GREEDY, prompts=prompts, stop_id=int(stop))
    )
    rows = zip(prompts, LIMITS, strict=True)
    assert ours == [theirs(folder, *row, int(stop)) for row in rows]
    assert (parts[0].lengths_b > parts[0].prompt_lengths_b).all()


def test_draws_do_not_depend_on_the_batch(qwen: Path) -> None:
    whole, _ = continued([str(qwen)], **asked(stop_id=STOP))
    for batch in (1, 2):
        assert continued([str(qwen)], **asked(batch=batch, stop_id=STOP))[0] == whole
    backwards = asked(prompts=PROMPTS[::-1], ids=IDS[::-1], limits=LIMITS[::-1], stop_id=STOP)
    assert continued([str(qwen)], **backwards)[0] == whole[::-1]
    assert continued([str(qwen)], **asked(ids=[12, 7, 8], stop_id=STOP))[0][:2] == whole[:2]
    assert continued([str(qwen)], **asked(ids=[12, 7, 8], stop_id=STOP))[0][2] != whole[2]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"]
)
def test_logits_from_the_cache_are_those_of_the_whole_sequence(
    folder: Path, dtype: torch.dtype, tolerance: float
) -> None:
    class Listening(Sampler):
        def __call__(self, logits: Any, ids_n: Any, positions: Any) -> Any:
            seen.append((ids_n, positions, logits[0]))
            return super().__call__(logits, ids_n, positions)

    seen: list[tuple[np.ndarray, int, torch.Tensor]] = []
    with models_of([str(folder)], dtype) as models:
        asked = Prompts(PROMPTS, np.arange(3), np.array(LIMITS))
        found = generate(models, asked, Listening(SamplingConfig()), stop_id=None)
        again = generate(models, asked, Sampler(SamplingConfig()), stop_id=None)
        tokens = found.tokens_bs
        places = torch.arange(tokens.shape[1])[None].expand(3, -1)
        with torch.no_grad():
            whole = models[0][0](tokens, places, None)[..., :205].float()
    assert torch.equal(again.tokens_bs, tokens)
    assert torch.equal(again.logprobs_mbs, found.logprobs_mbs)
    assert len(seen) == 35
    worst = max(
        float((logits - whole[ids, position - 1]).abs().max()) for ids, position, logits in seen
    )
    print(f"\nmax |cached - uncached logit| = {worst:.2e}")
    assert whole.std() > 0.2
    assert worst < tolerance, "bf16 has units of 0.016 at 2, and rounds at other places"
    logprobs = whole[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    drawn = found.logprobs_mbs[0] != 0
    assert drawn.sum() == sum(LIMITS) - sum(map(len, PROMPTS))
    torch.testing.assert_close(
        found.logprobs_mbs[0][:, 1:][drawn[:, 1:]], logprobs[drawn[:, 1:]], atol=tolerance, rtol=0
    )


@pytest.mark.parametrize("sampling", [SAMPLE, GREEDY], ids=["sample", "greedy"])
def test_two_ranks_of_tensor_parallelism_draw_what_one_draws(
    sampling: dict[str, Any], qwen: Path, pool: RankPool
) -> None:
    alone, _ = continued([str(qwen)], **asked(sampling=sampling, stop_id=STOP))
    flags = {"tensor_model_parallel_size": 2}
    job = asked(sampling=sampling, stop_id=STOP, flags=flags, folders=[str(qwen)])
    for sequences, _ in pool.run(JOB, 2, **job):
        assert sequences == alone


def test_a_rank_that_would_draw_otherwise_takes_what_the_first_one_draws(
    qwen: Path, pool: RankPool
) -> None:
    _, (alone,) = continued([str(qwen)], **asked())
    job = asked(flags={"tensor_model_parallel_size": 2}, folders=[str(qwen)])
    (_, (first,)), (_, (second,)) = pool.run(JOB, 2, **job, seeds=[SAMPLE["seed"], 99])
    assert torch.equal(first.tokens_bs, alone.tokens_bs)
    for name in ("tokens_bs", "sampling_logprob_bs", "logprobs_mbs"):
        assert torch.equal(getattr(second, name), getattr(first, name)), name


def test_mixture_draws_from_both_and_weights_are_bounded(qwen: Path, tmp_path: Path) -> None:
    make(tmp_path, MODELS["qwen3, GQA, wide heads"])
    both = [str(qwen), str(tmp_path)]
    _, (found,) = continued(both, **asked(mixture=0.2))
    drawn = found.sampling_logprob_bs != 0
    student, teacher = found.logprobs_mbs[:, drawn].double()
    mixed = (0.8 * student.exp() + 0.2 * teacher.exp()).log()
    torch.testing.assert_close(found.sampling_logprob_bs[drawn].double(), mixed, atol=1e-5, rtol=0)
    assert found.importance_bs[drawn].max() <= 1 / 0.8 + 1e-5
    only_first, _ = continued(both, **asked(mixture=0.0))
    assert only_first == continued([str(qwen)], **asked())[0]


def test_what_cannot_be_generated_with_is_refused_with_the_reason(
    qwen: Path, tmp_path: Path, pool: RankPool
) -> None:
    flags = {"pipeline_model_parallel_size": 2}
    with pytest.raises(RankFailedError, match="pass through the stages one after the other"):
        pool.run(JOB, 2, **asked(flags=flags, folders=[str(qwen)]))
    make(tmp_path, ("MambaForCausalLM", {}))
    with pytest.raises(ConfigError, match="MambaLayer is not supported"):
        continued([str(tmp_path)], **asked())


def test_what_a_layer_has_beside_the_known_is_refused_by_name(qwen: Path) -> None:
    class Windowed(torch.nn.Module):
        """Looks back a little only, and has no parameters to betray it."""

    asked = Prompts(PROMPTS, np.arange(3), np.array(LIMITS))

    def go_on(models: list[ModelChunks]) -> None:
        generate(models, asked, Sampler(SamplingConfig()), stop_id=None)

    with models_of([str(qwen)]) as models:
        layer = models[0][0].decoder.layers[1]
        own = layer.self_attention.core_attention
        layer.self_attention.core_attention = Windowed()
        with pytest.raises(ConfigError, match="core_attention is Windowed, not SdpaAttention"):
            go_on(models)
        layer.self_attention.core_attention = own
        layer.mlp.scale = torch.nn.Parameter(torch.ones(()))
        with pytest.raises(ConfigError, match=r"a layer has mlp\.scale"):
            go_on(models)
        del layer.mlp.scale
        models[0].config.activation_func = torch.nn.functional.gelu
        with pytest.raises(ConfigError, match="another MLP than the gated SiLU one"):
            go_on(models)


def test_a_model_is_as_before_afterwards(qwen: Path) -> None:
    with models_of([str(qwen)]) as models:
        ids = torch.from_numpy(PROMPTS[0])[None]
        places = torch.arange(ids.shape[1])[None]
        before = models[0][0](ids, places, None)
        models[0].train()
        asked = Prompts(PROMPTS, np.arange(3), np.array(LIMITS))
        generate(models, asked, Sampler(SamplingConfig()), stop_id=None)
        assert models[0].training
        assert torch.equal(models[0][0](ids, places, None), before)
