"""The suite ``training``: `pretrain` as users start it, a plain PyTorch loop, and HF's Trainer.

The three train one model from the same weights on the same corpus in the same order, each in a
process of its own (`bench_trainers` has the other two), one after another in every round. What
counts is the median second of an update after the first ones: reading batches, the update, logging
every update; not the start. A case stops if the losses differ, so that the arithmetic is the same.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_core import Bench, CaseFunction, Clocked, Contestant, Suite, require_equal
from bench_plain_qwen import PlainQwen
from bench_process import run_measured
from bench_text import make_bpe, make_text, make_tokenizers
from bench_trainers import Job
from safetensors.torch import save_file

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import MiniPLMError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.kernels import cpu
from megatron_miniplm.models.family import ModelConfig, get_family
from megatron_miniplm.models.flops import count_parameters

_WARMUP = 2  # updates that are not timed: memory is new, kernels choose their code
_LOSS_TOLERANCE = {False: 2e-5, True: 5e-2}
"""Nats, by bf16: fp32 sums in another order; bf16 has 8 bits, and autocast rounds elsewhere."""
_SHAPE_FLAGS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, its vocabulary, and how it is trained."""

    shape: ModelConfig
    tokenizer: str
    """Of the shared data, or "8k": trained on what Python carries."""
    bf16: bool = False
    teacher: ModelConfig | None = None
    micro_batch: int = 4
    micro_batches: int = 2
    seq_length: int = 512
    updates: int = 8

    @property
    def quick(self) -> Setting:
        """A few seconds of it."""
        teacher = self.teacher and _shape(2, 64, 64, 4, 2)
        return replace(
            self, shape=_shape(2, 32, 64, 4, 2), teacher=teacher, micro_batch=2, seq_length=64,
            updates=_WARMUP + 1,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one process did."""

    losses: Sequence[float]
    """Of every update, nats per token."""
    peak_bytes: int


def _shape(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads,
        num_query_groups=groups, max_position_embeddings=2048,
    )  # fmt: skip


def _case(setting: Setting) -> CaseFunction:
    def run(bench: Bench) -> None:
        if setting.bf16 and "avx512_bf16" not in cpu.variants() and not bench.sizes.quick:
            bench.skip("this CPU has no instructions for bf16")
        else:
            _race(bench, setting.quick if bench.sizes.quick else setting)

    return run


def _race(bench: Bench, setting: Setting) -> None:
    tokenizer, corpus = _corpus(bench, setting)
    shape = replace(setting.shape, vocab_size=corpus.vocab_size)
    # transformers does not pad: a vocabulary of another multiple would be another model.
    shape = replace(shape, make_vocab_size_divisible_by=1)
    model = _weights(bench.scratch / "model", shape, tokenizer, seed=1)
    teacher = None
    if setting.teacher is not None:
        wide = replace(
            setting.teacher, vocab_size=corpus.vocab_size, make_vocab_size_divisible_by=1
        )
        teacher = str(_weights(bench.scratch / "teacher", wide, tokenizer, seed=2))
    job = Job(
        trainer="plain", corpus=str(corpus.prefix), model=str(model),
        output=str(bench.scratch / "output"), updates=setting.updates,
        micro_batch=setting.micro_batch, micro_batches=setting.micro_batches, lr=6e-4,
        warmup=_WARMUP, bf16=setting.bf16, teacher=teacher,
    )  # fmt: skip
    ours, plain, hf = "pretrain", "plain PyTorch loop", "Hugging Face Trainer"
    contestants = [_ours(bench, ours, job, shape), _other(bench, plain, job)]
    missing = [name for name in ("transformers", "accelerate") if not _is_there(name)]
    if setting.teacher is None and not missing:
        contestants.append(_other(bench, hf, replace(job, trainer="hf")))
    elif missing:
        bench.skip(f"{hf}: needs {' and '.join(missing)}")
    tokens = setting.micro_batch * setting.micro_batches * setting.seq_length
    timings = bench.race(
        *contestants,
        work=f"one of {setting.updates} updates of {tokens:,} tokens, {count_parameters(shape):,} "
        f"parameters, vocabulary {corpus.vocab_size:,}, {torch.get_num_threads()} threads",
    )
    apart = {name: _apart(timings[name].result, timings[plain].result) for name in timings}
    for name, distance in apart.items():
        require_equal(
            name, distance <= _LOSS_TOLERANCE[setting.bf16], f"its losses are {distance:.1e} off"
        )
    peers = [timing for name, timing in timings.items() if name != ours]
    bench.rate(
        "training", "tokens/s", tokens, ours=timings[ours], peers=peers, error_ours=apart[ours],
        errors=apart,
    )  # fmt: skip
    for peer in peers:
        bench.row(
            "peak memory of the process", "MB", ours=timings[ours].result.peak_bytes / 1e6,
            peer=(peer.name, peer.result.peak_bytes / 1e6), lower_is_better=True,
        )  # fmt: skip


def _apart(mine: Outcome, other: Outcome) -> float:
    return max(abs(a - b) for a, b in zip(mine.losses, other.losses, strict=True))


def _ours(bench: Bench, name: str, job: Job, shape: ModelConfig) -> Contestant:
    """The command as a user gives it."""
    save = bench.scratch / "run"
    words = [
        sys.executable, "-m", "megatron_miniplm", "pretrain", "--train-data-path", job.corpus,
        "--load", job.model, "--finetune", "--save", str(save),
        "--micro-batch-size", str(job.micro_batch),
        "--global-batch-size", str(job.micro_batch * job.micro_batches),
        "--train-iters", str(job.updates), "--lr", str(job.lr),
        "--lr-warmup-iters", str(job.warmup), "--seed", str(job.seed), "--log-interval", "1",
        "--loss-normalization", "token", "--wd-scope", "matrices",
        "--make-vocab-size-divisible-by", str(shape.make_vocab_size_divisible_by),
    ]  # fmt: skip
    for field in _SHAPE_FLAGS:
        words += [f"--{field.replace('_', '-')}", str(getattr(shape, field))]
    if job.bf16:
        words.append("--bf16")
    if job.teacher is not None:
        words += ["--objective", "kd", "--teacher", "online", "--teacher-load", job.teacher]

    def run() -> Clocked:
        figures = run_measured(words)
        lines = (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        seconds = [row["iteration time (ms)"] / 1e3 for row in rows]
        return _outcome(seconds, [row["lm loss"] for row in rows], figures.peak_resident)

    return Contestant(name=name, run=run, prepare=[lambda: shutil.rmtree(save, True)])


def _other(bench: Bench, name: str, job: Job) -> Contestant:
    path = job.write(bench.scratch / f"{job.trainer}.json")
    program = Path(__file__).with_name("bench_trainers.py")

    def run() -> Clocked:
        figures = run_measured([sys.executable, str(program), str(path)])
        found = json.loads(figures.output.splitlines()[-1])
        return _outcome(found["seconds"], found["losses"], figures.peak_resident)

    return Contestant(name=name, run=run)


def _outcome(seconds: Sequence[float], losses: Sequence[float], peak: int) -> Clocked:
    return Clocked(statistics.median(seconds[_WARMUP:]), Outcome(losses=losses, peak_bytes=peak))


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _corpus(bench: Bench, setting: Setting) -> tuple[Path, Corpus]:
    """(tokenizer, corpus of packed instances)."""
    text = make_text(bench, shards=1)
    if setting.tokenizer == "8k":
        folder = make_bpe(bench.scratch / "8k", bench.sizes.pick(2000, 8192))
    else:
        folder = next(iter(make_tokenizers(bench, setting.tokenizer).values()))
    prefix = bench.scratch / "corpus"
    code = main([
        "preprocess", "--input", str(text.path), "--json-keys", "text", "--domain-key", "domain",
        "--tokenizer-model", str(folder), "--seq-length", str(setting.seq_length),
        "--output-prefix", str(prefix),
    ])  # fmt: skip
    if code:
        raise MiniPLMError(f"preprocess ended with code {code}")
    return folder, Corpus.open(prefix)


def _weights(folder: Path, shape: ModelConfig, tokenizer: Path, *, seed: int) -> Path:
    """A Hugging Face folder of weights: normal ones in matrices, 1 in norms and 0 in biases."""
    shutil.copytree(tokenizer, folder)
    config: dict[str, Any] = get_family("qwen").config_to_hf(shape)
    (folder / "config.json").write_text(json.dumps(config))
    model = PlainQwen(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, shape.init_method_std, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


_REAL = Setting(shape=_shape(8, 160, 448, 5, 5), tokenizer="smollm2")
_SMALL = Setting(shape=_shape(10, 256, 704, 8, 4), tokenizer="8k")
SUITE = Suite(
    "training",
    {
        # Of 10 M parameters, 8 M are the embeddings: most of the time goes to the head.
        "qwen-10m": _case(_REAL),
        # 8 M are in layers: what a framework costs around its matrix products.
        "qwen-10m-vocabulary-8k": _case(_SMALL),
        "qwen-10m-vocabulary-8k-kd": _case(replace(_SMALL, teacher=_shape(8, 512, 1408, 8, 4))),
        "qwen-10m-bf16": _case(replace(_REAL, bf16=True)),
    },
)
