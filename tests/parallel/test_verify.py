"""``convert --verify`` against transformers: passes on a right model, fails on a wrong one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import CheckpointError
from megatron_miniplm.data.tokenizers import load_tokenizer
from megatron_miniplm.evaluation import parity
from megatron_miniplm.evaluation.parity import TEXT, TOLERANCE, verify_with_transformers
from megatron_miniplm.models.checkpoint import latest_checkpoint
from megatron_miniplm.models.hf_folder import HfFolder
from megatron_miniplm.parallel.topology import ParallelConfig, Topology, initialize, shutdown
from tests.parallel.test_conversion import SMALL, make, words
from tests.pool import RankFailedError, RankPool

pytest.importorskip("transformers", reason="the [hf] extra is not installed")


@pytest.fixture
def topology() -> Iterator[Topology]:
    yield initialize(ParallelConfig())
    shutdown()


def test_both_directions_and_both_types_are_verified(
    tiny_tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hf = make(tmp_path / "hf", SMALL, tiny_tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("import os\n\ndef main() -> None:\n    print('naive')\n" * 20)
    for dtype in ("float32", "bfloat16"):
        flags = ["--dtype", dtype, "--verify", "--verify-text", str(text)]
        there, back = tmp_path / f"m-{dtype}", tmp_path / f"hf-{dtype}"
        assert main(words("hf", hf, "megatron", there, *flags)) == 0
        assert main(words("megatron", there, "hf", back, *flags)) == 0
    said = capfd.readouterr().err
    found = re.findall(r"verified: .* at most (\S+) nats .*; loss (\S+), with transformers", said)
    print("\n(largest difference, loss):", found)
    assert len(found) == 4
    assert all(float(largest) <= TOLERANCE for largest, _ in found)
    assert found[0][1] != found[2][1], "weights in bfloat16 give another loss"


@pytest.mark.parametrize("factor", [1.01, float("inf")])
def test_a_model_that_differs_is_refused_with_the_figure(
    factor: float, topology: Topology, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    hf = make(tmp_path / "hf", SMALL, tiny_tokenizer)
    ours = HfFolder(hf)
    other = make(tmp_path / "other", SMALL, tiny_tokenizer) / "model.safetensors"
    tensors = load_file(other)
    tensors["model.norm.weight"] *= factor
    save_file(tensors, other)
    common = {"dtype": torch.float32, "tokenizer": load_tokenizer(hf), "topology": topology}
    verify_with_transformers(ours, SMALL, hf, **common, text=TEXT)
    with pytest.raises(CheckpointError, match=r"does not compute.* at most \S+ nats"):
        verify_with_transformers(ours, SMALL, other.parent, **common, text=TEXT)


def test_a_failed_comparison_leaves_nothing_that_opens(
    tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = make(tmp_path / "hf", SMALL, tiny_tokenizer)
    assert main(words("hf", hf, "megatron", tmp_path / "m")) == 0
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(parity, "TOLERANCE", -1.0)
    there = ["--verify", "--overwrite"]
    assert main(words("megatron", tmp_path / "m", "hf", tmp_path / "back", *there)) == 2
    assert main(words("megatron", tmp_path / "m", "hf", hf, *there)) == 2
    assert HfFolder(hf).config == SMALL, "the old one stays"
    assert {path.name for path in tmp_path.iterdir()} == before
    assert main(words("hf", hf, "megatron", tmp_path / "new", "--verify")) == 2
    assert latest_checkpoint(tmp_path / "new") is None
    assert not list((tmp_path / "new").glob("*iter_*"))


def test_verification_by_several_processes_and_a_text_without_it_are_refused(
    pool: RankPool, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    hf = make(tmp_path / "hf", SMALL, tiny_tokenizer)
    with pytest.raises(RankFailedError, match="--verify needs both models whole in one process"):
        pool.run(words("hf", hf, "megatron", tmp_path / "m", "--verify"), 2)
    assert not (tmp_path / "m").exists()
    text = ["--verify-text", str(hf / "README.md")]
    assert main(words("hf", hf, "megatron", tmp_path / "m", *text)) == 2
