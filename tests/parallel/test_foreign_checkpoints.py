"""Megatron-LM's own checkpoints as weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import CheckpointError, ConfigError
from tests.parallel.test_conversion import words
from tests.pool import RankFailedError, RankPool

WRITE = "tests.parallel.jobs:megatron_lm_checkpoint"
READ = "tests.parallel.jobs:teacher_logits"
TOLERANCE = 1e-5  # fp32; logits are of order 1; stock attention against ours
IDS = torch.arange(40).reshape(2, 20) * 11 % 512


@pytest.mark.parametrize("style", ["fused norms", "norms of their own", "a key a layer"])
def test_a_checkpoint_of_megatron_lm_gives_the_logits_of_the_stock_model(
    style: str, pool: RankPool, big_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    expected, _ = pool.run(WRITE, 2, save=str(tmp_path / "m"), style=style, ids=IDS, change={})
    assert expected.std() > 0.2, "logits must vary, or parity shows nothing"
    where = {"load": str(tmp_path / "m"), "corpus": str(big_corpus), "ids": IDS}
    ((fingerprint, found),) = pool.run(READ, 1, **where, flags={})
    worst = float((found - expected).abs().max())
    print(f"\n{style}: max |logit - stock logit| = {worst:.2e}")
    assert worst <= TOLERANCE
    assert len(fingerprint) == 32
    if style == "fused norms":
        flags = words("megatron", tmp_path / "m", "hf", tmp_path / "hf")
        assert main(flags) == 2, "it has no tokenizer"
        assert main([*flags, "--tokenizer-model", str(tiny_tokenizer)]) == 0
        transformers = pytest.importorskip("transformers", reason="no [hf] extra")
        with torch.no_grad():
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
            torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=TOLERANCE)
    if style == "a key a layer":
        layout = {"tensor_model_parallel_size": 2}
        parts = [logits for _, logits in pool.run(READ, 2, **where, flags=layout)]
        torch.testing.assert_close(torch.cat(parts, -1), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"add_bias_linear": True}, ConfigError, "add_bias_linear = True.*must be False"),
        ({"num_layers": 2}, CheckpointError, r"no decoder\.layers\.2\.mlp"),
        ({"num_layers": 4}, CheckpointError, r"\(layer 3\) has shape None"),
        ({"add_qkv_bias": False}, CheckpointError, r"no decoder\.layers\.0.*linear_qkv\.bias"),
    ],
)
def test_a_model_that_its_arguments_do_not_describe_is_refused(
    change: dict, error: type, message: str, pool: RankPool, big_corpus: Path, tmp_path: Path
) -> None:
    style = "a key a layer"
    pool.run(WRITE, 2, save=str(tmp_path / "m"), style=style, ids=IDS, change=change)
    where = {"load": str(tmp_path / "m"), "corpus": str(big_corpus), "ids": IDS}
    with pytest.raises(RankFailedError, match=f"{error.__name__}: .*{message}"):
        pool.run(READ, 1, **where, flags={})
