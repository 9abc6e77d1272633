"""One rank fails, dies or freezes: the others end in seconds and name it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from launching import run_ranks, succeed

WORKER = str(Path(__file__).with_name("watch_worker.py"))


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("how", ["raise", "SIGKILL", "SIGSTOP"])
def test_the_others_end_and_name_it(how: str, who: int) -> None:
    results = run_ranks([WORKER, how, str(who)], 3, timeout_seconds=20)
    others = [result for rank, result in enumerate(results) if rank != who]
    assert [result.code for result in others] == [3, 3], results
    said = "".join(result.stderr for result in results)
    assert f"loraga-dist: rank {who} " in said
    named = {line.split()[2] for line in said.splitlines() if line.startswith("loraga-dist: rank ")}
    assert named == {str(who)}, said
    if how == "raise":
        assert "the first error" in said and results[who].code == 3
    if how == "SIGKILL":
        assert results[who].code == -signal.SIGKILL


def test_ranks_that_end_well_say_nothing() -> None:
    results = run_ranks([WORKER, "well", "0"], 3)
    succeed(results)
    assert not any("loraga-dist" in result.stderr for result in results)
