"""What the documents say of the code, its files and its figures holds."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import pytest
from launching import ROOT
from test_import_floors import FLOORS

from loraga_dist.commands.recipe import MEANINGS
from loraga_dist.schemes import SCHEMES, times_full_rate

RSLORA = 16 / math.sqrt(8)
"""s of the methods that are measured with rsLoRA."""
BENCHMARKS = ROOT / "docs" / "BENCHMARKS.md"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _rows(document: Path, section: str = "") -> list[list[str]]:
    """Cells of its tables, or of one section's, without emphasis."""
    text = document.read_text()
    if section:
        text = text.partition(f"{section}\n")[2].partition("\n## ")[0]
    lines = text.splitlines()
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
    measured = {row[0]: row for row in _rows(BENCHMARKS)}
    _, _, *table = _rows(ROOT / "README.md")[:6]
    for row, way in zip(table, ("sketch", "rrr", "peft", "exact"), strict=True):
        _, _, over_floor, over_peft, extra_mib, share = measured[way]
        assert row[1:] == [over_floor, over_peft, extra_mib, share]
    cosines = {row[0]: row[1].split()[0] for row in _rows(BENCHMARKS, "## Convergence") if len(row) == 4}
    words = " ".join((ROOT / "README.md").read_text().split())
    assert f"is {cosines['LoRA-GA, exact']}, plain LoRA's {cosines['LoRA']};" in words


def _best_rates() -> dict[str, list[float]]:
    """By method, over full fine-tuning's: on `help` and on `headers`."""
    rows = [row for row in _rows(BENCHMARKS, "## Convergence") if len(row) == 9 and re.fullmatch(r"0\.\d+", row[2])]
    second_begins = [name for name, *_ in rows].index("full fine-tuning", 1)
    halves = rows[:second_begins], rows[second_begins:]
    first, second = ({name: float(rate) for name, _, rate, *_ in half} for half in halves)
    full = [half["full fine-tuning"] for half in (first, second)]
    return {
        name: [round(first[name] / full[0], 4), round(second[name] / full[1], 4)] for name in first if name in second
    }


def test_learning_rates_are_the_benchmarks() -> None:
    best = _best_rates()
    table = [row for row in _rows(ROOT / "docs" / "TRAINING.md") if len(row) == 4 and row[0] in best]
    assert len(table) == 8
    for name, _, *rates in table:
        assert [float(rate) for rate in rates] == best[name], name

    advised = {
        "LoRA-GA, exact": times_full_rate(SCHEMES["lora_ga"], "stable", 16.0, RSLORA),
        "LoRA-GA, exact, γ = 64": times_full_rate(SCHEMES["lora_ga"], "stable", 64.0, RSLORA),
        "LoRA-One": times_full_rate(SCHEMES["lora_one"], "stable", 128.0, RSLORA),
        "RRR": times_full_rate(SCHEMES["rrr"], "stable", 1.0, RSLORA),
        "RRR with a step": times_full_rate(SCHEMES["rrr_step"], "stable", 1.0, RSLORA),
        "PiSSA": times_full_rate(SCHEMES["pissa"], "stable", 1.0, 2.0),
        "LoRA": times_full_rate(SCHEMES["kaiming"], "stable", 1.0, 2.0),
    }
    assert advised == {name: pytest.approx(min(best[name])) for name in advised}
    # the next of the rates that were tried, which are powers of two
    assert math.log2(times_full_rate(SCHEMES["kaiming"], "stable", 1.0, RSLORA)) == pytest.approx(2, abs=0.51)
    assert times_full_rate(SCHEMES["olora"], "stable", 1.0, 2.0) is None


def test_readme_counts_the_models_that_the_document_does() -> None:
    rows = re.findall(r"^\| \D+ \|" + r" (\d+) \|" * 6 + "$", (ROOT / "docs" / "MODELS.md").read_text(), re.MULTILINE)
    assert len(rows) == 4
    counted, works, with_line, *_ = (sum(map(int, column)) for column in zip(*rows, strict=True))
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"of the {counted} architectures in transformers that could be tried, {works + with_line} work" in readme
    assert f"work, {with_line} of them with a line" in readme
