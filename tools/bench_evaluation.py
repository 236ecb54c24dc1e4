"""The suite ``evaluation``: zero-shot tasks over our model and over transformers'.

Both are asked the same examples of the same task by the same harness, with the same weights in fp32
on the same device, in turns; tokenization and metrics are part of what is timed. Log-likelihoods
must agree within 1e-3 nats, and predictions, also those by log-likelihoods per character, wherever
the two best choices are not as near as that.
The harness takes log-softmax in fp32, whose rounding adds up over a long answer: where that leaves
log-likelihoods further apart, it is asked again, untimed, with log-softmax in fp64.
transformers runs in a thread of its own, where nothing of what makes megatron.core run on a CPU is
switched on.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_core import Bench, CaseFunction, Contestant, Suite, require_equal

from megatron_miniplm.evaluation.harness import Subject, adapter, hugging_face_model, run_tasks
from megatron_miniplm.evaluation.tasks import TASKS, TaskFile
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.parallel.topology import ParallelConfig, initialize, shutdown

_ROWS = 16
TOLERANCE = 1e-3
"""Nats of a continuation in fp32, whose tokens are some ten to a hundred."""


def _case(task: str) -> CaseFunction:
    def run(bench: Bench) -> None:
        for library in ("lm_eval", "transformers"):
            if importlib.util.find_spec(library) is None:
                bench.skip(f"{library} is not installed")
                return
        folder, data = bench.sizes.hf, bench.sizes.task_data
        if bench.sizes.quick:
            folder, data = _tiny_model(bench.scratch), _tiny_task(bench.scratch, task)
        if folder is None or data is None:
            bench.skip("needs --hf FOLDER, a model, and --task-data FOLDER, examples")
            return
        names = (task, TASKS[task].other_name)
        if not any(file for name in names for file in data.glob(f"{name}.jsonl*")):
            bench.skip(f"{data} has no {task}.jsonl")
            return
        file = TaskFile.open(task, data)
        with ThreadPoolExecutor(1) as beside, _our_model(folder) as ours:
            _race(bench, file, ours, _Theirs(folder, beside))

    return run


def _race(bench: Bench, file: TaskFile, ours: Any, theirs: _Theirs) -> None:
    limit = min(len(file.records), bench.sizes.pick(4, 200))
    timings = bench.race(
        Contestant(name="megatron_miniplm", run=lambda: run_tasks(ours, [file], limit=limit)),
        Contestant(name="lm-eval hf", run=lambda: theirs(file, limit)),
        work=f"{limit} examples of {file.name}, fp32, {_ROWS} rows",
    )
    mine, peer = timings.values()
    (found, samples), (_, expected) = mine.result, peer.result
    apart = error = compare(samples[file.name], expected[file.name])
    if apart >= TOLERANCE:
        _, exact = theirs(file, limit, softmax=torch.float64)
        apart = compare(samples[file.name], exact[file.name])
        error = compare(expected[file.name], exact[file.name])
    require_equal(mine.name, apart < TOLERANCE, f"log-likelihoods are {apart:.1e} apart")
    bench.rate(
        "examples", "examples/s", limit, ours=mine, peers=[peer], error_ours=apart,
        errors={peer.name: error},
    )  # fmt: skip
    bench.row(
        "CPU time", "s per 100 examples", lower_is_better=True,
        ours=100 * float(np.median(mine.cpu_seconds)) / limit,
        peer=(peer.name, 100 * float(np.median(peer.cpu_seconds)) / limit),
    )  # fmt: skip
    bench.row(
        found["tasks"][file.name]["metric"], "share", ours=found["tasks"][file.name]["value"],
        peer=(peer.name, peer.result[0]["tasks"][file.name]["value"]),
    )  # fmt: skip


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """Largest difference of two log-likelihoods; refuses predictions that differ but for ties.

    A prediction is a choice, both by log-likelihoods and by log-likelihoods per character, or of
    the only continuation whether it is the likeliest one.
    """
    largest = 0.0
    for mine, peer in zip(ours, theirs, strict=True):
        require_equal("megatron_miniplm", mine["prompt_hash"] == peer["prompt_hash"], "prompts")
        a, b = (np.array(each["log_likelihoods"]) for each in (mine, peer))
        largest = max(largest, float(np.abs(a - b).max()))
        if len(b) > 1:
            for size in (np.ones(len(b)), np.array(peer["characters"])):
                near = (b + TOLERANCE) / size >= ((b - TOLERANCE) / size).max()
                right = bool(near[(a / size).argmax()])
                require_equal("megatron_miniplm", right, f"prediction of {mine}")
        else:
            require_equal("megatron_miniplm", mine["greedy"] == peer["greedy"], f"greed of {mine}")
    return largest


class _Theirs:
    """The harness's own model of the same folder, used in a thread of its own."""

    def __init__(self, folder: Path, beside: ThreadPoolExecutor) -> None:
        self._beside = beside
        self._model = beside.submit(
            hugging_face_model, folder, bf16=False, micro_batch_size=_ROWS, add_bos_token=False
        ).result()

    def __call__(self, file: TaskFile, limit: int, softmax: torch.dtype | None = None) -> Any:
        self._model.softmax_dtype = softmax  # None: that of the logits, the harness's default
        return self._beside.submit(run_tasks, self._model, [file], limit=limit).result()


@contextmanager
def _our_model(folder: Path) -> Iterator[Any]:
    topology = initialize(ParallelConfig())
    try:
        weights = open_weights(folder)
        tokenizer = weights.tokenizer()
        yield adapter()(
            Subject(
                model=weights.read(
                    weights.fit_tokenizer(tokenizer, topology),
                    topology,
                    torch.float32,
                    valid_vocab=tokenizer.vocab_size,
                ),
                tokenizer=tokenizer,
                topology=topology,
                longest=weights.config.max_position_embeddings,
                micro_batch_size=_ROWS,
            )
        )
    finally:
        shutdown()


def _tiny_model(folder: Path) -> Path:
    import tokenizers
    import transformers

    torch.manual_seed(1)
    made = folder / "tiny"
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=257, max_position_embeddings=512,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: at for at, letter in enumerate(["<|endoftext|>", *sorted(letters)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>"
    ).save_pretrained(made)
    return made


def _tiny_task(folder: Path, task: str) -> Path:
    draw = random.Random(task)
    made = folder / "data"
    made.mkdir()
    words = ["the", "sea", "was", "calm", "and", "nobody", "saw", "old", "ships", "for", "days"]

    def some(count: int) -> str:
        return " ".join(draw.choice(words) for _ in range(count))

    with (made / f"{task}.jsonl").open("w") as file:
        for _ in range(4):
            record = {
                "text": some(9), "context": some(6), "choices": [some(3), some(2)], "gold": 1,
                "contexts": [some(4), some(4)], "continuation": some(3),
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
    return made


SUITE = Suite("evaluation", {task: _case(task) for task in TASKS})
