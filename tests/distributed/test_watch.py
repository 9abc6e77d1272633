"""One rank fails, dies or freezes: the others end in seconds and name it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from launching import collect_ranks, run_ranks, start_ranks, succeed

WORKER = str(Path(__file__).with_name("watch_worker.py"))


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("how", ["raise", "SIGKILL", "SIGSTOP"])
def test_the_others_end_and_name_it(how: str, who: int) -> None:
    ranks = start_ranks([WORKER, how, str(who)], 3)
    try:
        codes = [rank.wait(40) for number, rank in enumerate(ranks) if number != who]
    finally:
        results = collect_ranks(ranks, 20 if how == "raise" else 0)  # a frozen one ends only when it is killed
    assert codes == [3, 3], results
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
