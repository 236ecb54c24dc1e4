"""The suite ``generation``: tokens a second of `models.generate` beside transformers' ``generate``.

Both continue the same prompts with the same weights in fp32 on the same device, in turns. The
greedy tokens have to be equal, or the case stops.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from bench_core import Bench, Contestant, Suite, require_equal
from bench_models import TheirModel, model_case

from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.generate import Prompts, generate
from megatron_miniplm.models.sampling import Sampler, SamplingConfig

_SEED = 1


@dataclass(frozen=True)
class _Work:
    """What is generated, at its normal size."""

    prompt: int
    new: int
    decoding: Literal["greedy", "sample"] = "greedy"


def _race(asked: _Work, bench: Bench, model: ModelChunks, theirs: TheirModel) -> None:
    size, decoding = bench.sizes.pick, asked.decoding
    rows, prompt, new = size(3, 8), size(8, asked.prompt), size(4, asked.new)
    vocab = int(theirs.model.config.vocab_size)
    given = np.random.default_rng(_SEED).integers(0, vocab, (rows, prompt))
    limits = np.full(rows, prompt + new)
    prompts = Prompts(tokens=list(given), ids=np.arange(rows), limits=limits)
    sampler = Sampler(SamplingConfig(decoding=decoding))

    def ours() -> np.ndarray:
        return generate([model], prompts, sampler, stop_id=None).tokens_bs.cpu().numpy()

    def peers() -> np.ndarray:
        return theirs.call(lambda: _continue(theirs.model, given, new, decoding))

    timings = bench.race(
        Contestant(name="megatron_miniplm", run=ours),
        Contestant(name="transformers generate", run=peers),
        work=f"{rows} prompts of {prompt} tokens, {new} new ones each, {decoding}, fp32",
    )
    mine, peer = timings.values()
    for each in (mine, peer):
        begin = each.result[:, :prompt]
        require_equal(each.name, np.array_equal(begin, given), "it changed the prompts")
    if decoding == "greedy":
        same = np.array_equal(mine.result, peer.result)
        require_equal(mine.name, same, "its tokens are not those of transformers")
    bench.rate(
        "new tokens, with their prompts", "tokens/s", rows * new, ours=mine, peers=[peer],
        error_ours=0.0 if decoding == "greedy" else None,
    )  # fmt: skip


def _continue(model: Any, given: np.ndarray, new: int, decoding: str) -> np.ndarray:
    ids = torch.from_numpy(given).to(model.device)
    model.generation_config.eos_token_id = None  # all go on to the end
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        pad_token_id=0,
        do_sample=decoding == "sample",
        top_k=0,
        top_p=1.0,
        temperature=1.0,
    )
    return np.asarray(found.cpu())


SUITE = Suite(
    "generation",
    {
        "greedy": model_case(partial(_race, _Work(prompt=192, new=64))),
        "sample": model_case(partial(_race, _Work(prompt=192, new=64, decoding="sample"))),
        "prompts-alone": model_case(partial(_race, _Work(prompt=768, new=1))),
        "long-prompts": model_case(partial(_race, _Work(prompt=768, new=64))),
    },
)
