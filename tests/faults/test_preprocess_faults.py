"""preprocess under faults: killed anywhere, disk full, huge lines; nothing half-made ever opens."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import MiniPLMError
from megatron_miniplm.data.corpus import Corpus
from tests.pool import PROJECT, kill_group

SEQ_LENGTH = 128


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of 6 MB each."""
    folder = tmp_path_factory.mktemp("text")
    text = (PROJECT / "LICENSE").read_text()
    made = []
    for number in range(2):
        path = folder / f"text-{number}.jsonl"
        records = [json.dumps({"text": f"{number} {at}\n{text}"}) for at in range(500)]
        path.write_text("\n".join(records))
        made.append(path)
    return made


def command(tokenizer: Path, prefix: Path, *words: object) -> list[str]:
    return [
        "preprocess", "--tokenizer-model", str(tokenizer), "--seq-length", str(SEQ_LENGTH),
        "--output-prefix", str(prefix), "--input", *map(str, words),
    ]  # fmt: skip


@pytest.mark.parametrize("parts", [1, 2])
def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(
    tiny_tokenizer: Path, files: list[Path], tmp_path: Path, parts: int
) -> None:
    flags = [*files, "--num-parts", parts]
    expected = tmp_path / "expected"
    assert main(command(tiny_tokenizer, expected, *flags)) == 0
    prefix = tmp_path / "out" / "c"
    words = command(tiny_tokenizer, prefix, *flags)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_miniplm", *words],
            cwd=PROJECT, start_new_session=True, text=True, stderr=subprocess.PIPE,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while process.poll() is None and not list(prefix.parent.glob(".c.*/**/*shard*")):
            assert time.monotonic() < deadline, "it wrote nothing in time"
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.3))
        kill_group(process)
        if prefix.with_name("c.json").exists():
            break  # it was too fast for the kill, and must be whole
        with pytest.raises(MiniPLMError):
            Corpus.open(prefix)
    if not prefix.with_name("c.json").exists():
        assert main(words) == 0
        assert sorted(path.name for path in prefix.parent.iterdir() if path.name[0] == ".") == []
    assert Corpus.open(prefix).fingerprint == Corpus.open(expected).fingerprint


@pytest.mark.parametrize("parts", [1, 2])
def test_a_full_disk_is_said_and_leaves_nothing(
    tiny_tokenizer: Path,
    files: list[Path],
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
    parts: int,
) -> None:
    prefix = small_disk / "c"
    assert main(command(tiny_tokenizer, prefix, *files, "--num-parts", parts)) == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert str(prefix) in message
    assert "Traceback" not in message
    with pytest.raises(MiniPLMError):
        Corpus.open(prefix)
    assert list(small_disk.rglob("*.bin")) == []


def test_a_line_of_100_mb_is_one_document(tiny_tokenizer: Path, tmp_path: Path) -> None:
    # Words without a newline: what a broken export looks like. The valve keeps 2,000 chunks of it.
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"some words. " * (1_000_000 // 12))
        file.write(b'"}\n{"text": "the next document"}\n')
    assert path.stat().st_size > 99_000_000
    assert main(command(tiny_tokenizer, tmp_path / "c", path)) == 0
    corpus = Corpus.open(tmp_path / "c")
    statistics = corpus.manifest.content["statistics"]
    assert statistics["documents"] == 2
    assert statistics["tokens"] > 10_000_000
    packing = statistics["packing"]
    assert (packing["overlong_documents"], corpus.num_instances) == (1, 2000)
    assert packing["dropped_overlong_tokens"] > 9_000_000
    assert packing["tokens_in"] == corpus.num_tokens + sum(
        count for name, count in packing.items() if "dropped" in name and name.endswith("tokens")
    )


def test_an_interrupt_stops_it_and_leaves_nothing(
    tiny_tokenizer: Path, files: list[Path], tmp_path: Path
) -> None:
    prefix = tmp_path / "out" / "c"
    # Standard input stays open: the reader waits for it when the signal comes.
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_miniplm", *command(tiny_tokenizer, prefix, "-")],
        cwd=PROJECT, stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        # A suite that a shell runs in the background ignores interrupts, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(files[0].read_bytes()[:2_000_000])
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not prefix.with_name(".c.partial").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
