"""What the documents say of the code, its files and its figures holds."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from launching import ROOT
from test_import_floors import FLOORS

from loraga_dist.commands.recipe import MEANINGS

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _rows(document: Path) -> list[list[str]]:
    """Cells of its tables, without emphasis."""
    lines = document.read_text().splitlines()
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_every_key_is_in_the_reference() -> None:
    reference = runpy.run_path(str(ROOT / "docs" / "config_reference.py"))["reference"]
    text = (ROOT / "docs" / "CONFIG.md").read_text()
    assert reference() == text, "run python docs/config_reference.py > docs/CONFIG.md"
    assert not [key for key in MEANINGS if f"| `{key}` |" not in text]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            place = document.parent / path if path else document
            assert place.exists(), link
            assert not anchor or anchor in _anchors(place), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_files_that_are_named_are_there(document: Path) -> None:
    """Paths from the repository's root, or from the package's."""
    named = set(re.findall(r"`([\w.-]+/[\w./-]+\.\w+)`", document.read_text()))
    assert not [name for name in named if not ((ROOT / name).is_file() or (ROOT / "loraga_dist" / name).is_file())]


def test_the_drawing_has_every_wing_on_its_floor() -> None:
    *_, drawing = re.findall(r"```mermaid\n(.*?)```", (ROOT / "docs" / "ARCHITECTURE.md").read_text(), re.DOTALL)
    floors = [set(re.findall(r"^ +(\w+)\[", floor, re.MULTILINE)) for floor in drawing.split("subgraph")[1:]]
    assert floors == FLOORS


def test_figures_in_the_readme_are_the_benchmarks() -> None:
    measured = {row[0]: row for row in _rows(ROOT / "docs" / "BENCHMARKS.md")}
    _, _, *table = _rows(ROOT / "README.md")[:5]
    for row, way in zip(table, ("sketch", "peft", "exact"), strict=True):
        _, _, over_floor, over_peft, _, extra_mib, share = measured[way]
        assert row[1:] == [over_floor, over_peft, extra_mib, share]
    cosines = {row[0]: row[1].split()[0] for row in _rows(ROOT / "docs" / "BENCHMARKS.md") if len(row) == 4}
    words = " ".join((ROOT / "README.md").read_text().split())
    assert f"is {cosines['LoRA-GA, exact']}, plain LoRA's {cosines['LoRA']};" in words
