"""One rank fails, dies or freezes: the others end in seconds and name it."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from ranks import finish, finish_on_ranks, started_on_ranks

from loraga_dist.ranks.watch import Watch
from loraga_dist.ranks.world import World


def watch_the_others(how: str, who: int) -> None:
    """On every rank: rank `who` ends or freezes as `how` says while the rest wait for it."""
    world = World.start()
    watch = Watch(world, silent_beats=6)
    world.sum_(torch.ones(1))
    try:
        if world.rank == who:
            time.sleep(1.5)
            if how == "raise":
                raise ValueError("the first error")
            if how in ("SIGKILL", "SIGSTOP"):
                os.kill(os.getpid(), getattr(signal, how))
        world.broadcast_(torch.ones(1), who)  # a dead source fails all others at once
    except Exception as error:
        watch.fail(f"failed: {type(error).__name__}: {error}", 3, perhaps_of_another=isinstance(error, RuntimeError))
    watch.stop()


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("how", ["raise", "SIGKILL", "SIGSTOP"])
def test_the_others_end_and_name_it(how: str, who: int) -> None:
    with started_on_ranks(watch_the_others, 3, how, who) as ranks:
        codes = [rank.wait(40) for number, rank in enumerate(ranks) if number != who]
        results = finish(ranks, 20 if how == "raise" else 0)  # a frozen one ends only when it is killed
    assert codes == [3, 3], results
    said = "".join(result.stderr for result in results)
    assert f"loraga-dist: rank {who} " in said
    if how == "raise" or who != 0:
        assert said.count("loraga-dist:") == 1 and results[0].stderr, "once, and by rank 0"
    named = {line.split()[2] for line in said.splitlines() if line.startswith("loraga-dist: rank ")}
    assert named == {str(who)}, said
    if how == "raise":
        assert "the first error" in said and results[who].code == 3
    else:
        assert results[who].code == -signal.SIGKILL


def test_ranks_that_end_well_say_nothing() -> None:
    results = finish_on_ranks(watch_the_others, 3, "well", 0)
    assert [(result.code, result.stdout, result.stderr) for result in results] == [(0, "", "")] * 3
