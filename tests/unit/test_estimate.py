"""A dry run refuses what the run refuses, and its numbers follow from their formulas."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.config import parse_flags
from megatron_miniplm.core.errors import MiniPLMError
from megatron_miniplm.data.staging import exclusive
from megatron_miniplm.models.checkpoint import LOCK
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.outline import outline, saved_by_layer
from megatron_miniplm.parallel.topology import Layout, alone
from megatron_miniplm.stages import pretrain
from megatron_miniplm.training.estimate import buffer_elements, passes_in_flight
from tests.runs import TINY, pretrain_flags


def test_micro_batches_in_flight_are_those_of_the_schedules() -> None:
    assert [passes_in_flight(k, 4, 1, micro_batches=8) for k in range(4)] == [4, 3, 2, 1]
    assert passes_in_flight(0, 4, 1, micro_batches=2) == 2
    for stages, chunks in ((2, 2), (4, 3), (8, 5)):
        # arXiv 2205.05198, 4.2.3: the first stage holds L (1 + (p - 1) / (p v)) layers' worth.
        first = passes_in_flight(0, stages, chunks, micro_batches=64) / chunks
        assert first == stages * (1 + (stages - 1) / (stages * chunks))


def test_buffers_are_padded_as_megatron_core_pads_them() -> None:
    assert buffer_elements([100, 7, 50], 3, zero=False) == 157
    # Backwards: 50, pad to 64, 7, pad to 128, 100; the end to a multiple of lcm(3, 128).
    assert buffer_elements([100, 7, 50], 3, zero=True) == 384
    assert buffer_elements([100, 7, 50], 3, zero=True, alone=[0]) == 768
    assert buffer_elements([100, 7, 50], 3, zero=True, alone=[2]) == 768


def llama_layer(tp: int, *, h: int, f: int, groups: int, heads: int) -> tuple[float, float]:
    """(what only sequence parallelism divides, the rest) of the bytes a token keeps in bf16.

    What arXiv 2205.05198, section 4.1, counts, for fused attention and RMSNorm, rotary positions,
    grouped queries and a gated MLP without biases and dropout.
    """
    key = h * groups // heads
    norms = 2 * (2 * h + 4 + 2 * h)  # input, 1 / rms, and output, which the next matrix keeps
    angles = 2 * 2 * 2 * (h // heads) // 2  # cosine, sine, for q and k; one for both instances
    # q and k turned; v is a part of q, k, v, which are kept whole; output; log-sum-exp
    attention = 2 * h + 2 * key + 2 * (h + 2 * key) + 2 * h + 4 * heads
    # both halves; SiLU of one, the other plus an offset of 0, and their product
    mlp = 2 * 2 * f + 3 * 2 * f
    return norms + angles, (attention + mlp) / tp


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (4, False), (4, True)])
def test_a_layer_keeps_what_the_closed_form_says(tp: int, sequence_parallel: bool) -> None:
    s, b, h, f, heads, groups = 512, 2, 256, 768, 8, 4
    shape = ModelConfig(
        num_layers=3, hidden_size=h, ffn_hidden_size=f, num_attention_heads=heads,
        num_query_groups=groups, vocab_size=1000, add_qkv_bias=False, model_family="llama",
    )  # fmt: skip
    layout = Layout(
        world_size=tp, tp_size=tp, pp_size=1, dp_size=1, sequence_parallel=sequence_parallel
    )
    with alone() as topology:
        found = saved_by_layer(
            shape, topology, layout, micro_batch_size=b, seq_length=s, dtype=torch.bfloat16,
            fused=True,
        )  # fmt: skip
        parts = outline(shape, topology, tp)
    full, divided = llama_layer(tp, h=h, f=f, groups=groups, heads=heads)
    assert found == s * b * ((full / tp if sequence_parallel else full) + divided)
    matrices = h * h + 2 * h * h * groups // heads + h * h + 3 * h * f
    assert sum(parts.layer) == matrices // tp + 2 * h


REFUSED = {
    "no corpus": ["--train-data-path", "nowhere"],
    "layout": ["--tensor-model-parallel-size", "2"],
    "batches": ["--global-batch-size", "7"],
    "other length": ["--seq-length", "1024"],
    "context": ["--max-position-embeddings", "8"],
    "no teacher": ["--objective", "kd"],
    "teacher without effect": ["--teacher", "online"],
    "flag without effect": ["--kd-alpha", "0.3"],
    "teacher that is not there": ["--objective", "kd", "--teacher", "online", "--teacher-load=x"],
    "weights that are not there": ["--load", "nowhere", "--finetune"],
    "no room": ["--hidden-size=32768", "--ffn-hidden-size=131072", "--num-layers=99"],
    "held by another job": ["--save", "{held}"],
    "late warm-up": ["--lr-warmup-iters", "20"],
    "interleaved alone": ["--num-virtual-stages-per-pipeline-rank", "2"],
    "FP8 in fp32": ["--fp8-format", "hybrid"],
    "narrow vocabulary": ["--vocab-size", "100"],
    "file": ["--save", "{file}"],
    "inside of a file": ["--save", "{file}/run"],
    "foreign folder": ["--save", "{folder}"],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_dry_run_refuses_what_the_run_refuses_in_the_same_words(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "held").mkdir()
    said = []
    for more in ([], ["--dry-run"]):
        places = {name: tmp_path / name for name in ("file", "held")} | {"folder": tmp_path}
        words = [word.format(**places) for word in REFUSED[name]]
        flags = pretrain_flags(corpus, tmp_path / "run", *TINY, *words, *more)[1:]
        lock = exclusive(tmp_path / "held" / LOCK, wait=False)
        with lock, pytest.raises(MiniPLMError) as caught:
            pretrain.run(parse_flags(pretrain.Config, flags, prog="pretrain"))
        text = re.sub(r"[0-9.]+ GB are free", "some GB are free", str(caught.value))
        said.append((type(caught.value), text))
    assert said[0] == said[1]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "held", LOCK]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dry-run-mfu", "0.4"], "--dry-run-mfu 0.4 has no effect without --dry-run"),
        (["--json"], "--json True has no effect without --dry-run"),
        (["--dry-run", "--dry-run-mfu", "40"], "must be above 0 and at most 1"),
        (["--dry-run", "--dry-run-world-size", "3", "--pipeline-model-parallel-size", "2"],
         "3 processes cannot hold TP 1 x PP 2"),
        (["--dry-run", "--dry-run-gpu-gb", "0.001"], "pipeline stage 0 needs 0.0 GB"),
    ],
)  # fmt: skip
def test_dry_run_refuses_flags_that_say_nothing_or_too_much(
    words: list[str], message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(pretrain_flags(corpus, tmp_path / "run", *TINY, *words)) == 2
    assert message in capsys.readouterr().err


def test_a_thousand_gpus_are_rehearsed_by_one_process(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "pretrain", "--dry-run", "--dry-run-world-size", "1024", "--train-data-path", str(corpus),
        "--valid-data-path", str(corpus), "--save", str(tmp_path / "run"), "--model", "pd-6.8b",
        "--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "4",
        "--num-virtual-stages-per-pipeline-rank", "7", "--sequence-parallel", "--bf16",
        "--use-distributed-optimizer", "--micro-batch-size", "1", "--global-batch-size", "1024",
        "--train-iters", "100", "--save-interval", "30", "--save-keep-last", "2",
        "--eval-interval", "60", "--peak-tflops", "989", "--dry-run-mfu", "0.4",
    ]  # fmt: skip
    assert main([*flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["device"] == "cuda"
    assert (said["data_parallel"], said["micro_batches"]) == (32, 32)
    assert said["padded_vocabulary"] == 151_552
    assert said["samples"] == 102_400
    # Every rank of a stage holds this; TP ranks share matrices, and norms are on each.
    norms = (2 * 28 + 1) * 4096
    assert (
        8 * sum(stage["parameters"] for stage in said["stages"]) == said["parameters"] + 7 * norms
    )
    assert (said["checkpoints_kept"], said["checkpoints_at_once"]) == (2, 3)
    assert said["checkpoint"] == 14 * said["parameters"]  # bf16 weights; fp32 weights, m, v
    assert said["seconds"] == pytest.approx(said["flops"] / (1024 * 989e12 * 0.4))
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert "TP 8 x PP 4 x DP 32" in printed
    assert not (tmp_path / "run").exists()
