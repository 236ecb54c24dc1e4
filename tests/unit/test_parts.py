"""preprocess in parts: N processes and one process with --num-parts N make the same corpus."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.parts import deal, this_rank

PROJECT = Path(__file__).resolve().parents[2]
SEQ_LENGTH = 32


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Five input files; the domains come in another order in each."""
    paragraphs = (PROJECT / "LICENSE").read_text().split("\n\n")
    made = []
    for number in range(5):
        path = tmp_path / f"text-{number}.jsonl"
        with path.open("w") as file:
            for at, paragraph in enumerate(paragraphs[number::5]):
                domain = f"domain {(at + number) % 3}"
                file.write(json.dumps({"text": paragraph, "domain": domain}) + "\n")
        made.append(path)
    return made


def command(tokenizer: Path, files: list[Path], prefix: Path, *flags: str) -> list[str]:
    return [
        "preprocess", "--input", *map(str, files), "--domain-key", "domain",
        "--tokenizer-model", str(tokenizer), "--seq-length", str(SEQ_LENGTH),
        "--instances-per-shard", "40", "--output-prefix", str(prefix), *flags,
    ]  # fmt: skip


def content(corpus: Corpus) -> tuple[str, list[str], dict[str, object]]:
    manifest = corpus.manifest.content
    return corpus.fingerprint, list(corpus.domain_names), dict(manifest["statistics"])


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")]
)
def test_ranks_in_any_order_make_what_one_process_makes(
    tiny_tokenizer: Path,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, str],
) -> None:
    alone, together = tmp_path / "alone" / "c", tmp_path / "together" / "c"
    assert main(command(tiny_tokenizer, files, alone, "--num-parts", "3")) == 0
    monkeypatch.setenv(names[1], "3")
    for rank in (2, 0, 1):
        assert not together.with_name("c.json").exists()
        monkeypatch.setenv(names[0], str(rank))
        assert main(command(tiny_tokenizer, files, together)) == 0
    assert content(Corpus.open(together)) == content(Corpus.open(alone))
    assert leftovers(alone.parent) == leftovers(together.parent) == []


def test_a_part_is_its_files_packed_alone(
    tiny_tokenizer: Path, files: list[Path], tmp_path: Path
) -> None:
    joined_prefix = tmp_path / "joined"
    assert main(command(tiny_tokenizer, files, joined_prefix, "--num-parts", "2")) == 0
    joined = Corpus.open(joined_prefix)
    expected, shards = [], 0
    for number in range(2):
        prefix = tmp_path / f"part{number}"
        assert main(command(tiny_tokenizer, files[number::2], prefix)) == 0
        part = Corpus.open(prefix)
        names = [part.domain_names[domain] for domain in part.domains]
        ids = [one.tolist() for one in part.gather(range(part.num_instances))]
        expected += list(zip(names, ids, strict=True))
        shards += len(part.shards)
    names = [joined.domain_names[domain] for domain in joined.domains]
    ids = [one.tolist() for one in joined.gather(range(joined.num_instances))]
    assert list(zip(names, ids, strict=True)) == expected
    assert len(joined.shards) == shards > 2
    statistics = joined.manifest.content["statistics"]
    assert statistics["instances"] == joined.num_instances
    assert statistics["documents"] == sum(path.read_bytes().count(b"\n") for path in files)
    assert list(statistics["domains"]) == list(joined.domain_names)
    for number, name in enumerate(joined.domain_names):
        rows = int(np.sum(joined.domains == number))
        assert statistics["domains"][name]["instances"] == rows


def test_one_part_is_the_undivided_corpus(
    tiny_tokenizer: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command(tiny_tokenizer, files, tmp_path / "whole")) == 0
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(tiny_tokenizer, files, tmp_path / "one", "--num-parts", "1")) == 0
    assert content(Corpus.open(tmp_path / "one")) == content(Corpus.open(tmp_path / "whole"))


def test_complete_parts_are_kept_and_only_the_others_made(
    tiny_tokenizer: Path,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = tmp_path / "expected"
    assert main(command(tiny_tokenizer, files, expected, "--num-parts", "5")) == 0
    text = files[3].read_bytes()
    files[3].write_bytes(text + b"{")
    prefix = tmp_path / "out" / "c"
    words = command(tiny_tokenizer, files, prefix, "--num-parts", "5")
    assert main(words) == 2
    assert f"{files[3]}, line" in capsys.readouterr().err
    store = prefix.with_name(".c.parts")
    kept = sorted(path.name for path in store.iterdir() if path.is_dir())
    assert kept == [f"part-{number:05d}-of-00005" for number in range(3)]
    times = [(store / name / "part.json").stat().st_mtime_ns for name in kept]
    assert not prefix.with_name("c.json").exists()
    files[3].write_bytes(text)
    monkeypatch.setattr("megatron_miniplm.data.parts.shutil.rmtree", lambda *_, **__: None)
    assert main(words) == 0
    assert [(store / name / "part.json").stat().st_mtime_ns for name in kept] == times
    assert content(Corpus.open(prefix)) == content(Corpus.open(expected))


@pytest.mark.parametrize("change", ["flag", "file", "lost shard"])
def test_a_part_of_something_else_is_made_again(
    tiny_tokenizer: Path, files: list[Path], tmp_path: Path, change: str
) -> None:
    text = files[1].read_bytes()
    files[1].write_bytes(b"{")
    prefix, flags = tmp_path / "out" / "c", ["--num-parts", "2"]
    assert main(command(tiny_tokenizer, files, prefix, *flags)) == 2
    store = prefix.with_name(".c.parts")
    assert (store / "part-00000-of-00002" / "part.json").exists()
    files[1].write_bytes(text)
    if change == "flag":
        flags += ["--flush-tails"]
    elif change == "file":
        files[0].write_bytes(files[0].read_bytes() + text)
    else:
        next((store / "part-00000-of-00002").glob("*.bin")).unlink()
    assert main(command(tiny_tokenizer, files, prefix, *flags)) == 0
    assert main(command(tiny_tokenizer, files, tmp_path / "fresh", *flags)) == 0
    assert content(Corpus.open(prefix)) == content(Corpus.open(tmp_path / "fresh"))


def test_a_rank_that_finds_its_corpus_joined_is_done_and_another_corpus_is_refused(
    tiny_tokenizer: Path,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command(tiny_tokenizer, files, tmp_path / "c", "--num-parts", "2")
    assert main(words) == 0
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 0
    assert main([*words, "--flush-tails"]) == 2
    assert main([*words, "--overwrite"]) == 2
    assert "cannot agree" in capsys.readouterr().err


def test_files_are_dealt_in_turn_and_never_more_parts_than_files() -> None:
    assert deal(["a", "b", "c", "d", "e"], 2) == [["a", "c", "e"], ["b", "d"]]
    with pytest.raises(ConfigError, match=r"3 parts.* 2 input files"):
        deal(["a", "b"], 3)
    with pytest.raises(ConfigError, match="standard input cannot be dealt"):
        deal(["a", "-"], 2)


def test_a_slurm_batch_script_is_one_process() -> None:
    assert this_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == (0, 1)
    assert this_rank({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}) == (3, 8)
    assert this_rank({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0"}) == (1, 2)
    assert this_rank({}) == (0, 1)
