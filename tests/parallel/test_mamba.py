"""A Mamba student learns as `transformers`' model does under a plain trainer, in every layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.parallel.plain_trainer import train
from tests.parallel.test_distillation import (
    MIX,
    TEACHER,
    assert_same_curve,
    save_model,
)
from tests.pool import RankPool
from tests.runs import INTERLEAVED, PP2, TP2, curve, losses, pretrain_flags, some_slow

transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")

SHAPE = [
    "--model-family", "mamba", "--num-layers", "4", "--hidden-size", "32",
    "--ffn-hidden-size", "64", "--num-attention-heads", "1", "--num-query-groups", "1",
    "--no-add-qkv-bias",
    "--mamba-state-dim", "8", "--norm-epsilon", "1e-5",
]  # fmt: skip
LAYOUTS = {
    "one process": (1, ""),
    "TP2": (2, TP2),
    "TP2 + sequence parallel": (2, f"{TP2} --sequence-parallel"),
    "PP2": (2, PP2),
    "PP2 interleaved": (2, INTERLEAVED),
}
SLOW = ("TP2", "PP2")  # each is a part of the layout after it


def test_a_run_starts_from_the_same_weights_in_any_layout(
    corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    starts = {}
    for name, (world, flags) in {"one": (1, ""), "shared": (2, TP2)}.items():
        run = pretrain_flags(corpus, tmp_path / name, *SHAPE, *flags.split(), iterations=5)
        pool.run(run, world)
        starts[name] = losses(tmp_path / name)
    assert starts["one"] == pytest.approx(starts["shared"], abs=1e-5)


def test_a_run_goes_on_in_another_layout(corpus: Path, pool: RankPool, tmp_path: Path) -> None:
    zero = "--use-distributed-optimizer"
    for name, (world, flags) in {
        "whole": (1, ""), "parts": (4, f"{TP2} {zero} --exit-interval 4"),
    }.items():  # fmt: skip
        run = pretrain_flags(corpus, tmp_path / name, *SHAPE, *flags.split(), iterations=8)
        pool.run(run, world)
    assert len(losses(tmp_path / "parts")) == 4
    run = pretrain_flags(
        corpus, tmp_path / "parts", *SHAPE, *INTERLEAVED.split(), zero, iterations=8
    )
    pool.run(run, 2)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


@pytest.mark.slow
def test_bf16_follows_fp32(corpus: Path, pool: RankPool, tmp_path: Path) -> None:
    for name, flags in {"fp32": [], "bf16": ["--bf16"]}.items():
        pool.run(pretrain_flags(corpus, tmp_path / name, *SHAPE, *flags), 1)
    found, expected = losses(tmp_path / "bf16"), losses(tmp_path / "fp32")
    assert found == pytest.approx(expected, abs=2e-2)  # 8 bits, 20 updates at losses near 6
    assert found != expected


@pytest.fixture(scope="module")
def models(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders of a Mamba student and a Transformer teacher."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=4, vocab_size=512, state_size=8
    )
    transformers.MambaForCausalLM(config).save_pretrained(root / "student")
    shutil.copy(tiny_tokenizer / "tokenizer.json", root / "student")
    return {
        "student": root / "student",
        "teacher": save_model(root / "teacher", tiny_tokenizer, 2, TEACHER),
    }


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], corpus: Path) -> list[dict[str, float]]:
    """The curve of the trainer that shares no code with the package."""
    return train(models["student"], models["teacher"], corpus, **MIX)


@pytest.mark.parametrize("layout", some_slow(LAYOUTS, SLOW))
def test_layout_gives_the_curve_of_a_plain_trainer(
    layout: str, plain, models: dict[str, Path], corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    world, flags = LAYOUTS[layout]
    run = pretrain_flags(
        corpus, tmp_path / "run", *SHAPE, "--load", str(models["student"]), "--finetune",
        "--objective", "kd", "--kd-alpha", str(MIX["alpha"]),
        "--kd-temperature", str(MIX["temperature"]),
        "--teacher", "online", "--teacher-load", str(models["teacher"]), *flags.split(),
    )  # fmt: skip
    pool.run(run, world)
    assert_same_curve(curve(tmp_path / "run"), plain, learns=0.002)  # in so few updates
