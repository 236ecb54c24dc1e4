"""`plan`: the paper's setting, and that its numbers hang together and react to what they should."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.evaluation.cost import METHODS
from megatron_miniplm.evaluation.plan_table import cost_table
from megatron_miniplm.models.family import get_family
from megatron_miniplm.stages.plan import Config, plan
from megatron_miniplm.training.estimate import checkpoint_bytes

# Nominal sizes; 1.16 billion is what the paper's "1.2B" enters its numbers as.
PAPER: dict[str, Any] = {
    "students": ("0.2e9", "0.5e9", "1.16e9"), "teacher": "1.8e9", "reference": "0.104e9",
    "count_flops": "parameters", "tokens": (50e9,),
}  # fmt: skip


def costs(**config: Any) -> dict[str, Any]:
    (only,) = plan(Config(**{**PAPER, **config}))["plans"]
    return only


def test_the_papers_setting_has_the_papers_totals():
    table_9 = costs(corpus_tokens=50e9)["methods"]
    scored = table_9["miniplm"]["offline_flops"]
    assert scored["score with teacher"] + scored["score with reference"] == pytest.approx(1.904e20)
    assert table_9["miniplm-proxy"]["offline_flops"]["score with proxy"] == pytest.approx(1.04e19)
    found = costs()
    assert found["corpus_tokens"] == 100e9
    kd = found["methods"]["vanilla-kd"]
    aligned = [each["aligned_tokens"] for each in kd["students"]]
    assert aligned == pytest.approx([12.5e9, 22.7e9, 33e9], rel=0.01)
    assert kd["students"][0]["student"] == "0.2e9"
    assert kd["students"][0]["training_flops"] == pytest.approx((6 * 0.2e9 + 2 * 1.8e9) * 50e9)
    # 30 PB of every logit at 150,000 columns; here they are the preset's 151,936.
    assert found["dense_logits"] == pytest.approx(30e15, rel=0.015)
    # Two sets of scores of 100 billion tokens at 8 bytes: 4 of them, for 50 billion, are 200 MB.
    scores = found["methods"]["miniplm"]["storage"]["scores"]
    assert scores == pytest.approx(2 * 2 * 2 * 200e6, rel=0.03)


def test_gpu_hours_are_flops_over_peak_and_utilisation_and_decoding_has_its_own():
    found = costs(gpu="A100", gpus=64, mfu=0.5, decoding_mfu=0.1, students=("0.2e9",))["methods"]
    plain = 6 * 0.2e9 * 50e9 / (312e12 * 0.5) / 3600
    assert found["pretrain"]["gpu_hours"] == pytest.approx(plain)
    assert found["pretrain"]["wall_hours"] == pytest.approx(plain / 64)
    assert found["seqkd"]["offline_gpu_hours"] == pytest.approx(
        2 * 1.8e9 * 50e9 / 312e12 * (0.75 / 0.5 + 0.25 / 0.1) / 3600
    )
    sampled = (2 * 0.2e9 + 2 * 1.8e9) * 50e9 / 4  # a quarter of a pass of each
    rest = (8 * 0.2e9 + 4 * 1.8e9) * 50e9 - sampled
    assert found["minillm"]["gpu_hours"] == pytest.approx(
        (rest / 0.5 + sampled / 0.1) / 312e12 / 3600
    )


def test_offline_work_is_done_once_for_all_students_and_training_for_each():
    one = costs(students=("0.5e9",))["methods"]
    three = costs(students=("0.5e9", "0.5e9", "0.5e9"))["methods"]
    for name, method in METHODS.items():
        offline = sum(one[name]["offline_flops"].values())
        assert three[name]["offline_flops"] == one[name]["offline_flops"]
        assert one[name]["flops_per_student"] - three[name]["flops_per_student"] == pytest.approx(
            offline * 2 / 3
        )
        assert bool(offline) == bool(method.offline)
        assert three[name]["students"] == 3 * one[name]["students"]
    table = Console(width=200, file=io.StringIO())
    table.print(cost_table(costs(students=("0.5e9",) * 3, methods=("pretrain",))))
    said = table.file.getvalue()
    assert "3 student(s)" in said
    assert f"{3 * 6 * 0.5e9 * 50e9:.2e}" in said


def test_scoring_pays_beside_an_online_teacher_from_the_third_student_on():
    (found,) = [each for each in costs()["pays_off"]
                if (each["method"], each["beside"]) == ("miniplm", "vanilla-kd")]  # fmt: skip
    # (3.6e20 + 2.08e19 + 3.12e18) once, against 2 x 1.8e9 x 50e9 = 1.8e20 a student: 2.13.
    assert found["students"] == 3
    assert found["tokens"] == pytest.approx(2.133 * 50e9, rel=1e-3)


@pytest.mark.parametrize("teacher", ["1.8e9", "qwen1.5-1.8b", "0.7e9"])
def test_a_store_of_logits_pays_from_the_first_student_on_on_any_number_of_any_device(teacher):
    # It takes as much as one student's teacher would, exactly.
    for peak in np.random.default_rng(0).uniform(50, 3000, 40):
        found = costs(
            peak_tflops=peak, mfu=0.41, gpus=7, teacher=teacher, corpus_tokens=50e9,
            methods=("pd-offline", "vanilla-kd"),
        )["pays_off"]  # fmt: skip
        assert [each["students"] for each in found] == [1]


def test_a_corpus_that_is_scored_once_pays_by_the_tokens_that_are_trained_on_it():
    def tokens(**config: Any) -> float:
        found = costs(corpus_tokens=100e9, **config)["pays_off"]
        return next(each["tokens"] for each in found if each["beside"] == "pretrain")

    assert tokens(tokens=(1e12,)) == pytest.approx(tokens(tokens=(15e12,)))
    assert tokens(times_less_compute=1.9) < tokens(times_less_compute=1.4)


def test_nothing_pays_beside_plain_training_if_it_takes_no_less_of_it():
    found = costs(times_less_compute=1.0)["pays_off"]
    assert [each["students"] for each in found if each["beside"] == "pretrain"] == [None, None]


def test_checkpoints_are_those_that_pretrain_writes():
    found = costs(students=("qwen1.5-200m",), checkpoints_kept=3)
    shape = get_family("qwen").presets["qwen1.5-200m"]
    assert found["checkpoints"] == 3 * checkpoint_bytes(
        shape, bf16=True, distributed_optimizer=True
    )
    assert costs(students=("1e9",), checkpoints_kept=2)["checkpoints"] == 2 * 14e9


def test_a_measured_run_says_the_utilisation(tmp_path):
    rows = [{"iteration": n, "consumed_samples": n, "consumed_tokens": n, "lm loss": 3.0,
             "mfu": 0.1 if n <= 5 else 0.3} for n in range(1, 11)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    slow, fast = costs(mfu=0.6), costs(measured_run=tmp_path)
    assert fast["methods"]["pretrain"]["gpu_hours"] == pytest.approx(
        2 * slow["methods"]["pretrain"]["gpu_hours"]
    )
    for row in rows:  # a teacher that does as much again in the same time
        row["mfu with teacher"] = 2 * row["mfu"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plan(Config(measured_run=tmp_path))["cluster"]["mfu"]["training"] == 0.6
    for change, why in (({"mfu": None}, "pass --mfu"), ({"response length": 9}, "decoding")):
        (tmp_path / "metrics.jsonl").write_text(json.dumps({**rows[0], **change}) + "\n")
        with pytest.raises(ConfigError, match=why):
            plan(Config(measured_run=tmp_path))


def test_the_command_prints_a_table_for_every_number_of_tokens_and_the_same_as_json(capsys):
    assert main(["plan"]) == 0
    said = capsys.readouterr().out
    for title in ("50B tokens", "100B tokens", "1T tokens", "15T tokens"):
        assert title in said
    assert all(name in said for name in METHODS)
    assert main(["plan", "--json", "--tokens", "1e12", "--methods", "miniplm", "vanilla-kd"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer["plans"][0]["methods"]) == ["miniplm", "vanilla-kd"]
    assert answer["models"]["qwen1.5-1.8b"]["parameters"] == 1_836_828_672


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"gpu": "TPU"}, "--peak-tflops"),
        ({"mfu": 40}, "at most 1"),
        ({"tokens": (0.0,)}, "above 0"),
        ({"tokens": (float("nan"),)}, "above 0"),
        ({"methods": ("distill",)}, "known are pretrain"),
        ({"teacher": "qwen9"}, "qwen9 is no number, nothing on disk and no preset"),
        ({"times_less_compute": 0.5}, "1 or more"),
        ({"teacher": "nan"}, "nan parameters"),
    ],
)
def test_what_makes_no_plan_is_refused(config, why):
    with pytest.raises(ConfigError, match=why):
        plan(Config(**config))
