"""The whole main job on a laptop: text in, difference-sampled student out, judged against chance.

`make quickstart` runs it on the embedded corpus (`build_corpus`): teacher, reference, two scores,
difference sampling of half of the pool, then students of equal compute on the difference-sampled
and on a random half, without and with the teacher in their training, several seeds each, all
judged on text that nothing was trained on. It writes ``report.json`` and ``report.html`` into
``--output``, whichever method wins. Beside the teacher a student takes fewer updates, so that the
FLOPs are equal, the teacher's forward pass included, as in the paper.

Every step is the real command in a process of its own; a step whose artifact is complete is
skipped, so a killed run continues. Steps that do not need each other run side by side, one thread
each: on two cores the teacher trains beside the reference and the random students.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs import Job, run_jobs
from quickstart_report import METHODS, SUBSETS, Study, print_table, write_report
from rich.console import Console

from megatron_miniplm.core.config import parse_flags, to_flat
from megatron_miniplm.core.errors import ConfigError, MiniPLMError
from megatron_miniplm.core.log import get_logger, setup_logging
from megatron_miniplm.core.manifest import read_json, write_json
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.flops import aligned_iterations, count_parameters


@dataclass(frozen=True, kw_only=True)
class Config:
    """Run the MiniPLM pipeline on the text of the Python standard library."""

    output: Path = Path("runs/quickstart")
    """Folder of everything: text, corpora, checkpoints, scores, report.json, report.html."""
    seeds: int = 3
    """Students of each method."""
    jobs: int = 0
    """Processes side by side, one thread each; 0: as many as cores, at most 6."""
    train_mb: float = 4.0
    """Megabytes of training text, for the teacher, the reference and the pool."""
    heldout_mb: float = 0.4
    """Megabytes of held-out text."""
    vocab_size: int = 2048
    """Entries of the tokenizer."""
    seq_length: int = 256
    """Inputs of one instance, in tokens."""
    teacher_fraction: float = 0.35
    """Share of the instances that the teacher is trained on, and no other model."""
    reference_fraction: float = 0.07
    """Share of the instances that the reference is trained on, and no other model."""
    selection_ratio: float = 0.5
    """Share of the pool that the students are trained on."""
    teacher_iters: int = 1000
    """Updates of the teacher, 4 instances each."""
    reference_iters: int = 480
    """Updates of the reference, 4 instances each."""
    student_iters: int = 400
    """Updates of each student without a teacher in its training, 4 instances each."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """A model of the Qwen family, and its peak learning rate; named like the flags."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    lr: float


TEACHER = Role(num_layers=3, hidden_size=128, ffn_hidden_size=352, num_attention_heads=2, lr=3e-3)
REFERENCE = Role(num_layers=2, hidden_size=64, ffn_hidden_size=176, num_attention_heads=1, lr=4e-3)
STUDENT = Role(num_layers=2, hidden_size=96, ffn_hidden_size=256, num_attention_heads=2, lr=3e-3)
ROLES = {"teacher": TEACHER, "reference": REFERENCE, "student": STUDENT}
# At this size, what counts is the number of updates: small batches, wide initial weights.
BATCH, VALIDATED, INIT_STD = 4, 96, 0.07
KD_ALPHA = 0.5


def plan(config: Config) -> list[Job]:
    """All jobs, each after those it waits for; of those that could start, the first one does."""
    students = [
        job
        for method in ("random", "kd", "miniplm", "miniplm-kd")
        for seed in range(1, config.seeds + 1)
        for job in _student_jobs(config, method, seed)
    ]
    return [*_data_jobs(config), *_scoring_jobs(config), *students]


def _data_jobs(config: Config) -> Iterator[Job]:
    text, data = config.output / "text", config.output / "data"
    parts = ("teacher", "reference", "pool")
    corpus = flags(
        output=text, vocab_size=config.vocab_size, train_mb=config.train_mb,
        heldout_mb=config.heldout_mb,
    )  # fmt: skip
    builder = str(Path(__file__).with_name("build_corpus.py"))
    yield Job(
        name="corpus", stage="corpus", words=[sys.executable, builder, *corpus],
        done=(text / "corpus.json").exists,
    )  # fmt: skip
    for part in ("train", "heldout"):
        yield Job(
            name=f"preprocess {part}", stage="preprocess", after=["corpus"],
            words=miniplm(
                "preprocess", input=text / f"{part}.jsonl", json_keys="text", domain_key="domain",
                tokenizer_type="HuggingFaceTokenizer", tokenizer_model=text / "tokenizer",
                seq_length=config.seq_length, output_prefix=data / part,
            ),
            done=(data / f"{part}.json").exists,
        )  # fmt: skip
    yield Job(
        name="split", stage="split", after=["preprocess train"],
        words=miniplm(
            "split", data_path=data / "train", seed=1, pool_prefix=data / "pool",
            reference_fraction=config.reference_fraction, reference_prefix=data / "reference",
            heldout_fraction=config.teacher_fraction, heldout_prefix=data / "teacher",
        ),
        done=lambda: all((data / f"{part}.json").exists() for part in parts),
    )  # fmt: skip


def _scoring_jobs(config: Config) -> Iterator[Job]:
    data, scores = config.output / "data", config.output / "scores"
    yield _pretrain(config, "teacher", TEACHER, corpus="teacher", iterations=config.teacher_iters)
    yield _pretrain(
        config, "reference", REFERENCE, corpus="reference", iterations=config.reference_iters
    )
    for role in ("reference", "teacher"):
        yield Job(
            name=f"score {role}", stage="score", after=[role],
            words=miniplm(
                "score", data_path=data / "pool", load=config.output / role, output=scores / role,
                bf16=has_bf16(),
            ),
            done=(scores / role / "manifest.json").exists,
        )  # fmt: skip
    yield Job(
        name="select random", stage="select", after=["split"],
        words=miniplm(
            "select", data_path=data / "pool", selector="random", seed=1,
            selection_ratio=config.selection_ratio, output_prefix=data / "random",
        ),
        done=(data / "random.json").exists,
    )  # fmt: skip
    yield Job(
        name="select miniplm", stage="select", after=["score teacher", "score reference"],
        words=miniplm(
            "select", data_path=data / "pool", selector="difference",
            teacher_scores=scores / "teacher", reference_scores=scores / "reference",
            selection_ratio=config.selection_ratio, output_prefix=data / "miniplm",
        ),
        done=(data / "miniplm.json").exists,
    )  # fmt: skip


def _student_jobs(config: Config, method: str, seed: int) -> Iterator[Job]:
    name = f"student {method} {seed}"
    corpus, with_teacher = METHODS[method].corpus, METHODS[method].with_teacher
    yield _pretrain(
        config, name, STUDENT, corpus=corpus, seed=seed, with_teacher=with_teacher,
        iterations=taught_iters(config) if with_teacher else config.student_iters,
    )  # fmt: skip
    save = config.output / name.replace(" ", "-")
    yield Job(
        name=f"evaluate {method} {seed}", stage="evaluate", after=[name],
        words=miniplm(
            "evaluate", load=save, lm_loss=config.output / "data/heldout", output=save / "heldout",
            bf16=has_bf16(),
        ),
        done=(save / "heldout/results.json").exists,
    )  # fmt: skip


def _pretrain(
    config: Config,
    name: str,
    role: Role,
    *,
    corpus: str,
    iterations: int,
    seed: int = 1,
    with_teacher: bool = False,
) -> Job:
    """Training of any model here: a short warm-up, a cosine, validation on a part of held-out."""
    data, save = config.output / "data", config.output / name.replace(" ", "-")
    tracker = save / "latest_checkpointed_iteration.txt"
    after = ["preprocess heldout", f"select {corpus}" if corpus in SUBSETS else "split"]
    learns: dict[str, object] = {}
    if with_teacher:
        after.append("teacher")
        learns = {
            "objective": "kd", "kd_alpha": KD_ALPHA, "teacher": "online",
            "teacher_load": config.output / "teacher",
        }  # fmt: skip
    return Job(
        name=name, stage=f"pretrain {name.partition(' ')[0]}", after=after,
        words=miniplm(
            "pretrain", train_data_path=data / corpus, valid_data_path=data / "heldout", save=save,
            train_iters=iterations, global_batch_size=BATCH, micro_batch_size=BATCH, seed=seed,
            init_method_std=INIT_STD, lr_warmup_iters=max(1, iterations // 20),
            log_interval=max(1, iterations // 60), eval_interval=max(1, iterations // 5),
            eval_iters=VALIDATED // BATCH, bf16=has_bf16(), **asdict(role), **learns,
        ),
        done=lambda: tracker.exists() and tracker.read_text().strip() == str(iterations),
    )  # fmt: skip


def taught_iters(config: Config) -> int:
    """Updates of a student beside its teacher, at the FLOPs of `student_iters` without it."""
    student, teacher = (count_parameters(shape_of(role, config)) for role in (STUDENT, TEACHER))
    return aligned_iterations(config.student_iters, student=student, teacher=teacher)


def shape_of(role: Role, config: Config) -> ModelConfig:
    """The model of a role."""
    shape = {name: value for name, value in asdict(role).items() if name != "lr"}
    return ModelConfig(**shape, vocab_size=config.vocab_size)


def miniplm(verb: str, **settings: object) -> list[str]:
    """Command line of one verb."""
    return [sys.executable, "-m", "megatron_miniplm", verb, *flags(**settings)]


def flags(**settings: object) -> list[str]:
    """Settings as command-line words; a switch that is off is left out."""
    words = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is not False:
            words += [flag] if value is True else [flag, str(value)]
    return words


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (where it does not, fp32 wins)."""
    info = Path("/proc/cpuinfo")
    words = info.read_text().split() if info.exists() else []
    return "amx_bf16" in words or "avx512_bf16" in words


def run(config: Config) -> None:
    """Run what is missing and write the report."""
    asked = settings_of(config)
    path = config.output / "settings.json"
    if path.exists() and read_json(path) != asked:
        raise ConfigError(
            f"{config.output} was started with {read_json(path)}, not {asked}: "
            "choose another --output, or remove it"
        )
    write_json(path, asked)
    seconds = run_jobs(
        plan(config),
        slots=config.jobs or min(len(os.sched_getaffinity(0)), 6),
        logs=config.output / "logs",
        environment={"OMP_NUM_THREADS": "1"},
    )
    study = Study(root=config.output, seeds=config.seeds, settings=asked)
    print_table(write_report(study, seconds), Console())
    sys.stdout.write(f"{config.output / 'report.json'}\n{config.output / 'report.html'}\n")


def settings_of(config: Config) -> dict[str, Any]:
    """Everything that decides the result, as it goes into report.json."""
    chosen = {name: value for name, value in to_flat(config).items() if name != "jobs"}
    shapes = {name: asdict(role) for name, role in ROLES.items()}
    parameters = {name: count_parameters(shape_of(role, config)) for name, role in ROLES.items()}
    return chosen | {
        "output": str(config.output), "roles": shapes, "parameters": parameters,
        "global_batch_size": BATCH, "init_method_std": INIT_STD, "bf16": has_bf16(),
        "kd_alpha": KD_ALPHA, "taught_iters": taught_iters(config),
    }  # fmt: skip


def main() -> int:
    """Parse the flags and run; a signal stops what was started, the same command goes on later."""
    setup_logging()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(parse_flags(Config, sys.argv[1:], prog="quickstart"))
    except MiniPLMError as error:
        get_logger().error("quickstart: %s: %s", type(error).__name__, error)
        return 2
    except KeyboardInterrupt:
        get_logger().error("quickstart: stopped; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
