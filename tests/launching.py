"""Commands as processes, with a time limit; none of them, nor what they started, is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
INIT = str(ROOT / "launch" / "init.py")
WITHOUT_PLOTS = ROOT / "tests" / "without"
"""What a fresh interpreter is given to find no matplotlib."""


@dataclass(frozen=True)
class Finished:
    """One process, ended. A code below zero is the signal that killed it."""

    code: int
    stdout: str
    stderr: str
    value: Any = None
    """What a function that a rank called has returned."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(command: Sequence[str], *, timeout_seconds: float = 120, env: Mapping[str, str] | None = None) -> Finished:
    """Run one command, a launcher with all its ranks for instance, as a process group of its own."""
    return run_together([command], [env or {}], timeout_seconds=timeout_seconds)[0]


def run_together(
    commands: Sequence[Sequence[str]], envs: Sequence[Mapping[str, str]], *, timeout_seconds: float = 120
) -> list[Finished]:
    """Run several commands at once, each with its own variables; results in their order."""
    return collect(start_together(commands, envs), timeout_seconds)


def start_together(commands: Sequence[Sequence[str]], envs: Sequence[Mapping[str, str]]) -> list[subprocess.Popen[str]]:
    """The processes of `run_together`, for a test that does something to them; `collect` in any case."""
    return [
        subprocess.Popen(
            list(command),
            env=environment() | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for command, env in zip(commands, envs, strict=True)
    ]


def collect(processes: list[subprocess.Popen[str]], timeout_seconds: float) -> list[Finished]:
    """Wait for the processes, so long at most for all; whatever happens, none of their groups is left."""
    deadline, results = time.monotonic() + timeout_seconds, []
    try:
        for process in processes:
            try:
                stdout, stderr = process.communicate(timeout=max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                kill_group(process.pid)
                stdout, stderr = process.communicate()
                stderr += f"\n[killed by the test after {timeout_seconds} s]"
            results.append(Finished(process.returncode, stdout, stderr))
    finally:
        for process in processes:
            kill_group(process.pid)
    return results


def succeed(results: Finished | Sequence[Finished]) -> None:
    """Fail the test with all processes' own words unless every one ended well."""
    results = [results] if isinstance(results, Finished) else results
    if any(result.code for result in results):
        words = [f"process {i} ended with {it.code}\n{it.stdout}\n{it.stderr}" for i, it in enumerate(results)]
        raise AssertionError("\n".join(words))


def environment() -> dict[str, str]:
    """This process's variables, with the project and the tests' helpers to be imported; without matplotlib if this has
    none."""
    places = [ROOT, ROOT / "tests", *([WITHOUT_PLOTS] if sys.modules.get("matplotlib", True) is None else [])]
    path = os.pathsep.join([*map(str, places), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
