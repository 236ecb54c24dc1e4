"""``plan``: what each method would cost for a corpus, models and a cluster, before anything exists.

Arithmetic alone: no file is read but a model's shape, nothing is written. What goes into it beside
sizes are utilisations, which a run of one's own should say (``--measured-run``), and how much less
training a selected corpus takes, which nobody knows beforehand (``--times-less-compute``).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megatron_miniplm.core.config import print_json
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.evaluation.cost import (
    METHODS,
    Counting,
    Kind,
    Model,
    PlanSetting,
    dense_logits,
    pays_off_after,
)
from megatron_miniplm.evaluation.plan_costs import Cluster, method_costs
from megatron_miniplm.evaluation.plan_table import cost_table, notes
from megatron_miniplm.evaluation.run_curves import read_history
from megatron_miniplm.models.family import ModelConfig, preset_settings
from megatron_miniplm.models.flops import peak_flops
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.training.estimate import checkpoint_bytes

_POSITIVE = (
    "tokens", "corpus_tokens", "reference_tokens", "proxy_tokens", "proxy_epochs", "seq_length",
    "peak_tflops", "gpus", "logit_bytes_per_token",
)  # fmt: skip
_SHARES = ("selection_ratio", "mfu", "inference_mfu", "decoding_mfu")
_ROUNDING = 1e-9
_CHECKPOINT_BYTES = 14
"""Of a parameter: bf16, its fp32 master and Adam's two moments."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Plan a distillation: FLOPs, GPU-hours, time and storage of every method; reads no corpus."""

    tokens: tuple[float, ...] = (50e9, 100e9, 1e12, 15e12)
    """Training tokens of each student; a table for each number."""
    students: tuple[str, ...] = ("qwen1.5-200m", "qwen1.5-500m", "qwen1.5-1.2b")
    """Presets, model folders or files, or numbers of parameters (0.2e9)."""
    teacher: str = "qwen1.5-1.8b"
    """The same of the teacher."""
    reference: str = "qwen1.5-104m"
    """The same of the reference model."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Rows of the table."""
    corpus_tokens: float | None = None
    """Tokens to select from, which teacher and reference score; default: as many as make each
    selected token new, tokens / selection ratio. With fewer, training repeats them."""
    selection_ratio: float = 0.5
    """Share of the corpus that is selected."""
    reference_tokens: float = 5e9
    """Tokens that the reference is trained on."""
    proxy_tokens: float = 0.1e9
    """Tokens that are scored to train the proxy."""
    proxy_epochs: int = 3
    """Passes over these."""
    seq_length: int = 1024
    """Tokens of an instance."""
    count_flops: Counting = "megatron"
    """FLOPs of a forward pass: megatron (matrices, causal attention, the head), parameters (2 N, as
    the paper), or non-embedding (2 N without embeddings). MFU is of the first."""
    gpu: str = "H100"
    """Device, as CUDA names it; for its dense bf16 peak."""
    peak_tflops: float | None = None
    """Dense peak of one device in TFLOP/s, where --gpu is not known."""
    gpus: int = 8
    """Number of devices."""
    mfu: float = 0.4
    """Model FLOPs utilisation of training, between 0 and 1: an assumption, unless --measured-run
    replaces it."""
    measured_run: Path | None = None
    """--save folder of a run on such devices: its MFU, a teacher's work in it, is taken for
    --mfu."""
    inference_mfu: float | None = None
    """The same of scoring and caching; default: that of training."""
    decoding_mfu: float = 0.05
    """The same while text is generated: an assumption, that memory's speed decides."""
    logit_bytes_per_token: float = 100
    """Size of a logit store; `cache-logits --estimate` measures it."""
    checkpoints_kept: int = 20
    """Checkpoints of every student that stay on disk (the paper saves one in 5,000 of 100,000)."""
    times_less_compute: float = 1.4
    """Assumed for where selecting pays: how many times less training it takes to the loss of
    training on everything. The paper's laws say 1.40, 1.44 and 1.91 for its three students."""
    json: bool = False
    """Print JSON for machines."""

    def __post_init__(self) -> None:
        for name in _POSITIVE + _SHARES:
            value = getattr(self, name)
            for each in value if isinstance(value, tuple) else (value,):
                flag = f"--{name.replace('_', '-')} {each}"
                if each is not None and not 0 < each < math.inf:
                    raise ConfigError(f"{flag} must be above 0")
                if each is not None and name in _SHARES and each > 1:
                    raise ConfigError(f"{flag} is a share: at most 1")
        if self.checkpoints_kept < 0:
            raise ConfigError(f"--checkpoints-kept {self.checkpoints_kept} must not be negative")
        if self.times_less_compute < 1:
            raise ConfigError(
                f"--times-less-compute {self.times_less_compute} must be 1 or more: with less, "
                "selecting never pays"
            )
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ConfigError(f"--methods {' '.join(unknown)}: known are {', '.join(METHODS)}")
        if not (self.tokens and self.students and self.methods):
            raise ConfigError("--tokens, --students and --methods each need at least one")


def run(config: Config) -> None:
    """Print the plan."""
    plans = plan(config)
    if config.json:
        print_json(plans)
        return
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    cluster, models = plans["cluster"], plans["models"]
    used = ", ".join(f"{kind} {100 * share:.3g} %" for kind, share in cluster["mfu"].items())
    console.print(
        f"{cluster['gpus']:,} x {cluster['name']} of {cluster['peak'] / 1e12:,.0f} TFLOP/s; MFU "
        f"{cluster['mfu_from']}: {used}\nFLOPs by {plans['count_flops']}; forward pass, a token: "
        + ", ".join(f"{m['name']} {m['forward']:.3g}" for m in models.values()),
        highlight=False,
    )
    for each in plans["plans"]:
        console.print(cost_table(each))
        console.print("\n".join(notes(each, plans)), highlight=False)


def plan(config: Config) -> dict[str, Any]:
    """All the numbers: FLOPs, GPU-hours, hours, bytes."""
    models = {name: _model(name, config) for name in (*config.students, config.teacher,
                                                      config.reference)}  # fmt: skip
    cluster = _cluster(config)
    return {
        "count_flops": config.count_flops,
        "models": {
            name: {"name": name, "parameters": model.parameters, "forward": model.forward}
            for name, model in models.items()
        },
        "cluster": {
            **vars(cluster),
            "mfu_from": f"of {config.measured_run}" if config.measured_run else "assumed",
        },
        "times_less_compute": config.times_less_compute,
        "plans": [_plan(config, cluster, models, tokens) for tokens in config.tokens],
    }


def _plan(
    config: Config, cluster: Cluster, models: Mapping[str, Model], tokens: float
) -> dict[str, Any]:
    """Of one number of training tokens."""
    settings = _settings(config, models, tokens)
    first = settings[0]
    kept = config.checkpoints_kept * sum(_checkpoint(each.student) for each in settings)
    return {
        "tokens": first.tokens,
        "corpus_tokens": first.corpus_tokens,
        "dense_logits": dense_logits(first),
        "checkpoints": kept,
        "methods": {name: method_costs(name, settings, cluster) for name in config.methods},
        "pays_off": _pays_off(config, cluster, models, tokens),
    }


def _settings(config: Config, models: Mapping[str, Model], tokens: float) -> list[PlanSetting]:
    """One for each student."""
    teacher = models[config.teacher]
    common = PlanSetting(
        student=teacher,
        teacher=teacher,
        reference=models[config.reference],
        tokens=round(tokens),
        corpus_tokens=round(config.corpus_tokens or tokens / config.selection_ratio),
        selection_ratio=config.selection_ratio,
        reference_tokens=round(config.reference_tokens),
        proxy_tokens=round(config.proxy_tokens),
        proxy_epochs=config.proxy_epochs,
        seq_length=config.seq_length,
        logit_bytes=config.logit_bytes_per_token,
    )
    if teacher.shape is not None:
        common = replace(common, vocabulary=teacher.shape.padded_vocab_size)
    return [replace(common, student=models[name]) for name in config.students]


_COMPARED = (
    ("miniplm", "vanilla-kd"), ("miniplm-proxy", "vanilla-kd"), ("pd-offline", "vanilla-kd"),
    ("miniplm", "pretrain"), ("miniplm-proxy", "pretrain"),
)  # fmt: skip


def _pays_off(
    config: Config, cluster: Cluster, models: Mapping[str, Model], tokens: float
) -> list[dict[str, Any]]:
    """From which student on, and after how many trained tokens, work done once is made up for.

    Beside a teacher in every step, at equal tokens; beside training on everything, with so many
    fewer tokens as --times-less-compute says (and as much less to score, where the corpus is not
    fixed). Students are the mean one.
    """
    found = []
    for name, other in _COMPARED:
        if not {name, other} <= set(config.methods):
            continue
        less = config.times_less_compute if other == "pretrain" else 1.0
        mine = method_costs(name, _settings(config, models, tokens / less), cluster)
        theirs = method_costs(other, _settings(config, models, tokens), cluster)
        saved = (theirs["training_gpu_hours"] - mine["training_gpu_hours"]) / len(config.students)
        students = pays_off_after(mine["offline_gpu_hours"], saved)
        found.append({
            "method": name, "beside": other, "offline_gpu_hours": mine["offline_gpu_hours"],
            "saved_gpu_hours_per_student": saved,
            # Sums of GPU-hours are rounded: what is exactly 1 must not become 2.
            "students": math.ceil(students * (1 - _ROUNDING)) if students < math.inf else None,
            # With the corpus scored once, whatever is trained on it.
            "tokens": students * tokens if students < math.inf else None,
        })  # fmt: skip
    return found


def _model(name: str, config: Config) -> Model:
    """A number of parameters, a preset, or something on disk."""
    if (size := _number(name)) is not None:
        if not 0 < size < math.inf:
            raise ConfigError(f"a model of {name} parameters: give a number above 0")
        return Model.of_size(size, name)
    if Path(name).exists():
        shape = open_weights(Path(name)).config
    else:
        try:
            shape = ModelConfig(model=name, **preset_settings(name))
        except ConfigError as error:
            raise ConfigError(
                f"{name} is no number, nothing on disk and no preset: {error}"
            ) from error
    return Model.of_shape(shape, config.count_flops, config.seq_length, name)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _cluster(config: Config) -> Cluster:
    peak = config.peak_tflops * 1e12 if config.peak_tflops else peak_flops(config.gpu)
    if peak is None:
        raise ConfigError(f"the peak of --gpu {config.gpu!r} is not known: pass --peak-tflops")
    training = config.mfu if config.measured_run is None else _measured(config.measured_run)
    mfu: dict[Kind, float] = {
        "training": training,
        "forward": config.inference_mfu or training,
        "decoding": config.decoding_mfu,
    }
    return Cluster(name=config.gpu, gpus=config.gpus, peak=peak, mfu=mfu)


def _measured(folder: Path) -> float:
    """Median MFU of the second half of a run, with what its teacher does in the same time."""
    steps = read_history(folder, folder.name).steps
    if "response length" in steps:
        raise ConfigError(
            f"--measured-run {folder} is of a student that writes, so its time is decoding as "
            "much as training: give a run of another method, or pass --mfu and --decoding-mfu"
        )
    if "mfu" not in steps:
        raise ConfigError(
            f"--measured-run {folder}: its metrics.jsonl has no mfu, since the peak of its device "
            "was not known: train with --peak-tflops, or pass --mfu"
        )
    mfu = steps.get("mfu with teacher", steps["mfu"])
    return float(np.nanmedian(mfu[len(mfu) // 2 :]))


def _checkpoint(model: Model) -> int:
    if model.shape is None:
        return _CHECKPOINT_BYTES * model.parameters
    return checkpoint_bytes(model.shape, bf16=True, distributed_optimizer=True)
