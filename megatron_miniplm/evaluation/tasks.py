"""The nine zero-shot tasks of the paper, from local files.

Prompts, targets and metrics are lm-evaluation-harness's own definitions; only where the examples
come from is replaced, so nothing is asked of a hub. ``FOLDER/TASK.jsonl`` (also ``.xz``, ``.gz``,
``.zst``) holds one example a line, in one of two forms:

    as the data set is published    {"question": ..., "choices": {...}, "answerKey": "B"}
    with the prompt made            {"context": ..., "choices": [...], "gold": 1}

The metric of a task is fixed (arXiv 2410.17215 takes the normalised accuracy where the harness has
one, which depends on the harness's version).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.manifest import hash_file
from megatron_miniplm.data.sources import LineFile

Metric = Literal["acc", "acc_norm"]
Record = dict[str, Any]
_SUFFIXES = ("", ".xz", ".gz", ".zst")
_CHOICES = {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "gold"}
_CONTEXTS = {"doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "continuation"}


def _labels(record: Record) -> Sequence[str]:
    """Of the choices of OpenBookQA and ARC."""
    choices = record["choices"]
    return choices.get("label", ()) if isinstance(choices, dict) else ()


def _as_number_or_text(numbers: range) -> list[int | str]:
    return [*numbers, *map(str, numbers)]


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """What of a task is not the harness's definition of it."""

    label: str
    """Its name in the paper's tables."""
    metric: Metric
    folder: str
    """Of the harness's definition."""
    published: tuple[str, ...]
    """Fields of an example as the data set is published, as far as they are used."""
    golds: Callable[[Record], Iterable[Any]] | None = None
    """What the last of these may be, where it says which choice is right: of an example that has no
    right choice, the harness says that it was answered wrongly."""
    made: Mapping[str, str] = field(default_factory=lambda: _CHOICES)
    """Where an example with the prompt made has what."""
    other_name: str | None = None
    """Of the file."""

    @property
    def made_fields(self) -> tuple[str, ...]:
        """Fields of an example with the prompt made."""
        return tuple(self.made.values())


TASKS: Mapping[str, TaskSource] = {
    "hellaswag": TaskSource(
        label="HS", metric="acc_norm", folder="hellaswag",
        published=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        golds=lambda record: _as_number_or_text(range(len(record["endings"]))),
    ),
    "lambada_openai": TaskSource(
        label="LAM", metric="acc", folder="lambada", published=("text",), made={}
    ),
    "winogrande": TaskSource(
        label="Wino", metric="acc", folder="winogrande", made=_CONTEXTS,
        published=("sentence", "option1", "option2", "answer"),
        golds=lambda _: ("1", "2"),
    ),
    "openbookqa": TaskSource(
        label="OBQA", metric="acc_norm", folder="openbookqa",
        published=("question_stem", "choices", "answerKey"),
        golds=_labels,
    ),
    "arc_easy": TaskSource(
        label="ARC-e", metric="acc_norm", folder="arc",
        published=("question", "choices", "answerKey"),
        golds=_labels,
    ),
    "arc_challenge": TaskSource(
        label="ARC-c", metric="acc_norm", folder="arc",
        published=("question", "choices", "answerKey"),
        golds=_labels,
    ),
    "piqa": TaskSource(
        label="PIQA", metric="acc_norm", folder="piqa",
        published=("goal", "sol1", "sol2", "label"),
        golds=lambda _: (0, 1),
    ),
    "social_iqa": TaskSource(
        label="SIQA", metric="acc", folder="siqa", other_name="siqa",
        published=("context", "question", "answerA", "answerB", "answerC", "label"),
        golds=lambda _: _as_number_or_text(range(1, 4)),
    ),
    "storycloze_2018": TaskSource(
        label="Story", metric="acc", folder="storycloze", other_name="storycloze",
        published=(
            "input_sentence_1", "input_sentence_2", "input_sentence_3", "input_sentence_4",
            "sentence_quiz1", "sentence_quiz2", "answer_right_ending",
        ),
        golds=lambda _: (1, 2),
    ),
}  # fmt: skip
"""Name in the harness -> the rest, in the order of the paper's tables."""


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """The examples of a task on disk."""

    name: str
    path: Path
    records: Sequence[Record]
    made: bool
    """Whether their prompts are made."""

    @classmethod
    def open(cls, name: str, folder: Path) -> TaskFile:
        """Read them all; refuses lines that lack a field, and golds that are no choice."""
        source, path = TASKS[name], _find(name, folder)
        records = list(_records(path))
        if not records:
            raise DataError(f"{path} has no examples")
        made = bool(source.made) and set(source.made_fields) <= records[0].keys()
        wanted = source.made_fields if made else source.published
        for number, record in enumerate(records, start=1):
            missing = [each for each in wanted if record.get(each) is None]
            if missing:
                raise DataError(
                    f"{path}, line {number}: an example of {name} has {_listed(source.published)} "
                    f"as published, or {_listed(source.made_fields)} with its prompt made; this "
                    f"one lacks {_listed(missing)}"
                )
            _check_gold(record, source, made=made, where=f"{path}, line {number}")
        return cls(name=name, path=path, records=records, made=made)

    def facts(self) -> dict[str, Any]:
        """What results say of it."""
        return {"path": str(self.path), "hash": hash_file(self.path), "examples": len(self.records)}

    def definition(self) -> dict[str, Any]:
        """What replaces parts of the harness's definition."""
        changed: dict[str, Any] = {
            "task": self.name,
            "custom_dataset": lambda **_: {"test": _dataset(self.records)},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
            "should_decontaminate": False,
        }
        if self.made:
            changed |= {"process_docs": None, **TASKS[self.name].made}
        return changed


def check_names(names: Sequence[str]) -> None:
    """Refuse tasks that there are not, and tasks given twice."""
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"--tasks: there is no task {name!r}; there are {', '.join(TASKS)}")
        if names.count(name) > 1:
            raise ConfigError(f"--tasks has {name} twice")


def _dataset(records: Sequence[Record]) -> Any:
    return importlib.import_module("datasets").Dataset.from_list(list(records))


def _find(name: str, folder: Path) -> Path:
    names = [name, TASKS[name].other_name or name]
    for each in names:
        for suffix in _SUFFIXES:
            if (path := folder / f"{each}.jsonl{suffix}").is_file():
                return path
    raise DataError(
        f"--task-data {folder} has no {names[0]}.jsonl (nor .xz, .gz or .zst): tasks are read from "
        "local files only"
    )


def _records(path: Path) -> Iterator[Record]:
    number = 0
    for block in LineFile(str(path)).blocks():
        for line in block.splitlines():
            number += 1
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number} is no JSON object")
            yield record


def _check_gold(record: Record, source: TaskSource, *, made: bool, where: str) -> None:
    if source.golds is None:
        return
    name = "gold" if made else source.published[-1]
    golds = range(len(record[source.made["doc_to_choice"]])) if made else source.golds(record)
    choices = [repr(each) for each in golds]
    if repr(record[name]) not in choices:  # of another type counts as another
        raise DataError(
            f"{where}: {name} {record[name]!r} is none of the choices: {_listed(choices)}"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"
