"""How many wrong inputs a run of the tests tries, and what became of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" in metafunc.fixturenames:
        from kinds import KINDS

        chosen, num_cases = metafunc.config.getoption("--fuzz_case"), metafunc.config.getoption("--fuzz")
        shares = {kind: range(position, num_cases, len(KINDS)) for position, kind in enumerate(KINDS)}
        if chosen:
            kind, _, seed = chosen.rpartition(":")
            shares = {kind: range(int(seed), int(seed) + 1)}
        metafunc.parametrize(("kind", "seeds"), shares.items(), ids=list(shares))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Exit codes by kind, also of tests that ran in another process."""
    reports = [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]
    counts = {
        name: Counter(dict(value)) for report in reports for name, value in report.user_properties if "fuzz " in name
    }
    if counts:
        terminalreporter.section("wrong inputs by kind and exit code")
        for name, codes in counts.items():
            terminalreporter.write_line(f"{name}: " + ", ".join(f"{n} x {code}" for code, n in sorted(codes.items())))
        total = sum(counts.values(), Counter())
        terminalreporter.write_line(f"all {sum(total.values())}: {dict(sorted(total.items()))}")
