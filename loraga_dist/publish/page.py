"""report.html: what loraga_report.json says, to look at rather than to read."""

from __future__ import annotations

from pathlib import Path

from loraga_dist.artifacts.names import PLOTS, REPORT_PAGE
from loraga_dist.artifacts.report import Report
from loraga_dist.files.disk import naming_write_errors
from loraga_dist.publish.plots import draw
from loraga_dist.publish.rendering import render


def write_report_page(directory: Path, report: Report) -> None:
    """Write report.html, whole in one file, and plots/*.png; without matplotlib only the page, which then says so.

    Raises RunError when a file cannot be written.
    """
    with naming_write_errors(directory, "write: "):
        page = render("report.html.j2", report=report, drawings=draw(report, directory / PLOTS))
        (directory / REPORT_PAGE).write_text(page, encoding="utf-8")
