"""Distillation in every layout: the curve of one process, and of a plain trainer by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_miniplm.core.errors import CheckpointError, ConfigError, LineageError
from megatron_miniplm.core.manifest import read_json
from megatron_miniplm.evaluation.run_curves import read_history, training_flops
from tests.pool import RankFailedError, RankPool
from tests.runs import INTERLEAVED, PP2, TP2, curve, learned, pretrain_flags, some_slow

transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")

TOLERANCE = 1e-5  # fp32 sums in another order, 20 updates at lr 6e-4

LAYOUTS = {
    "one process": (1, ""),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "TP2 x PP2": (4, f"{TP2} {PP2}"),
    "PP2 interleaved": (2, INTERLEAVED),
    "DP2": (2, ""),
    "TP2 + sequence parallel": (2, f"{TP2} --sequence-parallel"),
}
SLOW = ("TP2 + sequence parallel", "TP2", "PP2")  # a gather more; parts of the layout after them
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


def assert_same_curve(found: list[dict], expected: list[dict], *, learns: float = 0.02) -> None:
    """Losses within `TOLERANCE`, gradient norms within 1e-4 of each other."""
    assert len(found) == len(expected) == 20
    assert learned([row["lm loss"] for row in expected]) > learns, "it must learn something"
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


@pytest.mark.parametrize("layout", some_slow(LAYOUTS, SLOW))
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


class TestBf16:
    """Weights and activations have 8 bits; losses, statistics and gradient sums are fp32."""

    def test_the_curve_follows_fp32(
        self, plain, models: dict[str, Path], corpus: Path, pool: RankPool, tmp_path: Path
    ) -> None:
        layout = [*INTERLEAVED.split(), "--use-distributed-optimizer"]  # x DP2
        start = ["--load", str(models["student"]), "--finetune", "--bf16"]
        pool.run(kd_flags(corpus, tmp_path / "run", models, *start, *layout), 4)
        found = curve(tmp_path / "run")
        for name in ("lm loss", "kd loss"):
            apart = [abs(a[name] - b[name]) for a, b in zip(found, plain, strict=True)]
            print(f"{name}: largest difference from fp32 {max(apart):.1e}")
            assert 1e-5 < max(apart) < 5e-3  # 1.6e-3 was seen

    def test_the_teacher_may_compute_in_another_type_than_the_student(
        self, models: dict[str, Path], corpus: Path, pool: RankPool, tmp_path: Path
    ) -> None:
        kinds = {"exact": [], "rounded": ["--teacher-dtype", "bf16"]}
        kinds["exact beside bf16"] = ["--bf16", "--teacher-dtype", "fp32"]
        said = {}
        for name, more in kinds.items():
            pool.run(kd_flags(corpus, tmp_path / name, models, *more, iterations=5), 1)
            rows = curve(tmp_path / name)
            said[name] = [(row["teacher loss"], row["teacher entropy"]) for row in rows]
        assert said["exact beside bf16"] == said["exact"]
        for rounded, exact in zip(said["rounded"], said["exact"], strict=True):
            assert rounded != exact
            assert rounded == pytest.approx(exact, rel=5e-3)  # 8 bits


class TestResume:
    """An interrupted run continues bit for bit, with the same teacher only."""

    @pytest.fixture(scope="class")
    def runs(
        self, models, corpus: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Path, Path]:
        """(uninterrupted run, run stopped after ten updates)."""
        root = tmp_path_factory.mktemp("runs")
        pool.run(kd_flags(corpus, root / "whole", models), 1)
        pool.run(kd_flags(corpus, root / "half", models, "--exit-interval", "10"), 1)
        assert len(curve(root / "half")) == 10
        return root / "whole", root / "half"

    def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
        self, runs, models, corpus: Path, pool: RankPool, tmp_path: Path
    ) -> None:
        whole, half = runs
        shutil.copytree(half, tmp_path / "run")
        moved = models | {"teacher": tmp_path / "elsewhere"}
        shutil.copytree(models["teacher"], moved["teacher"])
        pool.run(kd_flags(corpus, tmp_path / "run", moved), 1)
        found, expected = curve(tmp_path / "run"), curve(whole)
        for name in ("lm loss", "kd loss", "teacher loss", "grad norm"):
            assert [row[name] for row in found] == [row[name] for row in expected], name

    def test_another_teacher_is_refused(
        self, runs, models, corpus: Path, pool: RankPool, tmp_path: Path
    ) -> None:
        shutil.copytree(runs[1], tmp_path / "run")
        before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        other = models | {"teacher": models["student"]}
        with pytest.raises(RankFailedError, match="was trained with teacher") as caught:
            pool.run(kd_flags(corpus, tmp_path / "run", other), 1)
        assert LineageError.__name__ in str(caught.value)
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before

    def test_going_on_without_the_teacher_is_refused(
        self, runs, corpus: Path, pool: RankPool, tmp_path: Path
    ) -> None:
        shutil.copytree(runs[1], tmp_path / "run")
        flags = pretrain_flags(corpus, tmp_path / "run", "--rotary-base", "10000")
        with pytest.raises(RankFailedError, match="--objective kd there, lm here"):
            pool.run(flags, 1)

    def test_the_checkpoint_names_the_teacher_and_holds_only_the_student(self, runs) -> None:
        manifest = read_json(runs[0] / "iter_0000020" / "manifest.json")
        assert set(manifest["parents"]) == {"corpus", "teacher"}
        assert (
            read_json(runs[0] / "run.json")["teacher"]
            == manifest["parents"]["teacher"]["fingerprint"]
        )
        from torch.distributed.checkpoint import FileSystemReader

        stored = FileSystemReader(runs[0] / "iter_0000020").read_metadata().state_dict_metadata
        shapes = {key: tuple(item.size) for key, item in stored.items() if hasattr(item, "size")}
        second = {shape for key, shape in shapes.items() if "mlp.linear_fc2.weight" in key}
        assert second == {(4, 64, 176)}, "layers and widths of the student, for Adam's sums as well"


class TestTeachersThatAreRefused:
    """A teacher that would teach something else than its weights is refused before training."""

    def refused(self, pool: RankPool, flags: list[str], error: type, *words: str) -> None:
        with pytest.raises(RankFailedError) as caught:
            pool.run(flags, 1)
        for word in (error.__name__, *words):
            assert word in str(caught.value)

    def test_another_tokenizer(self, models, corpus: Path, pool: RankPool, tmp_path: Path) -> None:
        shutil.copytree(models["teacher"], tmp_path / "teacher")
        path = tmp_path / "teacher" / "tokenizer.json"
        raw = json.loads(path.read_text())
        vocab = raw["model"]["vocab"]
        first, second = sorted(vocab, key=vocab.__getitem__)[-2:]
        vocab[first], vocab[second] = vocab[second], vocab[first]
        path.write_text(json.dumps(raw))
        ours = read_json(Path(f"{corpus}.json"))["content"]["tokenizer"]["fingerprint"]
        other = models | {"teacher": tmp_path / "teacher"}
        self.refused(
            pool, kd_flags(corpus, tmp_path / "run", other), LineageError, ours, "is not the one"
        )
        assert not (tmp_path / "run").exists()

    def test_fewer_logit_columns_than_tokens(
        self, models, tiny_tokenizer: Path, corpus: Path, pool: RankPool, tmp_path: Path
    ) -> None:
        small = save_model(tmp_path / "t", tiny_tokenizer, 3, TEACHER | {"vocab_size": 500})
        flags = kd_flags(corpus, tmp_path / "run", models | {"teacher": small})
        self.refused(pool, flags, LineageError, "500 logit columns", "512")

    def test_weights_that_are_not_numbers(
        self, models, corpus: Path, pool: RankPool, tmp_path: Path
    ) -> None:
        from safetensors.torch import load_file, save_file

        shutil.copytree(models["teacher"], tmp_path / "teacher")
        path = tmp_path / "teacher" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.mlp.down_proj.weight"][5, 7] = torch.nan
        save_file(tensors, path, metadata={"format": "pt"})
        flags = kd_flags(corpus, tmp_path / "run", models | {"teacher": tmp_path / "teacher"})
        self.refused(pool, flags, CheckpointError, "layers.1.mlp.linear_fc2")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--objective", "kd"], "--objective kd needs --teacher; known: online"),
            (["--teacher", "online", "--teacher-load", "t"], "has no effect on --objective lm"),
            (["--kd-alpha", "0.3"], "--kd-alpha 0.3 has no effect without --objective kd"),
            (["--teacher-load", "t"], "--teacher-load t has no effect without --teacher online"),
            (["--objective", "kd", "--teacher", "online"], "needs --teacher-load"),
            (
                ["--objective", "kd", "--kd-loss", "mle", "--teacher", "online"],
                "unknown KD loss 'mle'; known: brier",
            ),
            (["--align-flops-to", "10"], "it needs both"),
        ],
    )
    def test_flags_that_do_not_go_together(
        self, flags: list[str], message: str, corpus: Path, pool: RankPool, tmp_path: Path
    ) -> None:
        words = pretrain_flags(corpus, tmp_path / "run", *flags)
        self.refused(pool, words, ConfigError, message)
        assert not (tmp_path / "run").exists()


def test_a_megatron_checkpoint_of_another_width_teaches_like_its_hugging_face_form(
    models, corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    convert = ["convert", "--from", "hf", "--to", "megatron", "--load", str(models["teacher"])]
    pool.run([*convert, "--save", str(tmp_path / "m")], 1)
    found = {"hf": models["teacher"], "megatron": tmp_path / "m"}
    for name, teacher in found.items():
        flags = kd_flags(corpus, tmp_path / name, models | {"teacher": teacher}, iterations=5)
        pool.run([*flags, *TP2.split()], 2)
    hf, megatron = ([row["teacher loss"] for row in curve(tmp_path / name)] for name in found)
    assert hf == megatron


def test_updates_are_aligned_to_the_work_of_the_teacher_and_stay_so(
    models, corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    flags = kd_flags(corpus, tmp_path / "run", models, "--align-flops-to", "2")
    student, teacher = 218_176, 309_984  # parameters
    expected = 2 * round(20 * 3 * student / (3 * student + teacher) / 2)
    for _ in range(2):  # the second time it is complete already
        pool.run(flags, 1)
        assert read_json(tmp_path / "run/run.json")["config"]["train_iters"] == expected
        assert len(curve(tmp_path / "run")) == expected
    run = read_history(tmp_path / "run", "kd")
    times = 1 + teacher / (3 * student)
    assert training_flops(run, student, np.ones(1)) == pytest.approx(6e6 * student * times)
