"""A plan as tables and lines, for a terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table

from loraga_dist.errors import printable
from loraga_dist.forecast.memory import RankMemory
from loraga_dist.forecast.report import PlanReport

_GIB = 2**30
_SECONDS_UNTIL_MINUTES = 120
_LABEL = 16
"""Columns of the names of the text's lines."""
_LEAST_LABEL = 12
"""Of a table's rows, where columns are many."""
_LEAST_COLUMNS = 80


def print_plan(report: PlanReport) -> None:
    request = report.forecaster.request
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "gib": _gib,
        "spread": _spread,
        "duration": _duration,
        "time": _time,
        "way_taken": _way_taken,
    }
    lines = environment.get_template("plan.txt.j2")
    # 110 where there is no terminal
    width = max(_LEAST_COLUMNS, shutil.get_terminal_size((110, 24)).columns)
    console = Console(highlight=False, markup=False, width=width)
    console.print(_targets_table(report))
    console.print(_memory_table(report.memory))
    text = lines.render(report=report, base=request.base, shape=request.shape)
    for line in text.splitlines():
        indent = " " * (4 if line.startswith(" ") else _LABEL)
        print(textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))


def plan_line(report: PlanReport) -> str:
    """What calibration does, which way, and how long it takes."""
    sweeps = f" in each of {report.num_sweeps} sweeps" if report.num_sweeps > 1 else ""
    time = "" if report.seconds is None else f", {_duration(report.seconds)} of arithmetic"
    return f"{report.microbatches_per_rank} microbatches per rank{sweeps}{time}; {_way_taken(report)}"


def _way_taken(report: PlanReport) -> str:
    """With what is kept between blocks, and where."""
    if report.plan.order.blocks is None or not report.plan.groups:
        return report.way.title
    course, directory = report.course, report.way.keeping.directory
    together = f"{course.chunk} microbatches together" if course.chunk > 1 else "one microbatch at a time"
    if course.num_chunks == 1:
        together = "all together" if course.num_first_chunks == 1 else "those between two looks together"
    where = "memory" if directory is None else str(directory)
    return f"{report.way.title}, {together}: {_gib(report.kept_bytes)} GiB of inputs of blocks in {where}"


def _targets_table(report: PlanReport) -> Table:
    model = report.forecaster.config.model.name_or_path
    num_ranks = report.forecaster.world_size
    device = ("CPU" if report.forecaster.on_host else "GPU") + ("s" if num_ranks > 1 else "")
    table = Table(title=f"{report.plan.scheme.title} plan of {printable(model)} on {num_ranks} {device}")
    for column in ("module", "targets", "M x N", "r", "engine", "K", "state MiB each"):
        table.add_column(column, justify="left" if column in ("module", "engine") else "right")
    for kind, count in report.kinds.items():
        shape, state = f"{kind.M} x {kind.N}", f"{kind.state_bytes_each / 2**20:.1f}"
        table.add_row(
            printable(kind.module), str(count), shape, str(kind.r), kind.engine or "-", str(kind.width or "-"), state
        )
    return table


def _memory_table(memory: RankMemory) -> Table:
    """A column for each phase, which are fewer than what is held in them."""
    table = Table(title="GiB on the rank that needs most", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("in phase", min_width=_LEAST_LABEL)
    for phase in memory.device:
        table.add_column(phase, justify="right", no_wrap=True)
    for side, phases in (("", memory.device), ("host: ", memory.host)):
        for part in dict.fromkeys(part for parts in phases.values() for part in parts):
            values = [phases.get(phase, {}).get(part) for phase in memory.device]
            table.add_row(side + part, *("" if value is None else f"{value / _GIB:.2f}" for value in values))
    table.add_row("sum", *(f"{sum(parts.values()) / _GIB:.2f}" for parts in memory.device.values()))
    return table


def _spread(numbers: Iterable[int]) -> str:
    numbers = list(numbers)
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.1f}" if num_bytes >= _GIB else f"{num_bytes / _GIB:.3f}"


def _duration(seconds: Mapping[str, float]) -> str:
    """From the least to the most."""
    least, most = seconds["at_least"], seconds["at_most"]
    if most < _SECONDS_UNTIL_MINUTES:
        return f"{least:.2g} to {most:.2g} seconds"
    return f"{least / 60:.1f} to {most / 60:.1f} minutes"


def _time(seconds: float) -> str:
    return f"{seconds:.2g} seconds" if seconds < _SECONDS_UNTIL_MINUTES else f"{seconds / 60:.1f} minutes"
