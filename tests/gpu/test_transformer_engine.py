"""Layers of Transformer Engine compute what megatron.core's own do; FP8 stays near it."""

from __future__ import annotations

import pytest
import torch

from megatron_miniplm.data.instances import Batch
from megatron_miniplm.models.build import InitialWeights, build_model, fill_by_name
from megatron_miniplm.models.engine import EngineConfig, has_transformer_engine
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.forward import forward_only
from megatron_miniplm.parallel.topology import ParallelConfig, initialize, shutdown

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not has_transformer_engine(has_gpus=torch.cuda.is_available()),
        reason="needs a CUDA device and Transformer Engine",
    ),
]
VOCAB = 1024
SHAPE = {
    "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 704, "num_attention_heads": 4,
    "num_query_groups": 2, "vocab_size": VOCAB, "init_method_std": 0.05,
}  # fmt: skip
ENGINES = {
    "local": {"transformer_impl": "local"},
    "te": {"transformer_impl": "transformer_engine"},
    "fp8": {"transformer_impl": "transformer_engine", "fp8_format": "hybrid"},
}


@pytest.fixture(scope="module")
def logits() -> dict[str, torch.Tensor]:
    """Engine -> logits of one batch under the same random weights, bf16."""
    shape = ModelConfig(**SHAPE)
    topology = initialize(ParallelConfig())
    tokens = torch.randint(VOCAB, (4, 128), generator=torch.Generator().manual_seed(0)).cuda()
    batch = Batch(
        tokens_bs=tokens, labels_bs=tokens, mask_bs=tokens >= 0, rows_b=torch.arange(4).cuda()
    )
    found = {}
    try:
        for name, engine in ENGINES.items():
            model = build_model(
                shape, topology, valid_vocab=VOCAB, dtype=torch.bfloat16,
                engine=EngineConfig(**engine),
            )  # fmt: skip
            fill_by_name(model, InitialWeights(shape, 0))
            (found[name],) = forward_only(model, [batch], lambda head, _: head.logits().float())
    finally:
        shutdown()
    return found


@pytest.mark.parametrize(("engine", "tolerance"), [("te", 0.02), ("fp8", 0.15)])
def test_logits_are_those_of_the_local_layers(
    logits: dict[str, torch.Tensor], engine: str, tolerance: float
) -> None:
    """Relative, of the norm: bf16 rounds by 2^-9 in each of a few dozen steps, FP8 by 2^-4."""
    apart = (logits[engine] - logits["local"]).norm() / logits["local"].norm()
    print(f"\n{engine}: {float(apart):.2e} of the norm of the logits")
    assert 0 < apart <= tolerance
