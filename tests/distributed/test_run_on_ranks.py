"""What the other tests here rest on: a rank that fails or hangs fails the test, and leaves no process."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from ranks import finish_on_ranks, run_on_ranks

from loraga_dist.ranks.world import World


def sum_of_ranks(mine: list[float]) -> tuple[int, torch.Tensor]:
    world = World.start()
    return world.rank, world.sum_(torch.tensor(mine) + world.rank)


def fail_on_rank_1() -> None:
    world = World.start()
    if world.rank == 1:
        raise ValueError("of rank 1")


def hang(pids: Path) -> None:
    child = subprocess.Popen(["sleep", "600"])
    (pids / os.environ["RANK"]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def test_results_come_in_rank_order() -> None:
    for rank, (number, total) in enumerate(run_on_ranks(sum_of_ranks, 3, [1.0, 2.0])):
        assert number == rank and total.tolist() == [6, 9]


def test_an_exception_fails_the_test_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"(?s)process 1 ended with 1.*in fail_on_rank_1\n.*ValueError: of rank 1"):
        run_on_ranks(fail_on_rank_1, 2)


def test_a_hanging_group_is_killed_with_what_it_started(tmp_path: Path) -> None:
    results = finish_on_ranks(hang, 2, tmp_path, timeout_seconds=5)
    assert [result.code for result in results] == [-9, -9]
    assert all("killed by the test after 5 s" in result.stderr for result in results)
    pids = [int(pid) for path in tmp_path.iterdir() for pid in path.read_text().split()]
    assert len(pids) == 4 and not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
