"""How many faults a run of the tests injects, and what became of them."""

from __future__ import annotations

import math
from collections import Counter

import pytest

KILLS_PER_RUN = 5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        num_kills = metafunc.config.option.kills
        metafunc.parametrize("seed", range(math.ceil(num_kills / KILLS_PER_RUN)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was killed when, of the runs that completed with the right result."""
    reports = terminalreporter.getreports("passed")
    kills = [value for report in reports for name, value in report.user_properties if name == "kill"]
    if not kills:
        return
    terminalreporter.section("kills after which the same command completed")
    for aspect in ("phase", "engine", "chunks", "ranks", "killed"):
        counts = Counter(kill[aspect] for kill in kills)
        terminalreporter.line(f"{aspect}: " + ", ".join(f"{word} {count}" for word, count in sorted(counts.items())))
    terminalreporter.line(f"in all {len(kills)}")
