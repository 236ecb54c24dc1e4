"""Flags come from dataclasses; files and presets yield to explicit flags; misfits are named."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.config import parse_flags, to_flat, write_run
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.stages import pretrain
from megatron_miniplm.stages.pretrain import Config

NEEDED = ["--train-data-path", "corpus", "--save", "run", "--train-iters", "10"]


def parse(*words: str) -> Config:
    return parse_flags(Config, [*NEEDED, *words], prog="miniplm pretrain")


def test_preset_yields_to_explicit_flags_in_any_order() -> None:
    for words in (["--model", "qwen1.5-200m", "--num-layers", "3"],
                  ["--num-layers", "3", "--model=qwen1.5-200m"]):  # fmt: skip
        shape = parse(*words).model_shape
        assert (shape.num_layers, shape.hidden_size, shape.vocab_size) == (3, 768, 151_936)


def test_yaml_and_run_json_hold_flags_that_explicit_ones_override(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 1.0e-3\nbf16: true\nnum-layers: 5\n")
    from_yaml = parse("--config", str(tmp_path / "a.yaml"), "--num-layers", "6")
    assert from_yaml.optimization.lr == 1e-3
    assert from_yaml.training.bf16
    assert from_yaml.model_shape.num_layers == 6
    write_run(tmp_path / "run.json", "pretrain", from_yaml)
    again = parse_flags(Config, ["--from-run", str(tmp_path / "run.json")], prog="pretrain")
    assert to_flat(again) == to_flat(from_yaml)
    assert asdict(again) == asdict(from_yaml)


def test_explicit_preset_wins_over_the_shape_in_a_file(tmp_path: Path) -> None:
    write_run(tmp_path / "run.json", "pretrain", parse("--model", "qwen1.5-200m"))
    words = ["--from-run", str(tmp_path / "run.json"), "--model", "qwen1.5-500m"]
    shape = parse_flags(Config, words, prog="pretrain").model_shape
    assert shape == parse("--model", "qwen1.5-500m").model_shape


def test_unknown_setting_in_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(ConfigError, match="unknown setting 'learning_rate'"):
        parse("--config", str(tmp_path / "a.yaml"))


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    target = tmp_path / "made"
    (tmp_path / "a.yaml").write_text(f"lr: !!python/object/apply:os.mkdir ['{target}']\n")
    with pytest.raises(ConfigError, match="not YAML"):
        parse("--config", str(tmp_path / "a.yaml"))
    assert not target.exists()


def test_unknown_flag_exits_with_2_and_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["pretrain", *NEEDED, "--leaning-rate", "1"])
    assert caught.value.code == 2
    assert "--leaning-rate" in capsys.readouterr().err


def test_unknown_verb_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert "pretrain" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sequence-parallel"], "needs --tensor-model-parallel-size above 1"),
        (["--train-samples", "5"], "one of --train-iters and --train-samples"),
        (["--load", "x"], "--load and --finetune go together"),
        (["--num-attention-heads", "7", "--num-query-groups", "2"], "must be a multiple of"),
        (["--hidden-size", "100", "--num-attention-heads", "8"], "--kv-channels"),
        (["--model", "qwen-900b"], "qwen1.5-200m"),
        (["--micro-batch-size", "0"], "--micro-batch-size 0 must be at least 1"),
        (["--eval-iters", "0"], "--eval-iters 0 must be at least 1"),
        (["--exit-interval", "0"], "--exit-interval 0 must be at least 1"),
        (["--align-flops-to", "0"], "--align-flops-to 0 must be at least 1"),
        (["--kd-alpha", "1.5"], "--kd-alpha 1.5 must be from 0 to 1"),
        (["--kd-temperature", "0"], "--kd-temperature 0.0 must be above 0"),
        (["--kd-beta", "-1"], "--kd-beta -1.0 must be from 0 to 1"),
        (["--rope-scaling-factor", "3"], "no effect without --use-rope-scaling"),
        (["--kd-beta", "0.2"], "--kd-beta 0.2 has no effect on --kd-loss forward_kl"),
        (["--save-keep-last", "0"], "--save-keep-last 0 must be at least 1"),
        (["--save-retain-interval", "5"], "has no effect without --save-keep-last"),
        (["--z-loss-weight", "-1"], "--z-loss-weight -1.0 must not be negative"),
    ],
)
def test_contradictory_flags_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*words)


def test_every_flag_of_pretrain_has_help() -> None:
    import tyro

    text = tyro.extras.get_parser(pretrain.Config, config=(tyro.conf.OmitArgPrefixes,))
    undocumented = [
        action.option_strings
        for action in text._actions
        if action.option_strings and (action.help or "").strip().startswith("(")
    ]
    assert undocumented == []
