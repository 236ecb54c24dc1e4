"""Conversion by several processes: the same files, a share of the memory each."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_miniplm.__main__ import main
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.flops import count_parameters
from megatron_miniplm.models.hf_folder import HfFolder
from megatron_miniplm.models.hf_writer import HfExtras, write_hf_folder
from tests.pool import RankPool
from tests.unit.test_hf_folder import parameters

SMALL = ModelConfig(
    model_family="qwen3", num_layers=3, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4,
    num_query_groups=2, vocab_size=519, add_qkv_bias=False, qk_layernorm=True, kv_channels=16,
    untie_embeddings_and_output_weights=True,
)  # fmt: skip
# qwen1.5-500m untied (151,936 x 1,024, 24 layers) in a quarter of every length: 30 M parameters.
QUARTER = ModelConfig(
    model_family="qwen", num_layers=6, hidden_size=256, ffn_hidden_size=704,
    num_attention_heads=4, vocab_size=37984, untie_embeddings_and_output_weights=True,
)  # fmt: skip


def make(path: Path, config: ModelConfig, tokenizer: Path, **options) -> Path:
    extras = HfExtras(tokenizer_folder=tokenizer)
    write_hf_folder(path, config, parameters(config), dtype=torch.float32, extras=extras, **options)
    return path


def words(source: str, load: Path, to: str, save: Path, *more: str) -> list[str]:
    return [
        "convert",
        "--from",
        source,
        "--load",
        str(load),
        "--to",
        to,
        "--save",
        str(save),
        *more,
    ]


def test_two_ranks_write_the_files_of_one_in_both_directions(
    pool: RankPool, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    hf = make(tmp_path / "hf", SMALL, tiny_tokenizer, max_shard_bytes=100_000)
    pool.run(words("hf", hf, "megatron", tmp_path / "m2"), 2)
    assert main(words("hf", hf, "megatron", tmp_path / "m1")) == 0
    for name in ("m1", "m2"):
        pool.run(words("megatron", tmp_path / name, "hf", tmp_path / f"{name}-by-two"), 2)
        assert main(words("megatron", tmp_path / name, "hf", tmp_path / f"{name}-by-one")) == 0
    weights = "model.safetensors"
    expected = (tmp_path / "m1-by-one" / weights).read_bytes()
    for name in ("m1-by-two", "m2-by-one", "m2-by-two"):
        assert (tmp_path / name / weights).read_bytes() == expected, name
        names = {file.name for file in (tmp_path / name).iterdir()}
        assert names == {file.name for file in (tmp_path / "m1-by-one").iterdir()}
    source, back = HfFolder(hf), HfFolder(tmp_path / "m2-by-two")
    assert len(list(hf.glob("*.safetensors"))) > 1
    assert back.config == source.config
    assert all(torch.equal(back[name], tensor) for name, tensor in source.items())


def test_a_stock_model_of_megatron_core_loads_what_was_converted(
    pool: RankPool, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")
    hf = make(tmp_path / "hf", SMALL, tiny_tokenizer)
    pool.run(words("hf", hf, "megatron", tmp_path / "m"), 2)
    ids = torch.arange(40).reshape(2, 20) * 11 % 512
    _, found = pool.run(
        "tests.parallel.jobs:stock_model_loads", 2, load=str(tmp_path / "m"), ids=ids
    )
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(hf)(ids).logits
    torch.testing.assert_close(
        found[..., :519], expected, rtol=1e-5, atol=1e-4
    )  # fp32, of order 20


def test_what_must_stay_is_refused_by_every_rank(
    pool: RankPool, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    hf = make(tmp_path / "hf", SMALL, tiny_tokenizer)
    _, *flags = words("megatron", tmp_path / "none", "hf", hf)
    said = pool.run("tests.parallel.jobs:refusal_of_a_conversion", 2, flags=flags)
    assert said == [f"{hf} exists; choose another --save or pass --overwrite"] * 2


def test_ranks_share_work_in_order_and_an_error_is_everybodys(pool: RankPool) -> None:
    by_rank = pool.run("tests.parallel.jobs:shared_work", 2, items=7)
    assert by_rank == [([(at, at % 2) for at in range(7)], "item 4 is broken")] * 2


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_peak_memory_is_at_most_one_and_a_half_shards(
    ranks: int, pool: RankPool, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    hf = make(tmp_path / "hf", QUARTER, tiny_tokenizer)
    shard = 4 * count_parameters(QUARTER) / ranks
    steps = {
        "to megatron": words("hf", hf, "megatron", tmp_path / "m"),
        "to hf": words("megatron", tmp_path / "m", "hf", tmp_path / "back"),
    }
    for name, step in steps.items():
        peaks = pool.run("tests.parallel.jobs:memory_of_a_stage", ranks, words=step)
        print(f"\n{name}, {ranks} ranks: {[round(peak / shard, 2) for peak in peaks]} shards")
        assert max(peaks) <= 1.5 * shard, name
    assert math.isclose(count_parameters(QUARTER), 24.2e6, rel_tol=0.05)
