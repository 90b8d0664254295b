"""Imports point down only: the floors of the library, enforced on the sources."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "peftlite"

# From the ground up. A module may import from lower floors, and from its own package's `__init__` not at all.
FLOORS: list[tuple[str, ...]] = [
    ("kernels.dispatch", "_version", "sharing", "options"),
    ("kernels",),
    ("quantization.levels",),
    ("quantization.blockwise",),
    ("quantization.packed",),
    ("quantization.linear",),
    ("quantization", "adapter", "tune"),
    ("training.controller", "starting_point"),  # the base of every controller, also of those that live in their method's file
    ("methods.*",),
    ("methods",),
    ("targets", "fusion", "residual"),
    ("inject", "training.*"),
    ("training",),
    ("merge", "quantize", "convert", "selection", "checkpoint", "interop.*", "analysis.*"),
    ("interop", "analysis"),
    ("", "cli"),
]
# Helpers that a module of the same floor may use.
BESIDE = {
    ("merge", "inject"),
    ("analysis.intervention", "analysis.intruders"),
    ("analysis.step", "analysis.meters"),
    ("analysis.step", "selection"),
    ("analysis.memory", "analysis.meters"),
    ("analysis.memory", "analysis.step"),
    ("analysis.memory", "analysis.timeline"),
    ("analysis.timeline", "analysis.meters"),
    ("analysis.timeline", "analysis.step"),
}


def sources() -> dict[str, ast.Module]:
    """Every module under ``peftlite`` by its name inside the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


SOURCES = sources()


def imports(tree: ast.Module) -> list[str]:
    """Dotted names of everything that a module imports, also inside functions."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def own_imports(tree: ast.Module) -> list[str]:
    """Modules of the library that a module imports, by their names inside the package."""
    found = []
    for name in imports(tree):
        if name == "peftlite" or name.startswith("peftlite."):
            inner = name.removeprefix("peftlite").removeprefix(".")
            while inner and inner not in SOURCES and inner != "kernels":
                inner = inner.rpartition(".")[0]
            found.append(inner)
    return found


def floor(module: str) -> int:
    """The floor that a module stands on."""
    for height, members in enumerate(FLOORS):
        for member in members:
            if module == member or (member.endswith(".*") and module.startswith(member[:-1])):
                return height
    for height, members in enumerate(FLOORS):
        if any(member and module.startswith(f"{member}.") for member in members):
            return height
    raise AssertionError(f"{module} stands on no floor: add it to FLOORS")


def test_the_sources_are_found() -> None:
    assert {"", "adapter", "inject", "methods.lora", "kernels.lora_linear", "kernels.dispatch"} <= set(SOURCES)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module: str) -> None:
    for imported in own_imports(SOURCES[module]):
        if module.startswith("kernels") and imported.startswith("kernels"):
            continue  # one operation may build on another
        assert floor(imported) < floor(module) or (module, imported) in BESIDE, f"{module} imports {imported}"


@pytest.mark.parametrize("module", [m for m in SOURCES if m.startswith("methods.")])
def test_methods_never_import_one_another(module: str) -> None:
    assert not [name for name in own_imports(SOURCES[module]) if name.startswith("methods")]


@pytest.mark.parametrize("module", [m for m in SOURCES if m.startswith("kernels")])
def test_kernels_know_nothing_of_the_rest(module: str) -> None:
    assert {name.partition(".")[0] for name in own_imports(SOURCES[module])} <= {"kernels"}
    for name in imports(SOURCES[module]):  # as a top-level `kernels` they would be a second copy of themselves
        assert name.partition(".")[0] != "kernels"


@pytest.mark.parametrize("module", SOURCES)
def test_triton_stays_behind_the_door(module: str) -> None:
    if not module.endswith("_triton"):
        assert "triton" not in {name.partition(".")[0] for name in imports(SOURCES[module])}
        top = [node for node in SOURCES[module].body if isinstance(node, (ast.Import, ast.ImportFrom))]
        eager = own_imports(ast.Module(body=list(top), type_ignores=[]))
        assert not [name for name in eager if name.endswith("_triton")], "imported only when chosen"


@pytest.mark.parametrize("module", SOURCES)
def test_runtime_dependencies_are_torch_and_safetensors(module: str) -> None:
    outside = {name.partition(".")[0] for name in imports(SOURCES[module])} - set(sys.stdlib_module_names)
    allowed = {"peftlite", "torch", "safetensors", "typing_extensions"} | ({"triton"} if module.endswith("_triton") else set())
    assert outside <= allowed


def test_floors_are_tested_by_something_that_can_fail() -> None:
    wrong = ast.parse("from peftlite.inject import adapters\nimport peftlite.methods.dora")
    assert own_imports(wrong) == ["inject", "methods.dora"]
    assert floor("inject") > floor("methods.lora") == floor("methods.dora") > floor("adapter") > floor("kernels.row_norm")
