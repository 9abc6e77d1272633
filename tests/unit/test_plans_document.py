"""docs/PLANS.md is what benchmarks/plans.py prints now."""

from __future__ import annotations

import pytest
from launching import ROOT, succeed
from ranks import run_script


@pytest.mark.timeout(600)
def test_plans_are_up_to_date() -> None:
    (result,) = run_script([str(ROOT / "benchmarks" / "plans.py")], 1, timeout_seconds=550)
    succeed(result)
    assert result.stdout == (ROOT / "docs" / "PLANS.md").read_text(), "run python benchmarks/plans.py > docs/PLANS.md"
