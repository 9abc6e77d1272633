"""report.html: what loraga_report.json says, to look at rather than to read."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from loraga_dist.artifacts.names import PLOTS, REPORT_PAGE
from loraga_dist.artifacts.report import Report, TargetReport
from loraga_dist.config import CalibrationConfig
from loraga_dist.files.disk import naming_write_errors
from loraga_dist.publish.plots import draw
from loraga_dist.publish.rendering import DASH, render


def write_report_page(directory: Path, report: Report) -> None:
    """Write report.html, whole in one file, and plots/*.png; without matplotlib only the page, which then says so.

    Raises RunError when a file cannot be written.
    """
    with naming_write_errors(directory, "write: "):
        engines = Counter(target.engine for target in report.targets.values() if target.engine is not None)
        page = render(
            "report.html.j2",
            report=report,
            drawings=draw(report, directory / PLOTS),
            rows=_rows(report),
            engines=", ".join(f"{number} {engine}" for engine, number in engines.items()),
            data=_data(report.config.calibration),
            versions=", ".join(f"{package} {version}" for package, version in report.versions.items()),
            dash=DASH,
        )
        (directory / REPORT_PAGE).write_text(page, encoding="utf-8")


def _rows(report: Report) -> list[tuple[str, TargetReport, int]]:
    """Name, target, and of how many it is the worst: thousands of experts are a row for each stack."""
    rows: dict[str, tuple[str, TargetReport, int]] = {}
    for name, target in sorted(report.targets.items(), key=lambda row: _goodness(row[1])):
        place = name if target.stack is None else target.stack.parameter
        worst_name, worst, count = rows.get(place, (name, target, 0))
        rows[place] = worst_name, worst, count + 1
    return [*rows.values()]


def _goodness(target: TargetReport) -> tuple[float, float]:
    """What the table is sorted by at first: captured energy, and where no gradient says it, how small the offset is."""
    energy, offset = target.captured_energy, target.offset_ratio
    return (math.inf if energy is None else energy, math.inf if offset is None else -offset)


def _data(calibration: CalibrationConfig) -> str:
    files = [calibration.data_files] if isinstance(calibration.data_files, str) else calibration.data_files or []
    named = [calibration.dataset_name, calibration.dataset_config, *files, calibration.split]
    return ", ".join(name for name in named if name)
