"""Ranks as processes forked from a server that has imported what every rank imports, which costs seconds each time.

The server is `multiprocessing`'s: it has read no model, started no thread of its own and joined no group. Launchers'
tests do without it; there each rank is a fresh interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["torch", "transformers", "peft", "deepspeed", "datasets", "trl", "loraga_dist.run.pipeline"]
)


class Rank:
    """`python arguments` in a process group of its own, with these variables; its words go to two files."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], words: Path) -> None:
        self._words = words, words.with_suffix(".err")
        self._process = _FORKS.Process(target=_be_rank, args=(list(arguments), dict(env), *map(str, self._words)))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "a started process has one"
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_seconds: float) -> int | None:
        """Its exit code, below zero for the signal that killed it, or None if it goes on longer than that."""
        self._process.join(timeout_seconds)
        return self._process.exitcode

    def said(self) -> tuple[str, str]:
        stdout, stderr = (path.read_text() if path.exists() else "" for path in self._words)
        return stdout, stderr


def _be_rank(arguments: list[str], env: dict[str, str], stdout: str, stderr: str) -> None:
    os.setsid()
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = arguments
    sys.modules["matplotlib"] = None  # as in tests that are not marked `plots`
    sys.path[0] = str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")
