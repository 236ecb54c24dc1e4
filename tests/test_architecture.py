"""The rooms of the package, kept by reading the source: floors, no rings, one place per idea."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_miniplm"
FLOORS = {
    "core": 0,
    "kernels": 1, "parallel": 1,
    "data": 2,
    "models": 3, "selection": 3,
    "objectives": 4, "teachers": 4,
    "training": 5, "evaluation": 5,
    "stages": 6, "__main__": 6,
}  # fmt: skip
TEXTS = [
    path
    for folder in ("benchmarks", "csrc", "docs", "examples", PACKAGE, "tests", "tools")
    for path in sorted((PROJECT / folder).rglob("*"))
    if path.suffix in (".cpp", ".h", ".md", ".py", ".sbatch", ".sh", ".yaml")
] + sorted(PROJECT.glob("*.md"))
EXTRAS = ["transformers", "gguf", "triton", "lm_eval", "wandb", "transformer_engine", "pyarrow",
          "mamba_ssm", "causal_conv1d"]  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted((PROJECT / PACKAGE).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imported(node: ast.AST, module: str) -> list[str]:
    """Modules that an import statement names; relative imports are resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        base = f"{package}.{base}".rstrip(".")
    names = [f"{base}.{alias.name}" for alias in node.names]
    return [name if name in SOURCES else base for name in names]


def own_imports(module: str) -> set[str]:
    found = {name for node in ast.walk(TREES[module]) for name in imported(node, module)}
    return {name for name in found if name.split(".")[0] == PACKAGE}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("module", [name for name in SOURCES if room(name)])
def test_a_module_only_imports_its_own_room_and_lower_floors(module):
    assert room(module) in FLOORS, f"{module} is in a room that has no floor"
    for name in own_imports(module):
        if room(name) in ("", "_C", room(module)):
            continue
        assert FLOORS[room(name)] < FLOORS[room(module)], f"{module} climbs to {name}"


def test_no_modules_import_each_other_in_a_ring():
    graph = {module: own_imports(module) - {module} for module in SOURCES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import ring: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", SOURCES)
def test_own_modules_are_imported_at_the_top(module):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    hidden = [
        f"line {inner.lineno}: {name}"
        for node in ast.walk(TREES[module])
        if isinstance(node, functions)
        for inner in ast.walk(node)
        for name in imported(inner, module)
        if name.split(".")[0] == PACKAGE
    ]
    assert not hidden


@pytest.mark.parametrize("module", SOURCES)
def test_no_state_hides_in_module_globals(module):
    assert not [node.lineno for node in ast.walk(TREES[module]) if isinstance(node, ast.Global)]


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_says_what_it_holds(module):
    assert ast.get_docstring(TREES[module])


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("megatron.core.parallel_state", {"megatron_miniplm.parallel.topology"}),
        ("matplotlib", {"megatron_miniplm.evaluation.figures"}),
    ],
)
def test_some_libraries_have_one_door(library, allowed):
    users = {
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        for name in [*imported(node, module), *_with_members(node)]
        if name == library or name.startswith(f"{library}.")
    }
    assert users == allowed


def _with_members(node: ast.AST) -> list[str]:
    """`from megatron.core import parallel_state` as megatron.core.parallel_state."""
    if not isinstance(node, ast.ImportFrom):
        return []
    return [f"{node.module}.{alias.name}" for alias in node.names]


def test_no_text_refers_to_what_does_not_ship():
    """A reader has the papers and this repository: formulas and rules are in one of them."""
    absent = re.compile(r"spec/[a-z]+|DESIGN [0-9]|issue [0-9]|\.\./shared")
    found = [
        f"{path.relative_to(PROJECT)}: {match[0]}"
        for path in TEXTS
        for match in absent.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


_IMPORT_ALL = """
import dataclasses, importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {extras}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (hidden by the test)", name=name)
sys.meta_path.insert(0, Refuse())
for name in {modules}:
    importlib.import_module(name)
from megatron_miniplm.__main__ import VERBS, stage_of
for verb in VERBS:
    stage = stage_of(verb)
    assert dataclasses.is_dataclass(stage.Config) and stage.Config.__doc__, verb
    assert callable(stage.run), verb
"""


def test_without_extras_every_module_imports_and_every_verb_has_a_stage():
    # A process of its own: here, other tests have imported the extras already.
    # The Triton kernels are the feature that their extra is for; `kernels` names them lazily.
    modules = [name for name in SOURCES if not name.endswith("__main__") and ".triton_" not in name]
    # megatron.core 0.19 imports Triton itself, and brings it.
    core = importlib.metadata.version("megatron-core").split(".")[:2]
    extras = set(EXTRAS) - ({"triton"} if tuple(map(int, core)) >= (0, 19) else set())
    code = _IMPORT_ALL.format(extras=extras, modules=modules)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
