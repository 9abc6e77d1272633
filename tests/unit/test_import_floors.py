"""Who may import whom: the wings of the package, and the modules inside each, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "loraga_dist"

# A wing, or a module beside the wings, imports only from floors below its own.
FLOORS = [
    {"errors", "linalg", "value_types"},
    {"schemes", "engines", "ranks", "yaml_tree"},
    {"config", "files"},
    {"data", "model"},
    {"sharding"},
    {"request"},
    {"artifacts", "gradients"},
    {"start", "forecast", "publish"},
    {"run"},
    {"commands"},
    {"cli"},
]
# The same inside each wing, from the ground up. A wing's __init__ imports nothing from above the wing's own modules.
INSIDE = {
    "linalg": ["orthogonal", "randomized_svd", "product", "union", "regression"],
    "engines": [
        "home",
        "product",
        "base",
        "exact",
        "sketch_state",
        "sketch_union",
        "sketch",
        "__init__",
        "inputs",
        "group",
    ],
    "ranks": [
        "balance",
        "words",
        "progress",
        "memory",
        "launcher",
        "rendezvous",
        "sealed",
        "world",
        "watch",
        "stop",
        "session",
    ],
    "files": [
        "parallel",
        "disk",
        "safetensors_io",
        "quantized",
        "stored_tensors",
        "checksums",
        "shared_tensors",
        "staging",
        "checkpoint",
    ],
    "data": ["losses", "images", "formats", "feedback", "microbatches", "image_rows", "samples"],
    "model": [
        "conversion",
        "classes",
        "base",
        "towers",
        "blocks",
        "products",
        "stacks",
        "shape",
        "targets",
        "names",
        "left_out",
        "coverage",
        "injection",
        "selection",
        "factors",
        "rank_budget",
        "plan",
    ],
    "sharding": ["slices", "settings", "gloo", "base", "single", "from_disk", "zero3", "open"],
    "request": ["refusals", "data", "request"],
    "artifacts": [
        "names",
        "tensors",
        "adapter",
        "residual",
        "factors",
        "report",
        "warnings",
        "layout",
        "reading",
        "compare",
        "checks",
        "verify",
    ],
    "gradients": [
        "forward",
        "premises",
        "experts",
        "taps",
        "stubs",
        "head",
        "kept",
        "observer",
        "route",
        "block_order",
        "passes",
        "gradients",
        "saved",
        "checkpointer",
        "calibrate",
    ],
    "start": ["rounds", "place", "identity", "step", "in_place"],
    "forecast": [
        "ledger",
        "in_blocks",
        "activations",
        "calibration",
        "memory",
        "work",
        "ways",
        "forecaster",
        "advice",
        "kinds",
        "speed",
        "report",
        "text",
    ],
    "publish": ["rendering", "base_call", "card", "text", "plots", "page", "hub", "tracking"],
    "run": ["finished", "writing", "pipeline"],
    "commands": ["trained", "convert", "materialize", "rebuild", "save_start", "clean", "recipe", "table"],
}
MAY_IMPORT = {
    "linalg": set(),
    "schemes": {"linalg"},
    "engines": {"linalg"},
    "ranks": {"errors"},
}
HEAVY = ("trl", "datasets", "deepspeed", "matplotlib", "mpi4py")
MAX_LINES = 400
MAX_PARAMETERS = 7


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None and node.module != "loraga_dist", f"{path}: name the module imported from"
            yield node.module


def _edges() -> Iterator[tuple[Path, list[str]]]:
    """Importer, and the dotted parts of what it imports of ours."""
    for path in _modules():
        for module in _imports(path):
            package, *names = module.split(".")
            if package == "loraga_dist":
                yield path, names


def _wing(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_wing_has_exactly_one_floor_and_every_module_one_place() -> None:
    wings = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()} - {"__init__", "__pycache__"}
    assert sorted(name for floor in FLOORS for name in floor) == sorted(wings)
    assert len(FLOORS) <= 12, "more than a person holds in mind"
    for wing, order in INSIDE.items():
        modules = {path.stem for path in (PACKAGE / wing).glob("*.py")} - {"__init__"}
        assert sorted(set(order) - {"__init__"}) == sorted(modules), wing
    assert {path.parent.name for path in PACKAGE.glob("*/*.py")} == INSIDE.keys()


def test_imports_point_down() -> None:
    level = {name: height for height, floor in enumerate(FLOORS) for name in floor}
    upward = {f"{_wing(a)} imports {b[0]}" for a, b in _edges() if _wing(a) != b[0] and level[b[0]] >= level[_wing(a)]}
    assert not upward


def test_imports_inside_a_wing_point_down() -> None:
    upward = []
    for importer, (wing, *rest) in _edges():
        if importer.parent.name == wing:
            order = INSIDE[wing]
            at = order.index(importer.stem) if importer.stem in order else len(order)
            imported = rest[0] if rest else "__init__"
            if order.index(imported) >= at:
                upward.append(f"{wing}.{importer.stem} imports {imported}")
    assert not upward


def test_no_module_is_longer_than_a_reader_holds() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in _modules()}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_no_function_takes_more_than_a_reader_holds() -> None:
    """Unless its docstring says why."""
    unexplained = []
    for path in _modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]} - {"self", "cls"}
                if len(names) > MAX_PARAMETERS and "parameters" not in (ast.get_docstring(node) or ""):
                    unexplained.append(f"{path.relative_to(PACKAGE)}: {node.name}")
    assert not unexplained


@pytest.mark.parametrize("unit", MAY_IMPORT)
def test_the_mathematics_stands_alone(unit: str) -> None:
    assert {names[0] for importer, names in _edges() if _wing(importer) == unit} - {unit} <= MAY_IMPORT[unit]


def test_sharding_knows_no_engine() -> None:
    imported = {names[0] for importer, names in _edges() if _wing(importer) == "sharding"}
    assert not {"engines", "schemes", "gradients"} & imported


def test_only_sharding_imports_deepspeed() -> None:
    importers = {path for path in _modules() if any(name.partition(".")[0] == "deepspeed" for name in _imports(path))}
    assert importers, "the check reads no imports"
    assert {_wing(path) for path in importers} == {"sharding"}


def test_every_module_imports_without_the_optional_packages() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in _modules()]
    program = f"""
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Refuse())
for module in {modules!r}:
    importlib.import_module(module.removesuffix(".__init__"))
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)
