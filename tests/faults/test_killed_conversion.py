"""SIGKILL at any moment of a conversion, in both directions: nothing half-made opens."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_miniplm.__main__ import main
from megatron_miniplm.models.checkpoint import latest_checkpoint, verify_checkpoint
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.hf_folder import HfFolder, is_hf_folder
from megatron_miniplm.models.hf_writer import HfExtras, write_hf_folder
from tests.faults.test_kill import wait_until
from tests.pool import PROJECT, kill_group
from tests.small_artifacts import visible
from tests.unit.test_hf_folder import parameters

SHAPE = ModelConfig(
    model_family="qwen", num_layers=4, hidden_size=256, ffn_hidden_size=512,
    num_attention_heads=4, vocab_size=20000,
)  # fmt: skip
# Converts there and back until it is killed.
THERE_AND_BACK = """
import json, sys
from megatron_miniplm.__main__ import main
if __name__ == "__main__":
    there, back = json.loads(sys.argv[1])
    while True:
        assert main(there) == 0
        assert main(back) == 0
"""


@pytest.mark.parametrize("rounds", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_what_a_killed_conversion_left_is_whole_or_does_not_open(
    rounds: int, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    extras = HfExtras(tokenizer_folder=tiny_tokenizer)
    hf, megatron, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    write_hf_folder(hf, SHAPE, parameters(SHAPE), dtype=torch.float32, extras=extras)
    expected = HfFolder(hf)

    def convert(source: str, load: Path, to: str, save: Path) -> list[str]:
        flags = ["--from", source, "--load", str(load), "--to", to, "--save", str(save)]
        return ["convert", *flags, "--overwrite"]

    steps = [convert("hf", hf, "megatron", megatron), convert("megatron", megatron, "hf", back)]
    (tmp_path / "convert.py").write_text(THERE_AND_BACK)
    script = [sys.executable, str(tmp_path / "convert.py"), json.dumps(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = str(PROJECT)
    traces = ["megatron/.iter_*.tmp", ".back.partial"]  # there while a step writes

    def writing(trace: str, since: float) -> bool:
        with suppress(FileNotFoundError):
            return any(path.stat().st_mtime > since for path in tmp_path.glob(trace))
        return False

    opened = {"checkpoint": 0, "folder": 0}
    for number in range(rounds):
        process = subprocess.Popen(
            script, env=environment, start_new_session=True, text=True, stderr=subprocess.PIPE
        )
        wait_until(partial(writing, traces[number % 2], time.time()), process)
        time.sleep(random.uniform(0, 0.1))
        kill_group(process)
        checkpoint = latest_checkpoint(megatron)
        if checkpoint is not None:
            verify_checkpoint(checkpoint)
            opened["checkpoint"] += 1
        if is_hf_folder(back):
            found = HfFolder(back)
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
            opened["folder"] += 1
    print(f"\nopened after {rounds} kills: {opened}")
    for step in steps:
        assert main(step) == 0
    assert visible(tmp_path) == {"hf", "megatron", "back", "convert.py"}
    assert visible(megatron) >= {"run.json", "tokenizer", "iter_0000000"}
    assert not [name for name in visible(megatron) if name.endswith(".tmp")]
