"""Zero-shot tasks through lm-evaluation-harness: our models as one of its models.

The harness makes prompts and computes metrics; a model only says how likely a continuation is
(`evaluation.likelihood`). As the harness has it for Hugging Face models, context and continuation
are tokenized together, blanks between the two belong to the continuation, and what is too long
loses its beginning.

Every process of a job runs the harness on all examples, and the model's answers are a collective:
so the harness need not know of any layout. It needs the extra ``[eval]``, which is imported when
a task is run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.data.tokenizers import Tokenizer
from megatron_miniplm.evaluation.likelihood import Question, answer
from megatron_miniplm.evaluation.tasks import TASKS, TaskFile
from megatron_miniplm.models.chunks import ModelChunks
from megatron_miniplm.parallel.topology import Topology

NAME = "megatron-miniplm"
"""Of our models in the harness's registry."""
_BOOTSTRAPS = 200
"""Resamples for the standard error of a perplexity; that of an accuracy has a formula."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is asked, and how."""

    model: ModelChunks
    tokenizer: Tokenizer
    topology: Topology
    longest: int
    """Positions that the model was made for."""
    micro_batch_size: int
    """Rows of a forward pass."""
    add_bos_token: bool = False
    """Begin every text as the tokenizer does by itself (with a BOS, or not at all)."""

    @functools.cached_property
    def opening(self) -> list[int]:
        """Ids that every text begins with."""
        return self.tokenizer.opening_ids() if self.add_bos_token else []

    def encode(self, text: str) -> list[int]:
        """Ids of a text, its opening included."""
        ids, _ = self.tokenizer.encode_flat([text])
        return [*self.opening, *ids.tolist()]


def _noting(base: Any) -> Any:
    """That model of the harness's, and which texts were too long for it."""

    class Noting(base):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self.truncated: set[tuple[str, str]] = set()

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            begin, end = super()._encode_pair(context, continuation)
            if len(begin) + len(end) > self.max_length + 1:
                self.truncated.add((context, continuation))
            return begin, end

    return Noting


def _question(texts: Any, context: list[int], continuation: list[int], longest: int) -> Question:
    try:
        return Question.of(context, continuation, longest)
    except DataError as error:
        raise DataError(f"{repr(texts)[:300]}: {error}") from error


@functools.cache
def adapter() -> Any:
    """The harness's class of our models, made of a `Subject`; registered there as `NAME`.

    ``lm_eval.simple_evaluate`` takes its objects, or the name with ``{"subject": subject}`` once
    this function was called: the harness looks for no plugins.
    """
    api = _import("lm_eval.api.model")
    utils = _import("lm_eval.utils")

    base: Any = _noting(api.TemplateLM)

    class MegatronModel(base):
        def __init__(self, subject: Subject, **unused: Any) -> None:  # batch size and device
            super().__init__()
            self.subject, self.max_length = subject, subject.longest

        @property
        def eot_token_id(self) -> int:
            return self.subject.tokenizer.eod_id

        @property
        def prefix_token_id(self) -> int:
            return self.subject.opening[0] if self.subject.opening else self.eot_token_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **unused: Any
        ) -> list[int]:
            ids = self.subject.encode(string)
            return ids[len(self.subject.opening) :] if add_special_tokens is False else ids

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = True
        ) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return found

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
        ) -> list[tuple[float, bool]]:
            subject = self.subject
            answers = answer(
                subject.model,
                [_question(*request, subject.longest) for request in requests],
                longest=subject.longest,
                micro_batch_size=subject.micro_batch_size,
                topology=subject.topology,
            )
            return [(each.log_likelihood, each.greedy) for each in answers]

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = True
        ) -> list[float]:
            windows = [
                [utils.make_disjoint_window(each) for each in self._windows(request.args[0])]
                for request in requests
            ]
            found = iter(
                self._loglikelihood_tokens([(None, *pair) for own in windows for pair in own])
            )
            return [sum(next(found)[0] for _ in own) for own in windows]

        def _windows(self, text: str) -> Any:
            return utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            raise ConfigError(
                "tasks that generate are not run over Megatron layouts: export the model "
                "(`convert --to hf`) and evaluate that with the harness itself"
            )

    _import("lm_eval.api.registry").register_model(NAME)(MegatronModel)
    return MegatronModel


def hugging_face_model(
    folder: Path, *, bf16: bool, micro_batch_size: int, add_bos_token: bool | None
) -> Any:
    """The harness's own model over a Hugging Face folder, in this process; needs ``[hf]``, too.

    `add_bos_token`: None leaves the beginning of texts to the tokenizer.

    For use outside of `parallel.platform`, which makes CUDA mean the CPU where there is no GPU.
    """
    torch = importlib.import_module("torch")
    _import("transformers", extra="hf")
    make = _noting(_import("lm_eval.models.huggingface").HFLM)
    return make(
        pretrained=str(folder),
        dtype="bfloat16" if bf16 else "float32",
        device="cuda" if torch.cuda.is_available() else "cpu",
        batch_size=micro_batch_size,
        add_bos_token=add_bos_token,
    )


def run_tasks(
    model: Any, files: Sequence[TaskFile], *, limit: int | None = None
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """(results by task with what they rest on, an object for each example by task).

    `model`: of `adapter` or `hugging_face_model`. `limit`: only so many examples of each, from the
    first.
    """
    evaluator = _import("lm_eval.evaluator")
    with _quiet():
        found = evaluator.evaluate(
            model, {"tasks": harness_tasks(files)}, limit=limit,
            bootstrap_iters=_BOOTSTRAPS,
        )  # fmt: skip
    tasks = {file.name: _result(found, file, model.truncated) for file in files}
    results = {
        "tasks": tasks,
        "mean": mean(each["value"] for each in tasks.values()),
        "tasks_in_mean": len(tasks),
        "opening_ids": _opening(model),
        "harness": {
            name: importlib.metadata.version(name) for name in ("lm-eval", "datasets")
        },
    }  # fmt: skip
    samples = {file.name: [_sample(each) for each in found["samples"][file.name]] for file in files}
    return results, samples


def harness_tasks(files: Sequence[TaskFile]) -> dict[str, Any]:
    """The harness's tasks over these examples, by name."""
    tasks = _import("lm_eval.tasks")
    definitions = Path(tasks.__file__).parent
    folders = {str(definitions / TASKS[file.name].folder) for file in files}
    manager = tasks.TaskManager(include_defaults=False, include_path=sorted(folders))
    # Only what a group holds is merged with the definition of that name.
    group = {"group": "local", "task": [file.definition() for file in files]}
    found: dict[str, Any] = manager.load([group])["tasks"]
    return found


def _opening(model: Any) -> list[int]:
    """Ids that every text began with."""
    ids: list[int] = model.tok_encode("a")
    return ids[: ids.index(model.tok_encode("a", add_special_tokens=False)[0])]


def _result(found: Any, file: TaskFile, too_long: set[tuple[str, str]]) -> dict[str, Any]:
    """Value and standard error by the fixed metric, then everything that the harness gives."""
    source, samples = TASKS[file.name], found["samples"][file.name]
    truncated = sum(not too_long.isdisjoint(sample["arguments"]) for sample in samples)
    if truncated:
        get_logger().info(
            "%s: %d of %d examples are longer than the model reads and lose their beginning",
            file.name, truncated, len(samples),
        )  # fmt: skip
    every = {
        key.removesuffix(",none"): value
        for key, value in found["results"][file.name].items()
        if key.endswith(",none") and isinstance(value, int | float)
    }
    return {
        "label": source.label,
        "metric": source.metric,
        "value": every[source.metric],
        "stderr": every.get(f"{source.metric}_stderr"),
        "examples": found["n-samples"][file.name]["effective"],
        "truncated": truncated,
        "every_metric": every,
        "version": found["versions"].get(file.name),
        "data": file.facts(),
    }


def _sample(sample: Any) -> dict[str, Any]:
    """What two models are compared by: log-likelihoods of one example, and what became of them.

    `acc_norm` is that of log-likelihoods over `characters`, where the harness leaves out the blank
    that it puts before a choice.
    """
    answers = sample["filtered_resps"]
    return {
        "example": sample["doc_id"],
        "prompt_hash": sample["prompt_hash"],
        "target": sample["target"],
        "log_likelihoods": [float(value) for value, _ in answers],
        "greedy": [bool(greedy) for _, greedy in answers],
        "characters": [len(continuation) - 1 for _, continuation in sample["arguments"]],
        **{name: sample[name] for name in ("acc", "acc_norm") if name in sample},
    }


def _import(name: str, *, extra: str = "eval") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs {name.partition('.')[0]} ({error}): "
            f"pip install 'megatron-miniplm[{extra}]'"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's chatter off stdout, which is for the answer, and its warnings from stderr.

    Its progress bars come from every rank: those above 0 are silenced.

    Its bootstrap forks a process for every core unless told not to; a job of several ranks must
    not be forked.
    """
    logger = logging.getLogger("lm_eval")
    level, before = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.ExitStack() as stack:
            if int(os.environ.get("RANK", "0")) != 0:
                nowhere = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            yield
    finally:
        logger.setLevel(level)
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before
