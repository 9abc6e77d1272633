"""Who may import whom: the layers of the package, read from its source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "loraga_dist"

# A module or sub-package imports only from floors below its own.
FLOORS = [
    {"errors", "linalg", "losses", "memory", "progress"},
    {"launcher"},
    {"rendezvous"},
    {"config", "distributed", "safetensors_files", "schemes", "engines"},
    {"targets", "formats", "taps", "models", "watch"},
    {"calibration", "rank_budget"},
    {"sharding", "plan", "artifacts"},
    {"sweep", "checkpoint", "hub", "tracking"},
    {"stream", "placement", "resume", "rehearsal"},
    {"calibrate", "estimate", "weights"},
    {"start", "job"},
    {"outputs", "forecast", "saving"},
    {"plan_report"},
    {"pipeline", "refactor"},
    {"commands"},
    {"cli"},
]
MAY_IMPORT = {
    "linalg": set(),
    "schemes": {"linalg", "errors"},
    "engines": {"linalg"},
}
HEAVY = ("trl", "datasets", "deepspeed", "matplotlib", "mpi4py")
CORE = [
    "launcher",
    "distributed",
    "config",
    "schemes",
    "engines",
    "calibration",
    "models",
    "plan",
    "sharding",
    "sweep",
    "job",
    "pipeline",
    "cli",
]


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None and node.module != "loraga_dist", f"{path}: name the module imported from"
            yield node.module


def _edges() -> set[tuple[str, str]]:
    """(importer, imported) over modules and sub-packages; the package's own __init__ may import anything."""
    edges = set()
    for path in PACKAGE.rglob("*.py"):
        importer = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in _imports(path):
            package, *names = module.split(".")
            if package == "loraga_dist" and importer not in ("__init__", names[0]):
                edges.add((importer, names[0]))
    return edges


def test_every_module_has_exactly_one_floor() -> None:
    names = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()} - {"__init__", "__pycache__"}
    assert sorted(name for floor in FLOORS for name in floor) == sorted(names)


def test_imports_point_down() -> None:
    level = {name: height for height, floor in enumerate(FLOORS) for name in floor}
    upward = sorted(f"{a} imports {b}" for a, b in _edges() if level[b] >= level[a])
    assert not upward


@pytest.mark.parametrize("unit", MAY_IMPORT)
def test_the_mathematics_stands_alone(unit: str) -> None:
    assert {imported for importer, imported in _edges() if importer == unit} <= MAY_IMPORT[unit]


def test_sharding_knows_no_engine() -> None:
    assert not {"engines", "schemes", "sweep"} & {imported for importer, imported in _edges() if importer == "sharding"}


def test_only_sharding_imports_deepspeed() -> None:
    importers = {
        path.relative_to(PACKAGE)
        for path in PACKAGE.rglob("*.py")
        if any(name.partition(".")[0] == "deepspeed" for name in _imports(path))
    }
    assert importers, "the check reads no imports"
    assert {path.parts[0] for path in importers} == {"sharding"}


def test_core_imports_without_the_optional_packages() -> None:
    program = f"""
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Refuse())
for module in {CORE!r}:
    importlib.import_module(f"loraga_dist.{{module}}")
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)
