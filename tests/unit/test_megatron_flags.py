"""A launch script of Megatron-LM: every flag is taken at its word, or refused by name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_miniplm.core.config import flat_defaults, flat_fields, parse_flags, to_flat
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.megatron_flags import (
    ALREADY_SO,
    REFUSED,
    REFUSED_KINDS,
    SPELLED,
    settle,
)
from megatron_miniplm.stages.pretrain import Config

PROJECT = Path(__file__).resolve().parents[2]
NEEDED = ["--train-data-path", "corpus", "--save", "run", "--train-iters", "10"]
OWN = {"--" + name.replace("_", "-") for name in flat_fields(Config)}

LLAMA3_8B = shlex.split("""
--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
--num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
--seq-length 8192 --max-position-embeddings 8192 --position-embedding-type rope
--rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0 --swiglu
--init-method-std 0.0134 --attention-backend fused --apply-layernorm-1p
--untie-embeddings-and-output-weights --disable-bias-linear --micro-batch-size 1
--global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748
--lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4
--decoupled-min-lr 4.5e-5 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1
--adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion
--calculate-per-token-loss --manual-gc --empty-unused-memory-level 1 --exit-duration-in-mins 235
--fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-param-gather
--tensor-model-parallel-size 1 --context-parallel-size 1 --sequence-parallel
--use-distributed-optimizer --data-path prefix --tokenizer-type HuggingFaceTokenizer
--tokenizer-model folder --data-cache-path cache --split 99,1,0
--no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1 --vocab-size 128256
--log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput
--profile --profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist
--distributed-timeout-minutes 60 --save checkpoints --load checkpoints --tensorboard-dir events
""")
"""Megatron-LM's ``examples/llama/train_llama3_8b_h100_fp8.sh``, its variables filled in."""

NOT_OURS = {
    "--attention-backend": 1, "--apply-layernorm-1p": 0, "--lr-decay-samples": 1,
    "--lr-warmup-samples": 1, "--decoupled-lr": 1, "--decoupled-min-lr": 1,
    "--grad-reduce-in-bf16": 0, "--manual-gc": 0, "--empty-unused-memory-level": 1,
    "--fp8-amax-history-len": 1, "--fp8-amax-compute-algo": 1,
    "--fp8-param-gather": 0, "--data-path": 1, "--tokenizer-type": 1, "--tokenizer-model": 1,
    "--data-cache-path": 1, "--split": 1, "--no-mmap-bin-files": 0,
    "--profile": 0, "--profile-step-start": 1, "--profile-step-end": 1,
}  # fmt: skip
"""Flags of that script which are refused -> how many values they have."""


def parse(*words: str) -> Config:
    return parse_flags(Config, [*NEEDED, *words], prog="miniplm pretrain")


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        settle(words, OWN)
    return str(caught.value)


@pytest.mark.parametrize("flag", sorted(set(REFUSED) - OWN - set(ALREADY_SO)))
def test_refused_flag_is_named_with_the_reason(flag: str) -> None:
    assert refusal(flag, "7") == f"{flag} is not supported: {REFUSED[flag]}"


def test_refused_flag_is_found_in_any_spelling_by_its_beginning_and_in_a_file(
    tmp_path: Path,
) -> None:
    experts = REFUSED_KINDS["--moe-"]
    assert refusal("--moe-router-topk", "2") == f"--moe-router-topk is not supported: {experts}"
    assert refusal("--mock_data").startswith("--mock-data is not supported: train on a corpus")
    assert refusal("--split=99,1,0").startswith("--split is not supported: validation data")
    (tmp_path / "a.yaml").write_text("mock_data: true\n")
    with pytest.raises(ConfigError, match="--mock-data is not supported: train on a corpus"):
        parse("--config", str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("flag", sorted(set(ALREADY_SO) - OWN))
def test_flag_that_says_what_is_so_anyway_is_left_out_and_its_other_values_are_refused(
    flag: str,
) -> None:
    allowed = ALREADY_SO[flag]
    for value in allowed:
        assert settle([flag, str(value), "--lr", "1"], OWN) == ["--lr", "1"]
        assert settle([f"{flag}={value}", "--lr", "1"], OWN) == ["--lr", "1"]
    if allowed:
        assert refusal(flag, "0.5").startswith(f"{flag} 0.5 is not supported, only ")
    else:
        assert settle([flag, "--lr", "1"], OWN) == ["--lr", "1"]


def test_other_spellings_mean_the_same() -> None:
    assert len(SPELLED) == 3
    assert parse("--recompute-activations") == parse("--recompute-granularity", "selective")
    assert parse("--calculate-per-token-loss") == parse("--loss-normalization", "token")
    assert parse("--layernorm-epsilon", "1e-5") == parse("--norm-epsilon", "1e-5")
    assert parse("--layernorm-epsilon=1e-5") == parse("--norm-epsilon", "1e-5")


@pytest.mark.parametrize(
    ("flag", "beside"),
    [
        ("--group-query-attention", ["--num-query-groups", "2"]),
        ("--disable-bias-linear", ["--no-add-qkv-bias"]),
    ],
)
def test_switch_of_which_the_default_differs_needs_our_flag_beside_it(
    flag: str, beside: list[str]
) -> None:
    assert refusal(flag).startswith(f"{flag} alone leaves open")
    assert settle([flag, *beside], OWN) == beside


def test_own_flags_come_before_those_of_megatron() -> None:
    assert settle(["--tokenizer-type", "X"], {"--tokenizer-type"}) == ["--tokenizer-type", "X"]


def test_load_from_save_is_megatrons_way_to_continue_and_another_load_needs_finetune() -> None:
    assert parse("--load", "run") == parse()
    with pytest.raises(ConfigError, match="--load and --finetune go together"):
        parse("--load", "elsewhere")


def test_a_whole_script_parses_without_what_is_refused_and_means_what_it_says() -> None:
    kept: list[str] = []
    words = iter(LLAMA3_8B)
    for word in words:
        if word in NOT_OURS:
            refusal(word, *(next(words) for _ in range(NOT_OURS[word])))
        else:
            kept.append(word)
    kept.remove("--sequence-parallel")  # refused later: there is one TP rank
    ours = ["--train-data-path", "corpus", "--no-add-qkv-bias", "--model-family", "llama"]
    found = to_flat(parse_flags(Config, [*ours, *kept], prog="miniplm pretrain"))
    wanted = {
        "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_query_groups": 8,
        "kv_channels": 128, "seq_length": 8192, "init_method_std": 0.0134, "vocab_size": 128256,
        "untie_embeddings_and_output_weights": True, "adam_beta2": 0.95, "bf16": True,
        "loss_normalization": "token", "use_distributed_optimizer": True, "save": "checkpoints",
        "load": None, "eval_iters": 32, "exit_duration_in_mins": 235.0, "rotary_base": 1e6,
        "fp8_format": "hybrid",
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted


def test_the_documented_defaults_are_those_of_the_dataclasses() -> None:
    """Words in place of a value stand for what is settled later."""
    text = (PROJECT / "docs" / "megatron.md").read_text().split("## Defaults that differ")[1]
    rows = re.findall(r"^\| `--([\w-]+)` \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert {"lr-decay-style", "min-lr", "adam-beta2", "seed"} < {flag for flag, *_ in rows}
    defaults = flat_defaults(Config)
    for flag, theirs, here in rows:
        value = defaults[flag.replace("-", "_")]
        assert here == f"`{value}`" or (value is None and here[0] != "`"), flag
        assert theirs != here.strip("`"), flag
