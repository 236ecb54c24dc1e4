"""Every command that an example, a recipe or the README shows is one that the program accepts."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.config import parse_flags, part_of, to_flat
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.models.family import get_family
from megatron_miniplm.models.flops import count_parameters
from megatron_miniplm.models.head import Head
from megatron_miniplm.models.signal import SignalFacts
from megatron_miniplm.objectives.kd_losses import KD_LOSSES
from megatron_miniplm.objectives.objective import OBJECTIVES, LossConfig, Progress
from megatron_miniplm.parallel.vocab import VocabShard
from megatron_miniplm.selection.registry import SELECTORS, SelectorInput
from megatron_miniplm.stages import minillm, pretrain
from megatron_miniplm.training.preflight import objective_of
from tests.examples.accept import accept

PROJECT = Path(__file__).resolve().parents[2]
EXAMPLES = PROJECT / "examples"
ON_A_LAPTOP = ("all_methods", "cross_family", "pd_sweep")
PROXY = ["split", *["score"] * 4, "pretrain", "score", "evaluate", "select"]
SCRIPTS = sorted(path for path in EXAMPLES.glob("*_*.sh") if path.stem not in ON_A_LAPTOP)
RECIPES = sorted(EXAMPLES.glob("recipes/miniplm*.yaml"))


def commands(output: str) -> list[list[str]]:
    """The commands that a dry run printed."""
    return [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]


def start(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *arguments],
        env={
            # The interpreter that runs this, as in an activated environment.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VIRTUAL_ENV": "-", "HOME": "/nonexistent", **environment,
        },
        cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def arguments_of(script: Path) -> int:
    """Those of another family have a tokenizer of their own."""
    return 4 if script.stem in ("miniplm_llama_212M", "miniplm_mamba_130M") else 3


def test_students_of_other_families_on_a_laptop_use_commands_that_exist(tmp_path: Path):
    done = start(EXAMPLES / "cross_family.sh", "--dry-run", str(tmp_path))
    assert done.returncode == 0, done.stderr
    corpus, *printed = commands(done.stdout)
    assert corpus[1].endswith("tools/build_corpus.py")
    configs = [accept(words) for words in printed]
    verbs = [type(config).__module__.rpartition(".")[2] for config in configs]
    assert verbs == ["retokenize"] * 3 + ["pretrain", "evaluate"] * 4
    families = [config.model_shape.model_family for config in configs[3::2]]
    assert families == ["llama", "llama", "mamba", "mamba"]


def test_the_proxy_on_a_laptop_uses_commands_that_exist(tmp_path: Path):
    done = start(EXAMPLES / "proxy.sh", "--dry-run", str(tmp_path))
    assert done.returncode == 0, done.stderr
    configs = [accept(words) for words in commands(done.stdout)]
    verbs = [type(config).__module__.rpartition(".")[2] for config in configs]
    assert verbs == ["split", "pretrain", "score", "select", "evaluate"]


def test_all_methods_on_a_laptop_use_commands_that_exist(tmp_path: Path):
    done = start(EXAMPLES / "all_methods.sh", "--dry-run", str(tmp_path), SEEDS="7")
    assert done.returncode == 0, done.stderr
    *printed, table = commands(done.stdout)
    configs = [accept(words) for words in printed]
    verbs = [type(config).__module__.rpartition(".")[2] for config in configs]
    students = ["pretrain", "evaluate"] * 3 + ["minillm", "evaluate"]
    assert verbs == ["generate", "cache_logits", *students]
    assert table[-3:] == [str(tmp_path), "--seeds", "7"]


def test_the_sweep_of_distillation_uses_flags_that_go_together(tmp_path: Path):
    done = start(EXAMPLES / "pd_sweep.sh", "--dry-run", str(tmp_path))
    assert done.returncode == 0, done.stderr
    _, *printed = commands(done.stdout)
    configs = [accept(words) for words in printed]
    verbs = [type(config).__module__.rpartition(".")[2] for config in configs]
    assert verbs[:4] == ["preprocess", "preprocess", "pretrain", "cache_logits"]
    assert verbs[-1] == "report"
    students = configs[4:-1]
    assert set(verbs[4:-1]) == {"pretrain"}
    assert [config.save for config in students] == [str(run) for run in configs[-1].runs]
    taus = frozenset(part_of(configs[3].kept, "logits", "--what").truncation.kd_temperatures)
    facts = SignalFacts(sparse=True, temperatures=taus, mean_logit_std=2.0)
    for config in students:
        objective = objective_of(config)
        if config.teacher is not None:
            objective.taught_by(facts if config.teacher == "stored" else SignalFacts())


@pytest.mark.parametrize(
    ("recipe", "loss", "temperature", "shares"),
    [
        ("pd-vanilla", "soft_nll", 1.0, [1.0, 1.0, 1.0]),
        ("pd-star", "forward_kl", 2.0, [0.0, 0.9, 0.0]),
    ],
)
def test_recipes_of_pre_training_distillation_are_those_of_the_paper(
    recipe: str, loss: str, temperature: float, shares: list[float]
):
    words = ["--train-data-path", "c", "--save", "s", "--logits-path", "l"]
    config = parse_flags(
        pretrain.Config, ["--config", str(EXAMPLES / f"recipes/{recipe}.yaml"), *words], prog="p"
    )
    objective = objective_of(config)
    objective = objective.taught_by(SignalFacts(sparse=True, mean_logit_std=2.0))
    kd = objective.config
    assert (kd.kd_loss, kd.kd_tail, kd.kd_temperature) == (loss, "renormalize", temperature)
    assert objective.temperature.fixed().weight == 1.0, "the paper has no factor of the temperature"
    total = config.training.samples_in_all
    found = [
        objective.at(
            Progress(consumed=at, total=total, warmup=total // 100, decay=total // 10)
        ).alpha
        for at in (0, total // 2, total)
    ]
    assert found == pytest.approx(shares)
    warmup, decay = config.optimization.schedule(config.training.iterations)
    assert (warmup, decay) == (119, 11921)


@pytest.mark.parametrize(
    ("recipe", "differs", "passes"),
    [
        ("minillm-paper", (True, False, 1.0, "none", 1.0, None, False, 0.0), (4, 2)),
        ("minillm-released", (False, True, 0.95, "code", 0.5, 100, True, 0.5), (13, 2)),
    ],
)
def test_recipes_of_minillm_are_those_of_paper_and_code(
    recipe: str, differs: tuple, passes: tuple[int, int]
):
    words = ["--train-data-path", "c", "--save", "s", "--teacher-load", "t"]
    base = recipe.replace("minillm", "miniplm")
    for name in (recipe, base):
        words = ["--config", str(EXAMPLES / f"recipes/{name}.yaml"), *words]
    config = parse_flags(minillm.Config, words, prog="p")
    objective = objective_of(config)
    own, advantage = objective.config, objective.config.advantage
    found = (
        own.single_step_importance, advantage.long_includes_current, advantage.gamma,
        advantage.whiten, advantage.reward_scaling, advantage.reward_clip,
        advantage.clip_importance, own.lm_kd_ratio,
    )  # fmt: skip
    assert found == differs
    assert (objective.student_passes, objective.teacher_passes) == passes
    if recipe == "minillm-paper":
        sizes = [get_family("qwen").presets[f"qwen1.5-{size}"] for size in ("200m", "1.8b")]
        student, teacher = map(count_parameters, sizes)
        aligned = config.training.aligned(
            student=student, teacher=teacher, student_passes=4, teacher_passes=2
        )
        assert aligned.train_iters == 15_000


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_command_of_a_dry_run_is_accepted_and_none_is_run(script: Path, tmp_path: Path):
    arguments = ["pile/*.jsonl", "hf/model", str(tmp_path / "out"), "hf/other"]
    done = start(script, "--dry-run", *arguments[: arguments_of(script)])
    assert done.returncode == 0, done.stderr
    verbs = []
    for words in commands(done.stdout):
        config = accept(words)
        verbs.append(type(config).__module__.rpartition(".")[2])
    # The others train once, vanilla_kd among them.
    without_kd = ["preprocess", "pretrain", "convert"]
    chosen = ["preprocess", "split", "pretrain", "score", "score", "select"]
    if arguments_of(script) == 4:
        chosen.append("retokenize")
    expected = {
        "miniplm": [*chosen, *without_kd[1:]],
        "miniplm_prx_qwen_200M": [*chosen[:3], *PROXY, *without_kd[1:]],
        "pd": ["preprocess", "cache_logits", "pretrain", "convert"],
        "pd_cache_logits": ["preprocess", "cache_logits"],
        "seqkd": ["preprocess", "generate", "pretrain", "convert"],
        "minillm": ["preprocess", "minillm", "convert"],
        "real": ["convert", "preprocess", "score", "inspect", "inspect"],
    }
    method = script.stem.partition("_")[0]
    assert verbs == expected.get(script.stem, expected.get(method, without_kd))
    assert not (tmp_path / "out").exists()


def test_there_is_a_script_for_each_method_and_size_of_the_paper():
    names = {path.stem for path in SCRIPTS}
    methods = ("miniplm", "pretrain", "vanilla_kd", "miniplm_kd")
    others = {f"{m}_{s}" for m in ("pretrain", "miniplm") for s in ("llama_212M", "mamba_130M")}
    qwen = {f"{m}_qwen_{s}" for m in methods for s in ("200M", "500M", "1.2B")}
    offline = {f"pd_{m}_{s}" for m in ("vanilla", "star") for s in ("1.9B", "3.8B", "6.8B")}
    assert names == others | qwen | offline | {
        "pretrain_qwen2.5_7B",
        "real_teacher",
        "pd_cache_logits",
        "seqkd_qwen_200M",
        "minillm_qwen_200M",
        "miniplm_prx_qwen_200M",
    }
    assert all(path.stat().st_mode & stat.S_IXUSR for path in SCRIPTS)


@pytest.mark.parametrize(
    ("script", "lr", "layers"),
    [("200M", 6e-4, 12), ("500M", 3e-4, 24), ("1.2B", 2.5e-4, 24)],
)
def test_student_has_the_shape_and_learning_rate_of_the_paper(
    script: str, lr: float, layers: int, tmp_path: Path
):
    path = EXAMPLES / f"miniplm_qwen_{script}.sh"
    printed = commands(start(path, "--dry-run", "t", "h", str(tmp_path)).stdout)
    trainings = [accept(words) for words in printed if "pretrain" in words]
    reference, student = trainings
    assert (student.optimization.lr, student.optimization.min_lr) == (lr, pytest.approx(lr / 10))
    assert (student.model_shape.num_layers, student.training.train_iters) == (layers, 100_000)
    assert (reference.model_shape.num_layers, reference.training.train_iters) == (8, 9500)
    for config in trainings:
        assert config.training.global_batch_size == 512
        assert config.optimization.weight_decay == 0.1
        assert config.optimization.lr_warmup_iters == 2000


@pytest.mark.parametrize(("size", "steps"), [("200M", 25_000), ("500M", 45_000), ("1.2B", 65_000)])
@pytest.mark.parametrize("method", ["vanilla_kd", "miniplm_kd"])
def test_student_beside_a_teacher_differs_in_the_teacher_and_the_steps_of_the_paper(
    method: str, size: str, steps: int, tmp_path: Path
):
    alone = {"vanilla_kd": "pretrain", "miniplm_kd": "miniplm"}[method]
    students = []
    for name in (method, alone):
        script = EXAMPLES / f"{name}_qwen_{size}.sh"
        printed = commands(start(script, "--dry-run", "t", "hf/teacher", str(tmp_path)).stdout)
        students.append(accept([words for words in printed if "pretrain" in words][-1]))
    taught, plain = (to_flat(student) for student in students)
    differ = {name: value for name, value in taught.items() if plain[name] != value}
    assert differ.pop("save").rpartition("/")[2].startswith(method.replace("_", "-"))
    assert differ.pop("tensorboard_dir")
    assert differ == {
        "objective": "kd", "kd_loss": "soft_nll", "teacher": "online",
        "teacher_load": "hf/teacher", "align_flops_to": 5000,
    }  # fmt: skip
    sizes = (students[0].model_shape, get_family("qwen").presets["qwen1.5-1.8b"])
    student, teacher = map(count_parameters, sizes)
    assert students[0].training.aligned(student=student, teacher=teacher).train_iters == steps


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_holds_only_settings_that_exist_and_leaves_size_and_rate_to_the_run(recipe: Path):
    words = ["--config", str(recipe), "--train-data-path", "d", "--save", "s", "--lr", "1e-4"]
    config = parse_flags(importlib.import_module("megatron_miniplm.stages.pretrain").Config, words,
                         prog="pretrain")  # fmt: skip
    assert config.optimization.adam_beta2 == 0.98
    assert config.optimization.weight_decay == (0.1 if "paper" in recipe.stem else 0.01)
    assert config.training.train_iters == 100_000


def test_under_slurm_training_and_scoring_span_the_nodes_and_the_rest_runs_once(tmp_path: Path):
    job = {"SLURM_NNODES": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "99999999999"}
    done = start(
        EXAMPLES / "slurm/launch.sbatch", str(EXAMPLES / "miniplm_qwen_1.2B.sh"),
        "--dry-run", "t", "h", str(tmp_path), **job,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spread = {}
    for words in commands(done.stdout):
        accept(words)
        verb = words[words.index("megatron_miniplm") + 1]
        spread[verb] = words[0] == "srun" and words[words.index("--nnodes") + 1] == "4"
        assert ("--exit-duration-in-mins" in words) == (verb == "pretrain")
    assert spread == {
        "preprocess": False, "split": False, "pretrain": True, "score": True, "select": False,
        "convert": False,
    }  # fmt: skip


def test_score_array_gives_each_job_its_shard():
    environment = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1"}
    script = EXAMPLES / "slurm/score_array.sbatch"
    done = start(script, "--dry-run", "16", "pool", "model", "scores", **environment)
    assert done.returncode == 0, done.stderr
    (words,) = commands(done.stdout)
    assert accept(words).filling.job == (3, 16)


def test_dry_run_of_a_script_rehearses_the_training_whose_corpus_is_there(
    tmp_path: Path, tiny_tokenizer: Path
):
    text = tmp_path / "text.jsonl"
    records = [{"text": path.read_text()} for path in sorted(EXAMPLES.glob("*.sh"))]
    text.write_text("\n".join(map(json.dumps, records)))
    flags = ["--input", text, "--tokenizer-model", tiny_tokenizer, "--seq-length", "4096"]
    assert main(["preprocess", *map(str, flags), "--output-prefix", f"{tmp_path}/data/corpus"]) == 0
    script = EXAMPLES / "pretrain_qwen2.5_7B.sh"
    arguments = ["--dry-run", str(text), str(tiny_tokenizer), str(tmp_path)]
    job = {"SLURM_NNODES": "4", "SLURM_JOB_ID": "7"}
    done = start(script, *arguments, **job, GPU_GB="72")  # of 80: CUDA and NCCL need some
    assert done.returncode == 0, done.stderr
    assert "# layout       32 x cuda: TP 4 x PP 2 x DP 4" in done.stdout


STUB = """#!/usr/bin/env bash
# Stands for torchrun and python: records the verb, and makes the artifact that STOP_AT allows.
while [[ $1 != megatron_miniplm ]]; do shift; done
verb=$2; echo "$verb" >> "$CALLS"; shift 2
while [[ $# -gt 0 ]]; do case $1 in
    --save|--output) folder=$2;; --output-prefix|--pool-prefix) prefix=$2;; esac; shift; done
case $verb in
    pretrain) mkdir -p "$folder"; echo ' "train_iters": 9500,' > "$folder/run.json"
              echo "$STOP_AT" > "$folder/latest_checkpointed_iteration.txt";;
    score) mkdir -p "$folder"; touch "$folder/manifest.json";;
    convert) mkdir -p "$folder"; touch "$folder/config.json";;
    *) mkdir -p "$(dirname "$prefix")"; touch "$prefix.json";;
esac
"""


def test_stopped_training_ends_the_script_and_the_same_line_goes_on_from_there(tmp_path: Path):
    for name in ("torchrun", "python"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    calls, script = tmp_path / "calls", EXAMPLES / "miniplm_qwen_200M.sh"
    path = f"{tmp_path}:{os.environ['PATH']}"

    def attempt(stop_at: str) -> tuple[int, list[str]]:
        calls.write_text("")
        done = start(script, "t", "h", str(tmp_path / "out"), PATH=path, CALLS=str(calls),
                     STOP_AT=stop_at)  # fmt: skip
        return done.returncode, calls.read_text().split()

    assert attempt("4000") == (75, ["preprocess", "split", "pretrain"])
    code, verbs = attempt("9500")
    assert (code, verbs) == (
        0, ["pretrain", "score", "score", "select", "pretrain", "convert"]
    )  # fmt: skip
    assert attempt("9500") == (0, ["pretrain", "pretrain"])


def readme_commands(path: Path) -> list[list[str]]:
    """Commands of our program in the shell blocks of a page, without where their output goes."""
    found = []
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", path.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            words = words[: words.index(">")] if ">" in words else words
            if "megatron_miniplm" in words or words[:1] == ["miniplm"]:
                found.append(words)
    return found


PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted(PROJECT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_of_the_pages_are_accepted(page: Path):
    for words in readme_commands(page):
        accept(words)


def test_readme_shows_the_whole_pipeline():
    verbs = {words[words.index("megatron_miniplm") + 1] if "megatron_miniplm" in words else words[1]
             for words in readme_commands(PROJECT / "README.md")}  # fmt: skip
    assert {"preprocess", "split", "pretrain", "score", "select", "evaluate", "inspect"} <= verbs


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(PROJECT / folder / "README.md" for folder in ("benchmarks", "examples"))],
    ids=lambda path: str(path.relative_to(PROJECT)),
)
def test_links_and_make_targets_of_the_pages_exist(page: Path):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    rules = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    fenced = re.findall(r"```.*?```", text, re.DOTALL)
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(fenced + inline)))
    assert named <= rules


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (PROJECT / "CONTRIBUTING.md").read_text(), re.DOTALL)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for registry in (OBJECTIVES, KD_LOSSES, SELECTORS):
        monkeypatch.setattr(registry, "_items", dict(registry._items))


@pytest.mark.usefixtures("registries")
def test_the_loss_that_contributing_shows_has_the_gradient_of_its_own_words():
    space: dict[str, object] = {}
    exec(next(block for block in python_blocks() if "OBJECTIVES" in block), space)
    torch.manual_seed(0)
    hidden = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64)
    labels = torch.randint(0, 7, (2, 5))
    batch = Batch(labels, labels, torch.ones(2, 5, dtype=torch.bool), torch.arange(2))
    shard = VocabShard(first=0, size=7, valid=7, group=None)
    head = Head(hidden_sbh=hidden, weight_vh=weight, shard=shard)
    objective = OBJECTIVES["lm-long-context"](LossConfig(loss_normalization="token"))
    output = objective(head, batch)
    loss = output.loss_sum
    whole = (hidden @ weight.t()).transpose(0, 1)
    mean = loss.detach().double() / output.count
    torch.testing.assert_close(mean, objective.reference(whole, batch).detach(), rtol=1e-6, atol=0)
    logits = (hidden @ weight.t())[2:].flatten(0, 1)
    expected = functional.cross_entropy(logits, labels.t()[2:].flatten(), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # statistics are fp32
    loss.backward()
    assert hidden.grad[:2].abs().max() == 0
    assert hidden.grad[2:].abs().min() > 0


@pytest.mark.usefixtures("registries")
def test_the_divergence_that_contributing_shows_is_a_kd_loss_with_its_gradient():
    exec(next(block for block in python_blocks() if "KD_LOSSES" in block), {})
    torch.manual_seed(0)
    hidden = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    weight, teacher_hidden = torch.randn(7, 4).double(), torch.randn(5, 2, 4).double()
    labels = torch.randint(0, 7, (2, 5))
    batch = Batch(labels, labels, torch.ones(2, 5, dtype=torch.bool), torch.arange(2))
    shard = VocabShard(first=0, size=7, valid=7, group=None)
    student = Head(hidden_sbh=hidden, weight_vh=weight, shard=shard)
    teacher = Head(hidden_sbh=teacher_hidden, weight_vh=weight, shard=shard)
    cls = OBJECTIVES["kd"]
    objective = cls(LossConfig(), cls.Config(kd_loss="hellinger", kd_alpha=1.0))
    output = objective(student, batch, teacher)
    output.loss_sum.backward()
    found, hidden.grad = hidden.grad, None
    p, q = ((h @ weight.t()).softmax(-1) for h in (hidden, teacher_hidden))
    expected = (p.sqrt() - q.sqrt()).square().sum() / 2 / 5
    expected.backward()
    assert output.loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)  # fp32 weights
    torch.testing.assert_close(found, hidden.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.usefixtures("registries")
def test_the_selector_that_contributing_shows_gives_a_key_an_instance():
    space: dict[str, object] = {}
    exec(next(block for block in python_blocks() if "SELECTORS" in block), space)
    nll = np.array([1.0, 3.0])
    seen = SelectorInput(ids=np.arange(2), seed=1, teacher_scores=nll, reference_scores=2 * nll)
    np.testing.assert_array_equal(SELECTORS["half-difference"](seen), 1.5 * nll)
