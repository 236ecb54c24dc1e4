"""Where an artifact came from: its manifest's parents, their parents, and so on.

Only manifests are read, so artifacts of every kind are followed, also those that are gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.core.manifest import Manifest, Parent, read_manifest
from megatron_miniplm.data.staging import with_suffix

_LATEST = "latest_checkpointed_iteration.txt"  # Megatron's name for it


@dataclass(frozen=True, kw_only=True)
class Ancestor:
    """One input of an artifact, found or not."""

    role: str
    path: Path
    fingerprint: str
    """What it was when it was used."""
    state: Literal["present", "missing", "changed", "foreign"]
    """foreign: something is there that has no manifest of ours, like a Hugging Face folder."""
    kind: str
    """Empty where there is no manifest."""
    parents: tuple[Ancestor, ...]

    @property
    def line(self) -> str:
        """For people: its role, its kind or what became of it, and where it was."""
        mark = {
            "present": self.kind,
            "missing": "MISSING",
            "changed": f"CHANGED {self.kind}",
            "foreign": "(no manifest)",
        }
        return f"{self.role}: {mark[self.state]} {self.path} {self.fingerprint[:12]}"


def locate_manifest(path: Path) -> Path:
    """The manifest of a prefix, a folder of scores, or a checkpoint folder (its newest one)."""
    path = Path(path).absolute()
    candidates = [with_suffix(path, ".json"), path / "manifest.json"]
    tracker = path / _LATEST
    if tracker.exists():
        iteration = tracker.read_text().strip()
        candidates.append(path / f"iter_{iteration:>07}" / "manifest.json")
    if path.suffix == ".json":
        candidates.append(path)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{path} is no finished artifact: there is none of {', '.join(map(str, candidates))}; "
        f"give the prefix of a corpus, or a folder of scores or checkpoints"
    )


def ancestors(manifest: Manifest, manifest_path: Path) -> tuple[Ancestor, ...]:
    """The parents of an artifact with their own, depth first."""
    found = {
        role: _ancestor(role, parent, manifest.parent_path(manifest_path, role))
        for role, parent in manifest.parents.items()
    }
    # The chain of parents ends at the root, which is worth a line only where the chain is broken.
    if "parent" in found and found["parent"].state == "present":
        found.pop("root", None)
    return tuple(found.values())


def _ancestor(role: str, parent: Parent, path: Path) -> Ancestor:
    try:
        manifest_path = locate_manifest(path)
        manifest = read_manifest(manifest_path)
    except DataError:
        return Ancestor(
            role=role,
            path=path,
            fingerprint=parent.fingerprint,
            state="foreign" if path.exists() else "missing",
            kind="",
            parents=(),
        )
    same = manifest.fingerprint == parent.fingerprint
    return Ancestor(
        role=role,
        path=path,
        fingerprint=parent.fingerprint,
        state="present" if same else "changed",
        kind=manifest.kind,
        parents=ancestors(manifest, manifest_path) if same else (),
    )
