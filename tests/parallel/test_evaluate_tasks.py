"""``evaluate --tasks``: our model in any layout, and the harness's own model of its export."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import DataError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.evaluation.harness import NAME, Subject, adapter, hugging_face_model
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.parallel.topology import ParallelConfig, initialize, shutdown
from tests.pool import RankPool

pytest.importorskip("lm_eval", reason="the [eval] extra is not installed")
transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")

TASKS = ("hellaswag", "lambada_openai", "winogrande", "piqa")
METRICS = {
    "hellaswag": "acc_norm",
    "lambada_openai": "acc",
    "winogrande": "acc",
    "piqa": "acc_norm",
}
EXAMPLES, LIMIT = 12, 9
LONGEST = 32
Results = tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]
"""results.json, and the samples of every task."""


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    flags = ["--from", "megatron", "--to", "hf", "--load", str(model), "--save", str(folder)]
    assert main(["convert", *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def examples(big_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for each task, out of text that the model knows."""
    folder, draw = tmp_path_factory.mktemp("examples"), random.Random(2)
    corpus = Corpus.open(big_corpus)
    tokenizer = corpus.tokenizer()

    def some(count: int = 1) -> str:
        rows = [draw.randrange(len(corpus)) for _ in range(count)]
        words = " ".join(tokenizer.decode(corpus.tokens(row)) for row in rows).split(" ")
        return " ".join(word.strip("\n\ufffd") or "x" for word in words) or "x"

    makers: dict[str, Any] = {
        "hellaswag": lambda: {
            "activity_label": some(), "ctx_a": some(), "ctx_b": "it", "label": "1",
            "endings": [some() for _ in range(4)],
        },
        "lambada_openai": lambda: {"text": f"{some(2)} self"},
        "winogrande": lambda: {
            "sentence": f"{some()} _ is", "option1": "self", "option2": "it", "answer": "1",
        },
        "piqa": lambda: {"context": some(), "choices": [some(), some()], "gold": 1},
    }  # fmt: skip
    for name, make in makers.items():
        lines = (json.dumps(make()) + "\n" for _ in range(EXAMPLES))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def flags(examples: Path, output: Path, *more: str) -> list[str]:
    return [
        "evaluate", "--tasks", ",".join(TASKS), "--task-data", str(examples), "--limit", str(LIMIT),
        "--output", str(output), *more,
    ]  # fmt: skip


def read(output: Path) -> Results:
    def lines(name: str) -> list[dict[str, Any]]:
        text = (output / f"samples_{name}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    return json.loads((output / "results.json").read_text()), {name: lines(name) for name in TASKS}


@pytest.fixture(scope="module")
def theirs(
    exported: Path, examples: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """By the harness's own model."""
    output = tmp_path_factory.mktemp("theirs")
    pool.run(flags(examples, output, "--hf", str(exported)), 1)
    return read(output)


LAYOUTS = {
    "one process": (1, ()),
    "TP2": (2, ("--tensor-model-parallel-size", "2")),
    "DP2": (2, ()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_what_the_harness_itself_says_of_the_exported_model(
    layout: str, model: Path, examples: Path, theirs: Results, pool: RankPool, tmp_path: Path
) -> None:
    world, more = LAYOUTS[layout]
    pool.run(flags(examples, tmp_path, "--load", str(model), *more), world)
    assert_same_answers(read(tmp_path), theirs)


def put_bos(source: Path, folder: Path) -> None:
    """The tokenizer, in a folder with a model, where it begins every text with its token 0."""
    tokenizer = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    bos = tokenizer.id_to_token(0)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    # Without this, transformers makes another tokenizer, of the family's class.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_model_with_a_state_and_a_bos_says_what_the_harness_itself_says(
    tiny_tokenizer: Path, examples: Path, pool: RankPool, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=512, state_size=8
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    put_bos(tiny_tokenizer, tmp_path / "mamba")
    for name, words, world in (
        ("theirs", ["--hf"], 1),
        ("ours", ["--tensor-model-parallel-size", "2", "--load"], 2),
    ):
        pool.run(flags(examples, tmp_path / name, *words, str(tmp_path / "mamba")), world)
    assert_same_answers(read(tmp_path / "ours"), read(tmp_path / "theirs"))
    assert read(tmp_path / "ours")[0]["opening_ids"] == [0], "as the harness, without being told"


def test_the_harness_own_model_may_be_of_a_family_that_is_not_converted(
    tiny_tokenizer: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=512)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    put_bos(tiny_tokenizer, tmp_path / "gpt2")
    words = ["--tasks", "piqa", "--task-data", str(examples), "--limit", "2", "--hf"]
    assert main(["evaluate", *words, str(tmp_path / "gpt2")]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["piqa"]["examples"] == 2
    assert main(["evaluate", *words, "gpt2"]) == 2, "no name on a hub"
    assert "gpt2 is no Hugging Face folder" in capsys.readouterr().err


def assert_same_answers(found: Results, expected: Results) -> None:
    (results, samples), (theirs, answers) = found, expected
    for name in TASKS:
        mine, right = results["tasks"][name], theirs["tasks"][name]
        assert mine["metric"] == METRICS[name]
        assert mine["examples"] == LIMIT
        assert mine["data"]["examples"] == EXAMPLES
        assert mine["value"] == right["value"]
        assert mine["stderr"] == right["stderr"]
        assert mine["truncated"] == right["truncated"]
        for sample, answer in zip(samples[name], answers[name], strict=True):
            assert sample["prompt_hash"] == answer["prompt_hash"]
            assert sample["greedy"] == answer["greedy"]
            # fp32, up to 40 tokens of 6 nats
            assert sample["log_likelihoods"] == pytest.approx(answer["log_likelihoods"], abs=2e-4)
            if "acc_norm" in sample:
                best = np.divide(sample["log_likelihoods"], sample["characters"]).argmax()
                assert sample["acc_norm"] == (best == sample["target"])
    values = [results["tasks"][name]["value"] for name in TASKS]
    assert results["mean"] == pytest.approx(sum(values) / len(TASKS))
    assert results["harness"] == theirs["harness"]
    assert results["opening_ids"] == theirs["opening_ids"]


def test_rolling_and_context_free_likelihoods_are_those_of_the_harness_itself(
    exported: Path, big_corpus: Path
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    text = big_corpus.with_name("text.jsonl").read_text()[200:600]
    theirs = hugging_face_model(exported, bf16=False, micro_batch_size=4, add_bos_token=False)
    theirs._max_length = LONGEST
    topology = initialize(ParallelConfig())
    try:
        weights = open_weights(exported)
        tokenizer = weights.tokenizer()
        shape = weights.fit_tokenizer(tokenizer, topology)
        size = tokenizer.vocab_size
        subject = Subject(
            model=weights.read(shape, topology, torch.float32, valid_vocab=size),
            tokenizer=tokenizer, topology=topology, longest=LONGEST, micro_batch_size=4,
        )  # fmt: skip
        adapter()
        ours = get_model(NAME).create_from_arg_obj({"subject": subject}, {"batch_size": 1})
        for kind, asked in (
            ("loglikelihood_rolling", [(text,), ("def",)]),
            ("loglikelihood", [("", "import os"), (text, " self")]),
        ):
            requests = [Instance(kind, {}, arguments, at) for at, arguments in enumerate(asked)]
            found, expected = (getattr(each, kind)(requests) for each in (ours, theirs))
            assert np.array(found) == pytest.approx(np.array(expected), abs=2e-3)
        assert ours.truncated == theirs.truncated == {(text, " self")}
        with pytest.raises(DataError, match=r"'def'.*a continuation of"):
            ours.loglikelihood([Instance("loglikelihood", {}, ("def", text), 0)])
    finally:
        shutdown()
    assert abs(expected[0][0]) > 1
    assert len(tokenizer.encode_flat([text])[0]) > 3 * LONGEST
