"""A request to stop is heard before the work has begun, wherever a rank waits; later the work looks at it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from launching import environment, free_port, kill_group
from ranks import finish, started_on_ranks

from loraga_dist.ranks.session import run_as_rank
from loraga_dist.ranks.stop import StopRequest
from loraga_dist.ranks.words import leave_process
from loraga_dist.ranks.world import World

INTERRUPTED = "loraga-dist: interrupted; the same command goes on from the last checkpoint, if there was one\n"
BEFORE = "before its work began; start the same command again"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("waits_for", ["another rank", "a port that says nothing"])
def test_while_ranks_meet(waits_for: str, number: signal.Signals, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        rank, port = ("0", free_port()) if waits_for == "another rank" else ("1", mute.getsockname()[1])
        place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with started_on_ranks(meet_the_others, 1, str(tmp_path), env=place) as ranks:
            wait_for(tmp_path / rank)
            time.sleep(0.5)
            os.kill(ranks[0].pid, number)
            (result,) = finish(ranks, 30)
    if number == signal.SIGINT:
        assert (result.code, result.stderr) == (
            130,
            INTERRUPTED,
        )
    else:
        assert (result.code, result.stderr) == (143, f"loraga-dist: stopped by {number.name} {BEFORE}\n")


def meet_the_others(directory: str) -> None:
    (Path(directory) / os.environ["RANK"]).touch()
    leave_process(run_as_rank(lambda world, stop: None))


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} has not come"
        time.sleep(0.02)


def wait_for_another(directory: str, hold: bool) -> None:
    """On every rank: rank 0 waits in a collective for rank 1, which sleeps."""

    def work(world: World, stop: StopRequest) -> None:
        if hold:
            stop.hold()
        (Path(directory) / str(world.rank)).touch()
        if world.rank == 1:
            time.sleep(50)
        world.barrier()

    leave_process(run_as_rank(work))


@pytest.mark.parametrize("who", [0, 1])
def test_while_one_waits_for_another(who: int, tmp_path: Path) -> None:
    with started_on_ranks(wait_for_another, 2, str(tmp_path), False) as ranks:
        for rank in range(2):
            wait_for(tmp_path / str(rank))
        os.kill(ranks[who].pid, signal.SIGTERM)
        results = finish(ranks, 40)
    assert [result.code for result in results] == [143, 143], results
    assert [result.stderr for result in results] == [f"loraga-dist: rank {who} stopped by SIGTERM {BEFORE}\n", ""]


def test_ctrl_c_while_one_waits_for_another(tmp_path: Path) -> None:
    with started_on_ranks(wait_for_another, 2, str(tmp_path), True) as ranks:
        for rank in range(2):
            wait_for(tmp_path / str(rank))
        for rank in ranks:
            os.kill(rank.pid, signal.SIGINT)
        results = finish(ranks, 30)
    assert [(result.code, result.stderr) for result in results] == [
        (130, INTERRUPTED),
        (130, ""),
    ]


def test_a_dead_rank_is_named_although_its_launcher_stops_the_others(tmp_path: Path) -> None:
    with started_on_ranks(wait_for_another, 2, str(tmp_path), False) as ranks:
        for rank in range(2):
            wait_for(tmp_path / str(rank))
        os.kill(ranks[1].pid, signal.SIGKILL)
        os.kill(ranks[0].pid, signal.SIGTERM)
        results = finish(ranks, 40)
    assert results[0].code == 3 and results[0].stderr.startswith("loraga-dist: rank 1 is gone"), results[0]


def test_what_is_held_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def work(world: World, stop: StopRequest) -> None:
        stop.hold()
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.2)
        seen.append(stop.signal_name)

    assert run_as_rank(work) == 0
    assert seen == ["SIGHUP"] and capsys.readouterr() == ("", "")


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal_name is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# A launcher that a test kills: it starts one more process between itself and the rank, as deepspeed does, or none.
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.call(sys.argv[2:]))
"""
RANK = """
import pathlib, sys, time
from loraga_dist.ranks.session import run_as_rank
from loraga_dist.ranks.words import leave_process

def work(world, stop):
    stop.hold()
    pathlib.Path(sys.argv[1]).touch()
    for _ in range(300):
        if stop.signal_name:
            pathlib.Path(sys.argv[1]).write_text(stop.signal_name)
            return
        time.sleep(0.1)

leave_process(run_as_rank(work))
"""


@contextmanager
def launched(path: Path, names: list[str], variables: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Launchers of these names, one started by the other, and a rank under the last."""
    command = [sys.executable, "-c", RANK, str(path)]
    for name in reversed(names):
        command = [sys.executable, "-c", LAUNCHER, name, *command]
    process = subprocess.Popen(command, env=environment() | variables, start_new_session=True)
    try:
        wait_for(path)
        yield process
    finally:
        kill_group(process.pid)
        process.wait()


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x"}
DEEPSPEED = {"CROSS_SIZE": "1"}


@pytest.mark.parametrize(
    ("names", "variables"),
    [(["torchrun"], TORCHRUN), (["deepspeed", "deepspeed.launcher.launch"], DEEPSPEED)],
    ids=["torchrun", "deepspeed"],
)
def test_the_end_of_a_launcher_is_a_request_to_stop(
    names: list[str], variables: dict[str, str], tmp_path: Path
) -> None:
    with launched(tmp_path / "rank", names, variables) as launcher:
        launcher.kill()
        deadline = time.monotonic() + 20
        while not (said := (tmp_path / "rank").read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert said == "the end of its launcher"


@pytest.mark.parametrize(
    ("names", "variables"), [(["bash"], {}), (["bash", "torchrun"], TORCHRUN)], ids=["by-hand", "of-torchrun"]
)
def test_the_end_of_a_shell_is_none(names: list[str], variables: dict[str, str], tmp_path: Path) -> None:
    with launched(tmp_path / "rank", names, variables) as shell:
        shell.kill()
        time.sleep(3)
        assert (tmp_path / "rank").read_text() == ""
