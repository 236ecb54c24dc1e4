"""Log-likelihoods of continuations: those of transformers, and the same in every layout."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.evaluation.likelihood import Answer, Question, answer, pack
from megatron_miniplm.models.branches import can_branch, reading_branches
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.parallel.topology import ParallelConfig, initialize, shutdown
from tests.parallel.test_generation import MODELS
from tests.parallel.test_hf_parity import make
from tests.pool import RankPool

transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")

VOCABULARY = 205
LONGEST = 48
JOB = f"{__name__}:answers"
TOLERANCE = 2e-4  # nats of a sum over some 10 tokens, fp32, other kernels


def questions() -> list[Question]:
    """Several continuations of one context, of no context in common, of one token, and twice."""
    draw = random.Random(5)

    def some(count: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(count)]

    asked = []
    for begin, ends in ((20, (3, 9, 1, 6)), (11, (1, 1, 1)), (1, (4,)), (30, (18, 17)), (60, (5,))):
        context = some(begin)
        asked += [Question.of(context, some(end), LONGEST) for end in ends]
    cut = some(40)
    asked += [Question.of(cut[:split], cut[split:], LONGEST) for split in (10, 30, 10)]
    draw.shuffle(asked)
    return asked


def answers(
    folder: str, asked: list[Question], *, rows: int = 4, flags: dict[str, int] | None = None
) -> list[Answer]:
    topology = initialize(ParallelConfig(**(flags or {})))
    try:
        weights = open_weights(Path(folder))
        model = weights.read(weights.config, topology, torch.float32, valid_vocab=VOCABULARY)
        return answer(model, asked, longest=LONGEST, micro_batch_size=rows, topology=topology)
    finally:
        shutdown()


def theirs(folder: Path, asked: list[Question]) -> list[Answer]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for each in asked:
        with torch.no_grad():
            logits = model(torch.tensor([each.inputs])).logits[0, -each.asked :, :VOCABULARY]
        labels = torch.tensor(each.tokens[-each.asked :])
        log_probs = logits.double().log_softmax(-1)[torch.arange(each.asked), labels]
        greedy = bool((logits.argmax(-1) == labels).all())
        found.append(Answer(float(log_probs.sum()), greedy))
    return found


def assert_same(found: list[Answer], expected: list[Answer], tolerance: float = TOLERANCE) -> None:
    assert [each.greedy for each in found] == [each.greedy for each in expected]
    sums = [[each.log_likelihood for each in side] for side in (found, expected)]
    assert sums[0] == pytest.approx(sums[1], abs=tolerance)


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hf")
    make(made, MODELS[request.param])
    return made


def likely(folder: Path, asked: list[Question]) -> list[Question]:
    """The same, and the continuations that the model itself would write."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    more = []
    for each in asked[:3]:
        with torch.no_grad():
            context = each.inputs[:20]
            best = model(torch.tensor([context])).logits[0, -1, :VOCABULARY].argmax()
        more.append(Question.of(context, [int(best)], LONGEST))
    return asked + more


def test_answers_are_those_of_transformers_on_each_sequence_alone(folder: Path) -> None:
    asked = likely(folder, questions())
    expected = theirs(folder, asked)
    assert {each.greedy for each in expected} == {False, True}
    assert_same(answers(str(folder), asked), expected)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hf")
    make(made, MODELS["qwen, GQA, tied"])
    return made


LAYOUTS = {
    "DP2": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2, SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_every_rank_the_same_answers(
    layout: str, qwen: Path, pool: RankPool
) -> None:
    asked = questions()
    expected = answers(str(qwen), asked)
    for found in pool.run(JOB, 2, folder=str(qwen), asked=asked, flags=LAYOUTS[layout]):
        assert_same(found, expected, tolerance=2e-5)
        if layout in ("DP2", "PP2"):
            assert found == expected, "no sum is split: the same bits"


def test_shared_contexts_are_read_once() -> None:
    asked = questions()
    rows = pack(asked, longest=LONGEST, branch=True)
    alone = pack(asked, longest=LONGEST, branch=False)
    assert sorted(at for row in rows for at in row.questions) == list(range(len(asked)))
    assert len(alone) == len(asked)
    assert sum(row.length for row in rows) < 0.6 * sum(row.length for row in alone)
    assert max(row.length for row in rows) <= LONGEST


@pytest.mark.parametrize(("begin", "most"), [(600, 2048), (1500, 2 * 1520)])
def test_a_row_is_not_as_long_as_a_model_of_long_texts_could_read(begin: int, most: int) -> None:
    draw = random.Random(0)
    asked = [
        Question.of([*range(begin), *(draw.randrange(9) for _ in range(15))], [end] * 5, 32_768)
        for _ in range(60) for end in range(4)
    ]  # fmt: skip
    rows = pack(asked, longest=32_768, branch=True)
    assert 0.8 * most < max(row.length for row in rows) <= most


def test_a_model_is_as_it_was_after_it_read_branches(qwen: Path) -> None:
    topology = initialize(ParallelConfig())
    try:
        weights = open_weights(qwen)
        model = weights.read(weights.config, topology, torch.float32, valid_vocab=VOCABULARY)
        assert can_branch(model)
        (decoder,) = model.decoders
        before = [layer.self_attention.core_attention for layer in decoder.decoder.layers]
        with pytest.raises(RuntimeError, match="any"), reading_branches(model):
            raise RuntimeError("any")
        assert before == [layer.self_attention.core_attention for layer in decoder.decoder.layers]
        assert not decoder._forward_pre_hooks
        assert not decoder.rotary_pos_emb._forward_hooks
    finally:
        shutdown()


def test_what_is_too_long_loses_its_beginning_and_never_its_continuation() -> None:
    asked = Question.of(range(100), [7, 8], LONGEST)
    assert asked.tokens == (*range(53, 100), 7, 8)
    assert len(asked.inputs) == LONGEST
    with pytest.raises(DataError, match="continuation of 49 tokens"):
        Question.of([1], range(49), LONGEST)
