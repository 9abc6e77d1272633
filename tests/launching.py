"""Start real ranks and real launchers, with a time limit, and leave none of their processes behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ranks import Rank

ROOT = Path(__file__).parent.parent
INIT = str(ROOT / "launch" / "init.py")


@dataclass(frozen=True)
class Finished:
    """One process, ended. A code below zero is the signal that killed it."""

    code: int
    stdout: str
    stderr: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(command: Sequence[str], *, timeout_seconds: float = 120, env: Mapping[str, str] | None = None) -> Finished:
    """Run one command, a launcher with all its ranks for instance, as a process group of its own."""
    return collect([_start(command, env or {})], timeout_seconds)[0]


def run_together(
    commands: Sequence[Sequence[str]], envs: Sequence[Mapping[str, str]], *, timeout_seconds: float = 120
) -> list[Finished]:
    """Run several commands at once, each with its own variables; results in their order."""
    return collect(start_together(commands, envs), timeout_seconds)


def start_together(commands: Sequence[Sequence[str]], envs: Sequence[Mapping[str, str]]) -> list[subprocess.Popen[str]]:
    """The processes of `run_together`, for a test that does something to them; `collect` in any case."""
    return [_start(command, env) for command, env in zip(commands, envs, strict=True)]


def run_ranks(
    arguments: Sequence[str], world_size: int, *, timeout_seconds: float = 120, env: Mapping[str, str] | None = None
) -> list[Finished]:
    """Run `python arguments` once per rank, with the variables a launcher would set; results in rank order.

    No launcher stands between, so every rank's own exit code and output can be seen.
    """
    return collect_ranks(start_ranks(arguments, world_size, env=env), timeout_seconds)


def start_ranks(arguments: Sequence[str], world_size: int, *, env: Mapping[str, str] | None = None) -> list[Rank]:
    """The processes of `run_ranks`, for a test that does something to them; `collect_ranks` in any case."""
    words = Path(tempfile.mkdtemp(prefix="ranks-"))
    launched = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        Rank(
            arguments,
            {**_environment(), "RANK": str(rank), "LOCAL_RANK": str(rank), **launched, **(env or {})},
            words / f"{rank}.out",
        )
        for rank in range(world_size)
    ]


def collect_ranks(ranks: Sequence[Rank], timeout_seconds: float) -> list[Finished]:
    """Wait for the ranks, each so long at most; whatever happens, none of their groups is left."""
    results = []
    try:
        for rank in ranks:
            code = rank.wait(timeout_seconds)
            _kill_group(rank.pid)
            stdout, stderr = rank.said()
            if code is None:
                code = -signal.SIGKILL
                stderr += f"\n[killed by the test after {timeout_seconds} s]"
            results.append(Finished(code, stdout, stderr))
    finally:
        for rank in ranks:
            _kill_group(rank.pid)
    return results


def succeed(results: Finished | Sequence[Finished]) -> None:
    """Fail the test with the processes' own words unless all ended well."""
    for rank, result in enumerate([results] if isinstance(results, Finished) else results):
        assert result.code == 0, f"process {rank} ended with {result.code}\n{result.stdout}\n{result.stderr}"


def collect(processes: list[subprocess.Popen[str]], timeout_seconds: float) -> list[Finished]:
    """Wait for the processes, each so long at most; whatever happens, none of their groups is left."""
    results = []
    try:
        for process in processes:
            try:
                stdout, stderr = process.communicate(timeout=timeout_seconds)
            except subprocess.TimeoutExpired:
                _kill_group(process.pid)
                stdout, stderr = process.communicate()
                stderr += f"\n[killed by the test after {timeout_seconds} s]"
            results.append(Finished(process.returncode, stdout, stderr))
    finally:
        for process in processes:
            _kill_group(process.pid)
    return results


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def _start(command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(command),
        env={**_environment(), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
