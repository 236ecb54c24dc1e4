"""Examples of zero-shot tasks from local files, and what the harness makes of them."""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.evaluation import harness
from megatron_miniplm.evaluation.tasks import TASKS, TaskFile

STORY = {f"input_sentence_{at}": f"Sentence {at}." for at in (1, 2, 3, 4)}
LETTERS = {"label": ["A", "B"], "text": ["Sand.", "Water."]}
# As published, with the prompt made, and what of it is asked: (context, continuation) of each.
EXAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]] = {
    "hellaswag": (
        {
            "activity_label": "Cooking", "ctx_a": "[header] A pan [title] is hot.  He",
            "ctx_b": "he", "endings": ["[step] stirs.", "runs  off."], "label": "1",
        },
        {"context": "Cooking: A pan. is hot. He He", "gold": 1,
         "choices": [" stirs.", "runs off."]},
        [("Cooking: A pan. is hot. He He", "  stirs."),
         ("Cooking: A pan. is hot. He He", " runs off.")],
    ),
    "winogrande": (
        {"sentence": "Ann saw Eve as _ was tall.", "option1": "Ann", "option2": "Eve",
         "answer": "2"},
        {"contexts": ["Ann saw Eve as Ann", "Ann saw Eve as Eve"], "gold": 1,
         "continuation": "was tall.", "choices": ["Ann", "Eve"]},
        [("Ann saw Eve as Ann", " was tall."), ("Ann saw Eve as Eve", " was tall.")],
    ),
    "openbookqa": (
        {"question_stem": "Fish live in", "choices": LETTERS, "answerKey": "B"},
        {"context": "Fish live in", "choices": ["Sand.", "Water."], "gold": 1},
        [("Fish live in", " Sand."), ("Fish live in", " Water.")],
    ),
    "arc_easy": (
        {"question": "Fish live in?", "choices": LETTERS, "answerKey": "B"},
        {"context": "Question: Fish live in?\nAnswer:", "choices": ["Sand.", "Water."], "gold": 1},
        [("Question: Fish live in?\nAnswer:", f" {each}") for each in LETTERS["text"]],
    ),
    "piqa": (
        {"goal": "wash", "sol1": "Sand.", "sol2": "Water.", "label": 1},
        {"context": "Question: wash\nAnswer:", "choices": ["Sand.", "Water."], "gold": 1},
        [("Question: wash\nAnswer:", f" {each}") for each in LETTERS["text"]],
    ),
    "social_iqa": (
        {"context": "Jo fell.", "question": "And then?", "answerA": "up", "answerB": "ow",
         "answerC": "no", "label": "2"},
        {"context": "Q: Jo fell. And then?\nA:", "choices": ["up", "ow", "no"], "gold": 1},
        [("Q: Jo fell. And then?\nA:", f" {each}") for each in ("up", "ow", "no")],
    ),
    "storycloze_2018": (
        {**STORY, "sentence_quiz1": "Good.", "sentence_quiz2": "Bad.", "answer_right_ending": 2},
        {"context": " ".join(STORY.values()), "choices": ["Good.", "Bad."], "gold": 1},
        [(" ".join(STORY.values()), f" {each}") for each in ("Good.", "Bad.")],
    ),
}  # fmt: skip
EXAMPLES["arc_challenge"] = EXAMPLES["arc_easy"]


def write(folder: Path, name: str, *records: dict[str, Any]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def asked(name: str, folder: Path) -> tuple[list[tuple[str, str]], Any]:
    """What the harness asks about the only example, and which answer it takes for right."""
    pytest.importorskip("lm_eval", reason="the [eval] extra is not installed")
    task = harness.harness_tasks([TaskFile.open(name, folder)])[name]
    task.build_all_requests(limit=1, rank=0, world_size=1)
    document = task.eval_docs[0]
    right = task.doc_to_text(document) if name == "winogrande" else task.doc_to_target(document)
    return [request.args for request in task.instances], right


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_made_prompt_asks_what_the_harness_makes_of_the_published_example(
    name: str, tmp_path: Path
) -> None:
    published, made, expected = EXAMPLES[name]
    for form in ("published", "made"):
        (tmp_path / form).mkdir()
    found = asked(name, write(tmp_path / "published", name, published))
    assert asked(name, write(tmp_path / "made", name, made)) == found
    assert found == (expected, 1)


def test_the_last_word_of_lambada_is_asked_with_its_blank(tmp_path: Path) -> None:
    folder = write(tmp_path, "lambada_openai", {"text": "Two\n\nlines and a word"})
    assert asked("lambada_openai", folder)[0] == [("Two\n\nlines and a", " word")]


def test_every_real_file_opens_with_the_official_number_of_examples(shared_dir: Path) -> None:
    counts = {
        name: len(TaskFile.open(name, shared_dir / "eval").records)
        for name in TASKS if name != "storycloze_2018"
    }  # fmt: skip
    assert counts == {
        "hellaswag": 10042, "lambada_openai": 5153, "winogrande": 1267, "openbookqa": 500,
        "arc_easy": 2376, "arc_challenge": 1172, "piqa": 1838, "social_iqa": 1954,
    }  # fmt: skip


def test_a_compressed_file_and_the_other_name_are_found(tmp_path: Path) -> None:
    line = json.dumps(EXAMPLES["social_iqa"][1]) + "\n"
    (tmp_path / "siqa.jsonl.xz").write_bytes(lzma.compress(line.encode()))
    file = TaskFile.open("social_iqa", tmp_path)
    assert file.made
    assert len(file.records) == 1


def test_examples_that_lack_something_are_refused_with_their_line(tmp_path: Path) -> None:
    made = EXAMPLES["piqa"][1]
    with pytest.raises(DataError, match=r"has no piqa\.jsonl"):
        TaskFile.open("piqa", tmp_path)
    with pytest.raises(DataError, match=r"line 2.*this one lacks gold"):
        TaskFile.open("piqa", write(tmp_path, "piqa", made, {**made, "gold": None}))
    with pytest.raises(DataError, match="line 1: gold 2 is none of the choices: 0, 1"):
        TaskFile.open("piqa", write(tmp_path, "piqa", {**made, "gold": 2}))
    with pytest.raises(DataError, match=r"line 1.*as published, or context, choices, gold"):
        TaskFile.open("piqa", write(tmp_path, "piqa", {"question": "?"}))


@pytest.mark.parametrize(
    ("name", "gold"),
    [
        ("piqa", "1"), ("piqa", -1), ("piqa", 2), ("social_iqa", "0"), ("social_iqa", ""),
        ("storycloze_2018", "1"), ("storycloze_2018", 3), ("hellaswag", ""), ("winogrande", ""),
        ("arc_easy", "1"), ("openbookqa", 1),
    ],
)  # fmt: skip
def test_a_published_example_whose_right_choice_is_none_is_refused_with_its_line(
    name: str, gold: Any, tmp_path: Path
) -> None:
    good = EXAMPLES[name][0]
    field = TASKS[name].published[-1]
    write(tmp_path, name, good, {**good, field: gold})
    with pytest.raises(DataError, match=rf"line 2: {field} {gold!r} is none of the choices"):
        TaskFile.open(name, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks squad --task-data .", "no task 'squad'"),
        ("--tasks piqa,piqa --task-data .", "piqa twice"),
        ("--tasks piqa", "need each other"),
        ("--lm-loss a=x a=y", "two sets named 'a'"),
        ("--lm-loss x/a=b x/a=b", "two sets named 'x/a=b'"),
        ("--lm-loss a --checkpoints b", "give one of --load MODEL"),
        ("", "nothing to evaluate on"),
        (
            "--lm-loss a --limit 3 --add-bos-token True",
            "--limit 3, --add-bos-token True has no effect",
        ),
        ("--lm-loss a --tokenizer-model t", "--tokenizer-model t has no effect without --tasks"),
        ("--lm-loss a --eod-token x", "--eod-token x has no effect without --tokenizer-model"),
        ("--tasks piqa --task-data . --max-instances 3", "no effect without --lm-loss"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    flags: str, message: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    assert main(["evaluate", "--load", "nowhere", *flags.split()]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--hf f --tasks piqa --task-data . --tokenizer-model t", "has no effect without --load"),
        ("--hf f --tasks piqa --task-data . --tensor-model-parallel-size 2", "effect without --lo"),
        ("--diversity a --bf16 --micro-batch-size 3", "--micro-batch-size 3, --bf16 True has no"),
        ("--diversity a --max-instances 3", "has no effect without --lm-loss"),
        ("--proxy-scores a --pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 2 h"),
    ],
)
def test_flags_of_another_kind_of_evaluation_are_refused(
    flags: str, message: str, capfd: pytest.CaptureFixture
) -> None:
    assert main(["evaluate", *flags.split()]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    "flags", ["--hf f --tasks piqa --task-data .", "--diversity a", "--proxy-scores a"]
)
def test_what_one_process_does_is_refused_in_a_job_of_several(
    flags: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate", *flags.split()]) == 2
    assert "one of 2: start it without torchrun" in capfd.readouterr().err


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-miniplm\[eval\]'"):
        harness.run_tasks(None, [])


def test_the_harness_speaks_on_rank_0_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with harness._quiet():
            print("an answer?")
            print("a bar", file=sys.stderr)
    assert capsys.readouterr() == ("", "an answer?\na bar\n")
