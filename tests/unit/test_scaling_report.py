"""`report --scaling-law`: laws that runs were made from come back, in numbers and on the page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.manifest import Manifest
from megatron_miniplm.evaluation import scaling_report
from megatron_miniplm.evaluation.run_curves import read_history
from megatron_miniplm.evaluation.scaling_law import PAPER, Law, Term
from megatron_miniplm.evaluation.scaling_report import (
    ScalingConfig,
    curves_of,
    scaling_sections,
    student_size,
)
from megatron_miniplm.models.family import get_family

PRESETS = get_family("qwen").presets
SIZE = 203_437_824
TOKENS_AN_UPDATE = 524_288
FIT = ScalingConfig(scaling_law=True)


def write_run(
    folder: Path, law: Law, *, size: int = SIZE, teacher: float = 1.0, updates: int = 100_000,
    waves: float = 0.0,
) -> Path:  # fmt: skip
    """Metrics of a run whose validations follow `law` in FLOPs, but for waves of that height."""
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for at in range(updates // 20, updates + 1, updates // 20):
        tokens = at * TOKENS_AN_UPDATE
        flops = 6 * size * tokens * teacher
        row = {"iteration": at, "consumed_samples": 512 * at}
        rows.append({
            **row, "consumed_tokens": tokens, "lm loss": law.loss(flops) + 0.01,
            "iteration time (ms)": 1e3, "throughput (TFLOP/s/GPU)": 100.0,
            **({"FLOPs (x 6 N D)": teacher} if teacher > 1 else {}),
        })  # fmt: skip
        error = waves * math.sin(6 * math.pi * at / updates)
        rows.append({**row, "validation": {"lm loss": law.loss(flops) + error}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def name_model(folder: Path, preset: str) -> None:
    """A checkpoint's manifest: what its model's size is read from."""
    checkpoint = folder / "iter_0100000"
    checkpoint.mkdir()
    content = {"config": asdict(PRESETS[preset]), "valid_vocab": 151_646, "iteration": 100_000,
               "tokenizer_fingerprint": "t", "consumed_samples": 1}  # fmt: skip
    Manifest(kind="checkpoint", fingerprint="c", parents={}, config={}, content=content).write(
        checkpoint / "manifest.json"
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("100000\n")


def facts(folders: Sequence[Path], sizes: Sequence[int], config: ScalingConfig = FIT) -> dict:
    runs = [read_history(folder, folder.name) for folder in folders]
    return scaling_sections(curves_of(runs, sizes, config), config)[1]


def test_runs_made_from_the_papers_laws_have_its_constants_losses_and_ratios(tmp_path):
    laws = PAPER["200m"]
    folders = [write_run(tmp_path / "pretrain", laws["pretrain"]),
               write_run(tmp_path / "miniplm", laws["miniplm"])]  # fmt: skip
    four_passes = ScalingConfig(scaling_law=True, scaling_repeats=4)
    plain, selected = facts(folders, [SIZE, SIZE], four_passes)["curves"]
    assert (plain["limit"], plain["exponent"]) == pytest.approx((3.30, 0.41), rel=1e-5)
    assert (selected["limit"], selected["exponent"]) == pytest.approx((3.25, 0.59), rel=1e-5)
    # Table 2, whose 1T tokens are 2 million updates of 200 million parameters.
    assert [at["loss"] for at in plain["losses"]] == pytest.approx([3.35, 3.32], abs=0.006)
    assert [at["loss"] for at in selected["losses"]] == pytest.approx([3.28, 3.26], abs=0.006)
    assert plain["losses"][1]["flops"] == 10 * plain["losses"][0]["flops"]
    assert selected["compared_with"] == "pretrain"
    assert selected["times_less_compute"] == pytest.approx(1.40, abs=0.01)
    end = 6 * SIZE * 100_000 * TOKENS_AN_UPDATE
    needed = laws["pretrain"].needed(laws["miniplm"].loss(end))
    assert selected["unique_tokens_of_the_other"] == pytest.approx(
        needed / (6 * SIZE) / 4, rel=1e-4
    )
    assert plain["times_less_compute"] == pytest.approx(1)
    assert plain["times_less_compute_interval"] == pytest.approx((1, 1))  # beside itself
    assert plain["largest_error"] < 1e-6


def test_a_teachers_forward_pass_is_compute_and_its_runs_are_compared_at_equal_compute(tmp_path):
    law = PAPER["200m"]["vanilla-kd"]
    folder = write_run(tmp_path / "kd", law, teacher=4.0, updates=25_000)
    (curve,) = curves_of([read_history(folder, "kd")], [SIZE], FIT)
    assert curve.flops[-1] == pytest.approx(6 * SIZE * 100_000 * TOKENS_AN_UPDATE)
    (found,) = facts([folder], [SIZE])["curves"]
    assert (found["limit"], found["exponent"]) == pytest.approx((3.34, 0.44), rel=1e-5)


def test_warm_up_is_left_out_and_final_is_a_point_a_run(tmp_path):
    law = PAPER["200m"]["pretrain"]
    folders = [write_run(tmp_path / str(n), law, updates=n) for n in (20_000, 40_000, 100_000)]
    runs = [read_history(folder, "x") for folder in folders]
    (every,) = curves_of(runs, [SIZE] * 3, ScalingConfig(scaling_law=True, scaling_skip=0.12))
    assert len(every.loss) == 3 * 18
    assert (np.diff(every.flops) >= 0).all()
    final = ScalingConfig(scaling_law=True, scaling_points="final")
    (last,) = curves_of(runs, [SIZE] * 3, final)
    assert last.flops == pytest.approx([6 * SIZE * n * TOKENS_AN_UPDATE
                                        for n in (20_000, 40_000, 100_000)])  # fmt: skip


def test_seeds_that_err_together_have_the_interval_of_one_run_and_not_a_narrower_one(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(scaling_report, "_RESAMPLES", 50)  # seconds
    # Errors of neighbours are one wave; three runs with the same say no more than one.
    law = PAPER["200m"]["pretrain"]
    folders = [write_run(tmp_path / str(seed), law, waves=1e-3) for seed in range(3)]
    runs = [read_history(folder, "x") for folder in folders]

    def width(seeds: int) -> float:
        (found,) = scaling_sections(curves_of(runs[:seeds], [SIZE] * seeds, FIT), FIT)[1]["curves"]
        return found["limit_interval"][1] - found["limit_interval"][0]

    assert width(3) > 0.9 * width(1)  # in blocks of one checkpoint 0.7


def test_three_sizes_of_a_label_are_fitted_by_size_and_tokens_too(tmp_path):
    law = Law(limit=1.69, terms=(Term(amplitude=406.4, exponent=0.34),
                                 Term(amplitude=410.7, exponent=0.28)))  # fmt: skip
    sizes = [200_000_000, 500_000_000, 1_200_000_000]
    folders = []
    for size in sizes:
        of_size, term = law.terms
        limit = Law(limit=law.limit, terms=(of_size,)).loss(size)
        of_flops = Term(amplitude=term.amplitude * (6 * size) ** term.exponent,
                        exponent=term.exponent)  # fmt: skip
        folder = tmp_path / str(size)
        write_run(folder, Law(limit=limit, terms=(of_flops,)), size=size)
        folders.append(folder)
    runs = [read_history(folder, "x") for folder in folders]
    sections, said = scaling_sections(curves_of(runs, sizes, FIT), FIT)
    found = said["of size and tokens"]["x"]
    (card,) = (each for each in sections if each.title == "Scaling law of size and tokens")
    assert card.table.header == ["label", "limit", "alpha of size", "alpha of tokens"]
    assert card.table.rows[0][:2] == ["x", "1.690 (1.690 to 1.690)"]
    assert "more than a run beside a teacher saw" in card.text
    assert found["limit"] == pytest.approx(1.69, rel=1e-3)
    assert found["exponent_size"] == pytest.approx(0.34, rel=1e-2)
    assert found["exponent_tokens"] == pytest.approx(0.28, rel=1e-2)
    # Each is compared with the first one of its own size: itself.
    assert [each["times_less_compute"] for each in said["curves"]] == pytest.approx([1, 1, 1])


def test_the_page_has_a_card_and_a_plot_and_the_numbers_are_beside_it(tmp_path):
    flat = Law(limit=3.2, terms=(Term(amplitude=0.0, exponent=1.0),))
    names = ("pretrain", "miniplm", "flat")
    for name, law in zip(names, (*map(PAPER["200m"].get, names[:2]), flat), strict=True):
        name_model(write_run(tmp_path / name, law), "qwen1.5-200m")
    assert student_size(tmp_path / "miniplm") == SIZE
    words = ["report", "--runs", *(str(tmp_path / name) for name in names), "--scaling-law"]
    assert main([*words, "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<h2>Scaling law</h2>" in page
    assert "miniplm, 203.4 M" in page
    assert (tmp_path / "report" / "scaling_law.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads(
        (tmp_path / "report" / "scaling_law.json").read_text(), parse_constant=pytest.fail
    )
    assert [each["label"] for each in written["curves"]] == list(names)


def test_what_cannot_be_fitted_is_refused_with_what_to_do(tmp_path):
    folder = write_run(tmp_path / "a", PAPER["200m"]["pretrain"])
    with pytest.raises(DataError, match="has no checkpoint"):
        student_size(folder)
    other = ScalingConfig(scaling_law=True, scaling_loss="code lm loss")
    with pytest.raises(DataError, match=r"has no validation 'code lm loss' \(it has: lm loss\)"):
        facts([folder], [SIZE], other)
    final = ScalingConfig(scaling_law=True, scaling_points="final")
    with pytest.raises(DataError, match="need more than 3 points"):
        facts([folder], [SIZE], final)
    with pytest.raises(ConfigError, match="--scaling-skip 1"):
        ScalingConfig(scaling_law=True, scaling_skip=1)
    with pytest.raises(ConfigError, match="--scaling-repeats 4 has no effect"):
        ScalingConfig(scaling_repeats=4)
