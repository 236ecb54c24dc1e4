"""Distillation in every layout: the curve of one process, and of a plain trainer by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_miniplm.core.errors import CheckpointError, ConfigError, LineageError
from megatron_miniplm.core.manifest import read_json
from tests.pool import RankFailedError, RankPool
from tests.runs import SHAPE, curve, pretrain_flags

transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")

TOLERANCE = 1e-5  # fp32 sums in another order, 20 updates at lr 6e-4

TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "one process": (1, ""),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "TP2 x PP2": (4, f"{TP2} {PP2}"),
    "DP2": (2, ""),
}
MIX = {"alpha": 0.4, "temperature": 2.0}
# 4 layers of width 64 learn from 3 of width 96 (so the stages of PP2 are uneven), whose vocabulary
# is padded to 640 columns, where the student's has 512.
STUDENT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 128,
    "initializer_range": 0.05, "tie_word_embeddings": True,
}  # fmt: skip
TEACHER = STUDENT | {
    "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 600,
    "initializer_range": 0.12, "tie_word_embeddings": False,
}  # fmt: skip


def save_model(folder: Path, tokenizer: Path, seed: int, settings: dict[str, Any]) -> Path:
    """A random Qwen2 model with the corpus's tokenizer beside it."""
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(**settings)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    shutil.copy(tokenizer / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def models(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders of student and teacher."""
    root = tmp_path_factory.mktemp("models")
    untied = STUDENT | {"tie_word_embeddings": False}
    return {
        "student": save_model(root / "student", tiny_tokenizer, 1, STUDENT),
        "untied student": save_model(root / "untied", tiny_tokenizer, 1, untied),
        "teacher": save_model(root / "teacher", tiny_tokenizer, 2, TEACHER),
    }


def kd_flags(corpus: Path, save: Path, models: dict[str, Path], *more: str, **kwargs) -> list[str]:
    """A small run that learns from the teacher."""
    return pretrain_flags(
        corpus, save, "--rotary-base", "10000", "--max-position-embeddings", "128",
        "--objective", "kd", "--kd-alpha", str(MIX["alpha"]),
        "--kd-temperature", str(MIX["temperature"]),
        "--teacher", "online", "--teacher-load", str(models["teacher"]), *more, **kwargs,
    )  # fmt: skip


def assert_same_curve(found: list[dict], expected: list[dict]) -> None:
    """Losses within `TOLERANCE`, gradient norms within 1e-4 of each other."""
    assert len(found) == len(expected) == 20
    assert expected[0]["lm loss"] - expected[-1]["lm loss"] > 0.05, "it must learn something"
    for name in ("lm loss", "kd loss"):
        worst = max(abs(a[name] - b[name]) for a, b in zip(found, expected, strict=True))
        print(f"{name}: largest difference over 20 updates {worst:.1e}")
        assert worst <= TOLERANCE
    for a, b in zip(found, expected, strict=True):
        assert a["grad norm"] == pytest.approx(b["grad norm"], rel=1e-4)


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], corpus: Path) -> list[dict[str, float]]:
    """The curve of the trainer that shares no code with the package."""
    from tests.parallel.plain_trainer import train

    return train(models["student"], models["teacher"], corpus, **MIX)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_curve_of_a_plain_trainer(
    layout: str, plain, models: dict[str, Path], corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    world, flags = LAYOUTS[layout]
    start = ["--load", str(models["student"]), "--finetune"]
    pool.run(kd_flags(corpus, tmp_path / "run", models, *start, *flags.split()), world)
    assert_same_curve(curve(tmp_path / "run"), plain)


def test_untied_student_gives_the_curve_of_a_plain_trainer(
    models: dict[str, Path], corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    from tests.parallel.plain_trainer import train

    expected = train(models["untied student"], models["teacher"], corpus, **MIX)
    start = ["--load", str(models["untied student"]), "--finetune"]
    untied = "--untie-embeddings-and-output-weights"
    pool.run(kd_flags(corpus, tmp_path / "run", models, *start, untied), 1)
    assert_same_curve(curve(tmp_path / "run"), expected)
