"""Recomputation changes what is kept between the passes, and nothing that is computed."""

from __future__ import annotations

import pytest
import torch

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.models.recompute import RecomputeConfig
from tests.pool import RankPool

SETTINGS = {
    "nothing": {},
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform"},
    "block": {
        "recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1,
    },
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    "core_attn": {"recompute_granularity": "selective"},
}  # fmt: skip


def test_gradients_are_the_same_bits_and_fewer_activations_are_kept(pool: RankPool) -> None:
    job = "tests.parallel.jobs:gradients_and_bytes_kept"
    ((plain, most),) = pool.run(job, 1, settings=SETTINGS["nothing"])
    kept = {"nothing": most}
    for name in ("uniform", "block", "mlp", "core_attn"):
        ((gradients, kept[name]),) = pool.run(job, 1, settings=SETTINGS[name])
        assert gradients.keys() == plain.keys()
        for parameter, gradient in gradients.items():
            assert torch.equal(gradient, plain[parameter]), parameter
    # Of 3 layers, `block` recomputes one; the input of a layer and the head are always kept.
    assert kept["uniform"] < kept["block"] / 2 < kept["nothing"] / 2
    # An MLP keeps most of what a layer keeps; attention without its projections, little.
    assert kept["uniform"] < kept["mlp"] < 0.6 * kept["nothing"]
    assert 0.6 * kept["nothing"] < kept["core_attn"] < kept["nothing"]
    assert (kept["nothing"] - kept["block"]) * 3 == kept["nothing"] - kept["uniform"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recompute_num_layers": 2}, "no effect without --recompute-granularity full"),
        ({"recompute_granularity": "full"}, "needs --recompute-method"),
        (SETTINGS["block"] | {"recompute_num_layers": 0}, "at least 1, not 0"),
        (SETTINGS["uniform"] | {"recompute_num_layers": 2}, "uniform is not supported"),
        (SETTINGS["uniform"] | {"recompute_modules": ("mlp",)}, "mlp has no effect without"),
    ],
)
def test_contradictory_flags_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RecomputeConfig(**settings)
