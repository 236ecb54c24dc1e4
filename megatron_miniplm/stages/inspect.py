"""`inspect`: what an artifact is, where it came from, whether it is intact, what is in it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from megatron_miniplm.core.config import print_json
from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import Manifest, file_problem, read_manifest
from megatron_miniplm.data.columns import ScoredColumns
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.lineage import Ancestor, ancestors, locate_manifest
from megatron_miniplm.data.predictions import Predictions
from megatron_miniplm.data.record_store import KIND as LOGIT_STORE
from megatron_miniplm.data.record_store import RecordStore
from megatron_miniplm.data.scores import Scores
from megatron_miniplm.data.stored_text import StoredPosition, stored_positions
from megatron_miniplm.data.verify import verify
from megatron_miniplm.selection.examples import Example, Order, read_examples
from megatron_miniplm.selection.population import judges, open_population

_CORPORA = ("corpus", "subset")
_SCORED: Mapping[str, type[ScoredColumns]] = {"scores": Scores, "predictions": Predictions}
# Text of a corpus may hold escape sequences, which a terminal would obey.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Print what an artifact is and its lineage; check it; show instances as text."""

    path: tyro.conf.Positional[Path]
    """Prefix of a corpus or subset, or a folder of scores, logits or checkpoints."""
    json: bool = False
    """Answer for machines, with the shards as Megatron data paths."""
    verify: bool = False
    """Also hash every file; exit code 2 if anything is wrong."""
    show: int = 0
    """Number of instances to show as text. Of a selected subset, the pool it was chosen from. Of a
    logit store, the number of positions to show, with the teacher's likeliest tokens."""
    rows: tuple[int, ...] = ()
    """Show these rows of the corpus or subset as text (those that an error of `pretrain` names). Of
    a logit store, the ids of the instances whose positions --show shows; default: its first."""
    order: Order = "top"
    """With --show: highest or lowest keys, those nearest to the threshold, or random ones."""
    teacher_scores: Path | None = None
    """Scores to show; default: those that the subset was selected by."""
    reference_scores: Path | None = None
    """Scores to show; default: those that the subset was selected by."""
    proxy_scores: Path | None = None
    """A proxy's predictions to show; default: those that the subset was selected by."""
    seed: int = 1234
    """Seed of --order random."""


def run(config: Config) -> None:
    """Print the answer to stdout; a broken artifact is an error."""
    manifest_path = locate_manifest(config.path)
    manifest = read_manifest(manifest_path)
    answer = _describe(manifest, manifest_path)
    if config.verify:
        problems = _problems(manifest, manifest_path)
        if problems:
            raise DataError(f"{len(problems)} problems:\n" + "\n".join(problems))
        get_logger().info("%s is intact", config.path)
        answer["verified"] = True
    wanted = config.show > 0 or config.rows
    examples = _examples(config, manifest, manifest_path) if wanted else []
    if config.json:
        print_json(answer | {"examples": [asdict(e) for e in examples]} if examples else answer)
        return
    # A pipe has no width: do not fold paths that somebody will cut out again.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200)
    _print(console, answer, ancestors(manifest, manifest_path))
    for example in examples:
        if isinstance(example, StoredPosition):
            _print_position(console, example)
        else:
            _print_example(console, example)


def _describe(manifest: Manifest, manifest_path: Path) -> dict[str, Any]:
    """The manifest with absolute paths; opening the artifact checks it on the way."""
    content = dict(manifest.content)
    answer: dict[str, Any] = {
        "kind": manifest.kind,
        "path": str(_artifact_path(manifest, manifest_path)),
        "fingerprint": manifest.fingerprint,
        "num_instances": content.pop("num_instances", None),
        "num_tokens": content.pop("num_tokens", None),
        "shards": [],
        "parents": {
            role: {
                "fingerprint": parent.fingerprint,
                "path": str(manifest.parent_path(manifest_path, role)),
            }
            for role, parent in manifest.parents.items()
        },
        "tool_version": manifest.tool_version,
        "config": dict(manifest.config),
        "content": content,
    }
    if manifest.kind in _CORPORA:
        corpus = Corpus.open(answer["path"])
        answer["shards"] = [str(shard) for shard in corpus.shards]
    elif manifest.kind in _SCORED:
        _SCORED[manifest.kind].open(answer["path"])
    elif manifest.kind == LOGIT_STORE:
        RecordStore.open(answer["path"])
        files = content.pop("files")
        content["num_shards"] = sum(name.startswith("shards/") for name in files)
    return answer


def _artifact_path(manifest: Manifest, manifest_path: Path) -> Path:
    return manifest_path.with_suffix("") if manifest.kind in _CORPORA else manifest_path.parent


def _problems(manifest: Manifest, manifest_path: Path) -> list[str]:
    """What is wrong, beyond what opening the artifact refuses."""
    if manifest.kind in _CORPORA:
        return verify(_artifact_path(manifest, manifest_path))
    files = manifest.content.get("files", {})
    found = (file_problem(manifest_path.parent / name, fact) for name, fact in files.items())
    return [problem for problem in found if problem]


def _examples(
    config: Config, manifest: Manifest, manifest_path: Path
) -> Sequence[Example | StoredPosition]:
    """The instances or positions that --show or --rows asks for."""
    if manifest.kind == LOGIT_STORE:
        store = RecordStore.open(manifest_path.parent)
        if store.manifest.config.get("what") == "hidden":
            raise ConfigError(
                f"--show reads logits, and {store.path} holds hidden states: leave it out"
            )
        corpus = Corpus.open(manifest.parent_path(manifest_path, "corpus"))
        return [
            shown
            for each in config.rows or store.ids[:1].tolist()
            for shown in stored_positions(
                store, corpus, instance_id=each, count=config.show or corpus.seq_length
            )
        ]
    if manifest.kind not in _CORPORA:
        raise ConfigError(f"--show and --rows read instances, and a {manifest.kind} has none")
    corpus = Corpus.open(_artifact_path(manifest, manifest_path))
    if config.rows:
        return _named_rows(config, corpus)
    given = _given_folders(config)
    folders = given if any(given.values()) else judges(manifest, manifest_path)
    population = open_population(corpus, folders, seed=config.seed)
    if population.keys is None and config.order != "random":
        raise ConfigError(
            f"--order {config.order} needs scores: pass --teacher-scores or --reference-scores, "
            f"or use --order random"
        )
    return population.examples(config.show, order=config.order, seed=config.seed)


def _named_rows(config: Config, corpus: Corpus) -> list[Example]:
    if config.show or any(_given_folders(config).values()):
        raise ConfigError("--rows shows rows as they are: --show and scores have no effect on it")
    for row in config.rows:
        if not 0 <= row < len(corpus):
            raise ConfigError(f"--rows {row}: {corpus.prefix} has rows 0 to {len(corpus) - 1}")
    return read_examples(corpus, np.array(config.rows), scores={}, kept=None)


def _given_folders(config: Config) -> dict[str, Path | None]:
    return {
        "teacher": config.teacher_scores, "reference": config.reference_scores,
        "proxy": config.proxy_scores,
    }  # fmt: skip


def _print(console: Console, answer: Mapping[str, Any], lineage: Sequence[Ancestor]) -> None:
    for name in ("kind", "path", "fingerprint", "num_instances", "num_tokens", "tool_version"):
        value = answer[name]
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else str(value)
            console.print(f"{name}: {shown}", soft_wrap=True, markup=False)
    for group in ("shards", "config", "content"):
        if answer[group]:
            console.print(_as_tree(group, answer[group]), soft_wrap=True)
    tree = Tree("lineage")
    _grow(tree, lineage)
    console.print(tree, soft_wrap=True)


def _as_tree(name: str, value: Any) -> Tree:
    """A manifest's group as a tree; long lists of numbers are cut."""
    tree = Tree(name)
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, item in items:
        if isinstance(item, Mapping) or (
            isinstance(item, list) and item[:1] and isinstance(item[0], dict)
        ):
            tree.add(_as_tree(str(key), item))
        else:
            text = str(item)
            tree.add(escape(f"{key}: {text if len(text) <= 160 else text[:157] + '...'}"))
    return tree


def _grow(tree: Tree, lineage: Sequence[Ancestor]) -> None:
    for item in lineage:
        _grow(tree.add(escape(item.line)), item.parents)


def _print_example(console: Console, example: Example) -> None:
    mark = {None: "", True: ", KEPT", False: ", dropped"}[example.kept]
    figures = ", ".join(
        f"{name} {value:.3f}"
        for name, value in (
            ("log p", example.teacher_log_prob),
            ("log p_ref", example.reference_log_prob),
            ("difference", example.difference),
            ("predicted difference", example.predicted_difference),
        )
        if value is not None
    )
    console.rule(f"instance {example.id}, {example.domain}, {example.num_tokens} tokens{mark}")
    if figures:
        console.print(figures)
    _print_text(console, example.text)


def _print_position(console: Console, shown: StoredPosition) -> None:
    console.rule(
        f"position {shown.position}: {shown.num_kept} kept, tail {shown.tail_mass:.3f}, entropy "
        f"{shown.entropy:.3f}"
    )
    _print_text(console, f"{shown.context} -> {shown.gold!r} ({shown.gold_log_prob:.3f})")
    likeliest = (f"{token!r} {log_prob:.3f}" for token, log_prob in shown.likeliest)
    _print_text(console, "  ".join(likeliest))


def _print_text(console: Console, text: str) -> None:
    text = text.translate(_VISIBLE)
    console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)
