"""``evaluate``: losses of a model on held-out corpora, and its accuracy on zero-shot tasks.

Three losses, because each answers another question: the mean over instances of per-instance means
(what the paper reports), the mean over all tokens, and bits per byte, which compares models with
different tokenizers.

    bits per byte = sum of NLL over scored tokens / ln 2 / bytes that those tokens stand for

Tasks are those of lm-evaluation-harness (`evaluation.harness`), read from local files.

Or of a proxy's predictions: how well they stand for exact scores (`evaluation.proxy`). Or of
corpora alone: how diverse they are (`evaluation.diversity`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch

from megatron_miniplm.core.config import flat_fields, print_json, refuse_without, to_flat
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import atomic_file, provenance, write_json
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import training_mask
from megatron_miniplm.data.tokenizers import Tokenizer, TokenizerType, load_tokenizer
from megatron_miniplm.evaluation.checkpoint_curves import (
    POINTS,
    Points,
    curve,
    find_checkpoints,
    table,
)
from megatron_miniplm.evaluation.diversity import DiversityConfig, judge_diversity
from megatron_miniplm.evaluation.harness import Subject, adapter, hugging_face_model, run_tasks
from megatron_miniplm.evaluation.proxy import ProxyConfig, judge_proxy
from megatron_miniplm.evaluation.run_curves import read_history
from megatron_miniplm.evaluation.tasks import TASKS, TaskFile, check_names
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.flops import count_parameters
from megatron_miniplm.models.hf_folder import hash_folder
from megatron_miniplm.models.weights import Weights, open_weights
from megatron_miniplm.objectives.lm import LossSummary, summarize_rows
from megatron_miniplm.parallel.topology import ParallelConfig, Topology, initialize, shutdown


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Zero-shot tasks, through lm-evaluation-harness (extra [eval])."""

    tasks: tuple[str, ...] = ()
    """Names in the harness, also with commas between them: hellaswag, lambada_openai, winogrande,
    openbookqa, arc_easy, arc_challenge, piqa, social_iqa, storycloze_2018."""
    task_data: Path | None = None
    """Folder with TASK.jsonl (or .xz, .gz, .zst) of each; nothing is downloaded."""
    limit: int | None = None
    """Examples of each task, from the first; default: all."""
    hf: Path | None = None
    """Instead of --load: a Hugging Face folder, run by the harness's own model (extra [hf])."""
    add_bos_token: bool | None = None
    """Begin texts as the tokenizer does by itself, which is with a BOS for Llama 3; default: do so
    for models of other programs, and not for checkpoints of runs, which train without."""
    tokenizer_model: Path | None = None
    """Of a GGUF file or a Megatron-LM checkpoint; other models have theirs beside them."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """Kind of --tokenizer-model."""
    eod_token: str | None = None
    """Its document separator, which stands before a text without context."""

    def __post_init__(self) -> None:
        check_names(self.names)
        if bool(self.tasks) != (self.task_data is not None):
            raise ConfigError("--tasks and --task-data need each other: tasks are local files")
        if self.hf is not None and not self.tasks:
            raise ConfigError(f"--hf {self.hf} is for --tasks: give losses a model with --load")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit} must be at least 1")
        if not self.tasks:
            refuse_without(self, ("limit", "add_bos_token", "tokenizer_model"), "--tasks")
        if self.hf is not None:
            refuse_without(self, ("tokenizer_model",), "--load (a folder for --hf has its own)")
        if self.tokenizer_model is None:
            refuse_without(self, ("tokenizer_type", "eod_token"), "--tokenizer-model")

    @property
    def names(self) -> list[str]:
        """The tasks one by one."""
        return [name for each in self.tasks for name in each.split(",") if name]

    def files(self) -> list[TaskFile]:
        """Their examples; refuses files that are not what they should be."""
        return [TaskFile.open(name, self.task_data) for name in self.names if self.task_data]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Evaluate a model (held-out loss, zero-shot accuracy), a proxy's predictions, or corpora."""

    load: str | None = None
    """Checkpoint of a run or of Megatron-LM, Hugging Face folder, or GGUF file."""
    checkpoints: tuple[str, ...] = ()
    """Instead of --load: --save folders of runs, all of whose checkpoints are evaluated, or folders
    of single iterations; globs in quotes."""
    lm_loss: tuple[str, ...] = ()
    """Prefixes of held-out corpora or subsets; NAME=PREFIX names one in the results."""
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    diversity: DiversityConfig = field(default_factory=DiversityConfig)
    output: str | None = None
    """Folder for results.json, samples_TASK.jsonl (not of --checkpoints), curves.csv and, until all
    checkpoints are evaluated, points.json; default: print only."""
    micro_batch_size: int = 16
    """Instances, or rows of a task, of one forward pass."""
    bf16: bool = False
    """Compute in bfloat16; otherwise fp32."""
    max_instances: int | None = None
    """Use the first so many instances of each corpus; default: all."""
    overwrite: bool = False
    """Replace what an earlier evaluation left in --output."""
    zero_shot: TasksConfig = field(default_factory=TasksConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "max_instances"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
        judged = [self.proxy != ProxyConfig(), self.diversity != DiversityConfig()]
        if not any(judged):
            self._check_model()
        elif all(judged) or self.load or self.checkpoints or self.lm_loss or self.zero_shot.tasks:
            raise ConfigError(
                "--load, --checkpoints, --lm-loss and --tasks judge a model, the flags beside "
                "--proxy-scores a proxy's predictions, and those beside --diversity corpora: run "
                "`evaluate` for each"
            )
        named_prefixes("--diversity", self.diversity.diversity)

        self._refuse_idle()

    def _refuse_idle(self) -> None:
        if not (self.load or self.checkpoints):
            refuse_without(self, flat_fields(ParallelConfig), "--load or --checkpoints")
            if self.zero_shot.hf is None:
                refuse_without(self, ("micro_batch_size", "bf16"), "a model")
        if not self.lm_loss:
            refuse_without(self, ("max_instances",), "--lm-loss")

    @property
    def lone(self) -> str | None:
        """What is asked for and is the work of one process; None where all of a job take part."""
        given = {
            "--proxy-scores": self.proxy != ProxyConfig(),
            "--diversity": self.diversity != DiversityConfig(),
            "--hf": self.zero_shot.hf is not None,
        }
        return next((flag for flag, there in given.items() if there), None)

    def _check_model(self) -> None:
        hf = self.zero_shot.hf
        if sum(map(bool, (self.load, self.checkpoints, hf))) != 1:
            raise ConfigError(
                "give one of --load MODEL, --checkpoints RUN, --hf FOLDER, --proxy-scores and "
                "--diversity"
            )
        if hf is not None and self.lm_loss:
            raise ConfigError(f"--hf {hf} is for --tasks: --lm-loss needs --load")
        if not self.lm_loss and not self.zero_shot.tasks:
            raise ConfigError("nothing to evaluate on: give --lm-loss, --tasks, or both")
        named_prefixes("--lm-loss", self.lm_loss)


def run(config: Config) -> None:
    """Print the results as JSON on stdout, and write OUTPUT/results.json."""
    target = Path(config.output) / "results.json" if config.output else None
    if target is not None and target.exists() and not config.overwrite:
        raise ConfigError(f"{target} exists: pass --overwrite or another --output")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.lone and processes > 1:
        raise ConfigError(
            f"{config.lone} is for one process, and this is one of {processes}: start it without "
            "torchrun"
        )
    if config.proxy != ProxyConfig():
        _conclude(config, {"proxy": judge_proxy(config.proxy)}, NO_SAMPLES)
        return
    if config.diversity != DiversityConfig():
        prefixes = named_prefixes("--diversity", config.diversity.diversity)
        _conclude(config, {"diversity": judge_diversity(config.diversity, prefixes)}, NO_SAMPLES)
        return
    if config.zero_shot.hf is not None:
        _conclude(config, *_of_hugging_face(config, config.zero_shot.hf))
        return
    topology = initialize(config.parallel)
    try:
        if config.checkpoints:
            results, samples = _of_checkpoints(config, topology), NO_SAMPLES
        else:
            weights = open_weights(Path(config.load or ""))
            results, samples = _of_weights(config, weights, topology)
        if topology.rank == 0:
            _conclude(config, results, samples)
    finally:
        shutdown()


Facts = Mapping[str, Any]
Results = dict[str, Any]
Samples = Mapping[str, list[dict[str, Any]]]
NO_SAMPLES: Samples = {}


def _of_checkpoints(config: Config, topology: Topology) -> Results:
    """Curves over the checkpoints of runs, one after another; refuses misfits before the first."""
    runs = topology.from_rank0(lambda: find_checkpoints(config.checkpoints))
    histories = topology.from_rank0(lambda: {save: read_history(save, save.name) for save in runs})
    models = {save: [open_weights(folder) for folder in folders] for save, folders in runs.items()}
    identity = _refuse_misfits(config, [each for own in models.values() for each in own], topology)
    points = topology.from_rank0(lambda: Points(config.output, identity))
    curves, size = [], 0
    for save, own in models.items():
        found: dict[int, Facts] = {}
        for weights in own:
            assert weights.iteration is not None, "a checkpoint of ours has its number"
            size = count_parameters(weights.config)
            if (results := points.of(_facts(weights, topology))) is None:
                get_logger().info("evaluating %s", weights.path)
                results, _ = _of_weights(config, weights, topology)
                if topology.rank == 0:
                    points.add(results)
            found[weights.iteration] = results
        curves.append(curve(histories[save], save, size, found))
    return {"curves": curves}


def _refuse_misfits(config: Config, models: Sequence[Weights], topology: Topology) -> Facts:
    """Try every model on every corpus and the tasks, without reading it; what decides results."""
    prefixes = named_prefixes("--lm-loss", config.lm_loss)
    corpora = {name: Corpus.open(prefix) for name, prefix in prefixes.items()}
    files = config.zero_shot.files()
    for weights in models:
        for corpus in corpora.values():
            weights.fit(corpus, topology)
        if files:
            weights.fit_tokenizer(_tokenizer(config.zero_shot, weights), topology)
    flags = to_flat(config)
    del flags["checkpoints"], flags["output"], flags["overwrite"]
    return {
        "flags": {name: str(value) for name, value in flags.items()},
        "corpora": {name: corpus.fingerprint for name, corpus in corpora.items()},
        "tasks": {file.name: file.facts()["hash"] for file in files},
        **provenance(),
    }


def _facts(weights: Weights, topology: Topology) -> Facts:
    return {"path": str(weights.path), "fingerprint": weights.shared_fingerprint(topology)}


def _of_weights(config: Config, weights: Weights, topology: Topology) -> tuple[Results, Samples]:
    files = config.zero_shot.files()
    model = _Model(weights, topology, torch.bfloat16 if config.bf16 else torch.float32)
    results: Results = {"model": _facts(weights, topology)}
    samples = NO_SAMPLES
    if config.lm_loss:
        results["lm_loss"] = _losses(config, model)
    if files:
        asked = adapter()(_subject(config, model))
        found, samples = run_tasks(asked, files, limit=config.zero_shot.limit)
        results |= found
    return results, samples


def _of_hugging_face(config: Config, folder: Path) -> tuple[Results, Samples]:
    """By the harness's own model."""
    files = config.zero_shot.files()
    facts = {"path": str(folder), "fingerprint": hash_folder(folder)}
    model = hugging_face_model(
        folder, bf16=config.bf16, micro_batch_size=config.micro_batch_size,
        add_bos_token=config.zero_shot.add_bos_token,
    )  # fmt: skip
    found, samples = run_tasks(model, files, limit=config.zero_shot.limit)
    return {"model": facts | {"run_by": "lm-eval"}, **found}, samples


def _conclude(config: Config, results: Results, samples: Samples) -> None:
    print_json(results)
    if config.output is None:
        return
    folder = Path(config.output)
    # What --overwrite replaces goes whole, and first that which says it is complete.
    old = ["results.json", "curves.csv", *(f"samples_{name}.jsonl" for name in TASKS)]
    for name in old:
        (folder / name).unlink(missing_ok=True)
    for name, each in samples.items():
        with atomic_file(folder / f"samples_{name}.jsonl") as file:
            file.writelines(orjson.dumps(sample) + b"\n" for sample in each)
    if (curves := results.get("curves")) and config.lm_loss:
        with atomic_file(folder / "curves.csv") as file:
            file.write(table(curves))
    write_json(folder / "results.json", {**results, "config": to_flat(config), **provenance()})
    (folder / POINTS).unlink(missing_ok=True)


class _Model:
    """Weights, read once for all that has the same vocabulary."""

    def __init__(self, weights: Weights, topology: Topology, dtype: torch.dtype) -> None:
        self.weights, self.topology, self.dtype = weights, topology, dtype
        self._read: tuple[int, ModelChunks] | None = None

    def for_corpus(self, corpus: Corpus) -> ModelChunks:
        return self._sized(self.weights.fit(corpus, self.topology), corpus.vocab_size)

    def for_tokenizer(self, tokenizer: Tokenizer) -> ModelChunks:
        shape = self.weights.fit_tokenizer(tokenizer, self.topology)
        return self._sized(shape, tokenizer.vocab_size)

    def _sized(self, shape: ModelConfig, vocabulary: int) -> ModelChunks:
        if self._read is None or self._read[0] != vocabulary:
            self._read = None  # one at a time
            model = self.weights.read(shape, self.topology, self.dtype, valid_vocab=vocabulary)
            self._read = vocabulary, model
        return self._read[1]


def _subject(config: Config, model: _Model) -> Subject:
    tokenizer = _tokenizer(config.zero_shot, model.weights)
    add_bos_token = config.zero_shot.add_bos_token
    if add_bos_token is None:
        add_bos_token = not model.weights.iteration  # of another program, or converted from it
    return Subject(
        model=model.for_tokenizer(tokenizer),
        tokenizer=tokenizer,
        topology=model.topology,
        longest=model.weights.config.max_position_embeddings,
        micro_batch_size=config.micro_batch_size,
        add_bos_token=add_bos_token,
    )


def _tokenizer(config: TasksConfig, weights: Weights) -> Tokenizer:
    if config.tokenizer_model is None:
        return weights.tokenizer()
    return load_tokenizer(
        config.tokenizer_model, kind=config.tokenizer_type, eod_token=config.eod_token
    )


def named_prefixes(flag: str, given: tuple[str, ...]) -> dict[str, str]:
    """Name in the results -> prefix; refuses a name for two prefixes. Names have no slash."""
    named: dict[str, str] = {}
    for each in given:
        name, equals, prefix = each.partition("=")
        if not equals or "/" in name:
            name, prefix = each, each
        if name in named:
            raise ConfigError(f"{flag} has two sets named {name!r}: name them NAME=PREFIX")
        named[name] = prefix
    return named


def _losses(config: Config, model: _Model) -> dict[str, Any]:
    losses: dict[str, Any] = {}
    for name, prefix in named_prefixes("--lm-loss", config.lm_loss).items():
        corpus = Corpus.open(prefix)
        rows = np.arange(min(len(corpus), config.max_instances or len(corpus)))
        summary = summarize_rows(
            model.for_corpus(corpus), corpus, rows, micro_batch_size=config.micro_batch_size,
            topology=model.topology,
        )  # fmt: skip
        losses[name] = _row(summary, corpus, rows)
        get_logger().info("%s: %s", name, losses[name])
    return losses


def _row(summary: LossSummary, corpus: Corpus, rows: np.ndarray) -> dict[str, Any]:
    num_bytes = scored_bytes(corpus, rows)
    nats = summary.token_mean * summary.num_tokens
    return {
        **asdict(summary),
        "perplexity": math.exp(summary.token_mean),
        "num_bytes": num_bytes,
        "bits_per_byte": nats / math.log(2) / max(num_bytes, 1),
        "corpus": corpus.fingerprint,
    }


def scored_bytes(corpus: Corpus, rows: np.ndarray) -> int:
    """Bytes that the scored target tokens of `rows` stand for; a separator stands for none."""
    sizes = np.array([len(text) for text in corpus.tokenizer().token_bytes()], dtype=np.int64)
    sizes[corpus.eod_id] = 0
    total = 0
    for row in rows:
        ids = torch.from_numpy(corpus.tokens(int(row)).astype(np.int64))
        mask = training_mask(ids[None, :-1], torch.tensor([len(ids) - 1]), eod_id=corpus.eod_id)[0]
        total += int(sizes[ids[1:][mask].numpy()].sum())
    return total
