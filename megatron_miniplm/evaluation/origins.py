"""Where runs come from: what their newest checkpoints name, and the selections among that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_miniplm.core.manifest import Manifest, read_json, read_manifest
from megatron_miniplm.data.lineage import Ancestor, ancestors, locate_manifest
from megatron_miniplm.evaluation.report import Branch, Section
from megatron_miniplm.models.checkpoint import latest_checkpoint

Lineage = tuple[Ancestor, ...]


def lineage_of(save: Path) -> Lineage | None:
    """What the newest checkpoint of a run was made of; None without a checkpoint."""
    folder = latest_checkpoint(save)
    if folder is None:
        return None
    path = locate_manifest(folder)
    return ancestors(read_manifest(path), path)


def models_of(save: Path) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a `model` of results.json is one of that run.

    It has the fingerprint of a checkpoint, or lay there: runs may be moved, checkpoints deleted.
    """
    place = save.resolve()
    fingerprints = {read_json(path)["fingerprint"] for path in save.glob("iter_*/manifest.json")}

    def is_own(model: Mapping[str, Any]) -> bool:
        path = Path(model["path"]).resolve()
        return model["fingerprint"] in fingerprints or place in (path, path.parent)

    return is_own


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A subset that `select` made, by its manifest: its tokens may be gone."""

    prefix: Path
    manifest_path: Path
    manifest: Manifest

    @property
    def facts(self) -> Mapping[str, Any]:
        """What `select` says of its choice; empty for a subset that it did not make."""
        facts: Mapping[str, Any] = self.manifest.content.get("selection", {})
        return facts


def selections_of(lineages: Sequence[Lineage | None]) -> list[Selected]:
    """The selected subsets that these runs were trained on, each once.

    Also those that their corpora were chosen or made from, but none of a teacher's.
    """
    found: dict[str, Selected] = {}
    for lineage in lineages:
        for item in _corpora(lineage or ()):
            if item.kind == "subset" and item.state == "present":
                path = locate_manifest(item.path)
                subset = Selected(
                    prefix=item.path, manifest_path=path, manifest=read_manifest(path)
                )
                if "histogram" in subset.facts:
                    found.setdefault(item.fingerprint, subset)
    return list(found.values())


def _corpora(lineage: Lineage) -> Iterator[Ancestor]:
    for item in lineage:
        if item.role in ("parent", "source") or item.role.startswith("corpus"):
            yield item
            yield from _corpora(item.parents)


def lineage_section(names: Sequence[str], lineages: Sequence[Lineage | None]) -> Section:
    """A tree for each lineage, under the names of the runs that share it."""
    shared: dict[Lineage, list[str]] = {}
    for name, lineage in zip(names, lineages, strict=True):
        if lineage is not None:
            shared.setdefault(lineage, []).append(name)
    without = [name for name, lineage in zip(names, lineages, strict=True) if lineage is None]
    return Section(
        title="Lineage",
        text=f"No checkpoint yet, so no lineage: {', '.join(without)}." if without else "",
        tree=[
            Branch(text=", ".join(sharing), branches=_branches(lineage))
            for lineage, sharing in shared.items()
        ],
    )


def _branches(lineage: Lineage) -> list[Branch]:
    return [Branch(text=item.line, branches=_branches(item.parents)) for item in lineage]
