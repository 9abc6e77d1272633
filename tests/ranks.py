"""Functions of a test module, or a script, on several ranks: started without a launcher, with a time limit.

Ranks are forked from a server that has imported what every rank imports, which costs seconds each time. The server is
`multiprocessing`'s: it has read no model, started no thread of its own and joined no group. Launchers' tests do without
it; there each rank is a fresh interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from launching import Finished, environment, free_port, kill_group, succeed

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([
    "torch", "transformers", "peft", "deepspeed", "datasets", "trl", "pytest", "loraga_dist.cli",
    "loraga_dist.run.pipeline", "loraga_dist.ranks.watch", "loraga_dist.artifacts.verify",
    # what the above import only when they are used
    "torch.distributed.nn.functional", "datasets.packaged_modules.json.json", "pyarrow.json", "trl.data_utils",
    "trl.chat_template_utils", *(f"transformers.models.{kind}.modeling_{kind}" for kind in ("llama", "gpt2", "t5")),
])  # fmt: skip


def run_on_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout_seconds: float = 120,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call a function once per rank; what it returned, in rank order.

    function: a module's, which each rank imports by its name; `World.start()` in it joins the others. Arguments and
    results are pickled. Fails the test with every rank's traceback and words unless all have returned.
    """
    results = finish_on_ranks(function, world_size, *arguments, timeout_seconds=timeout_seconds, env=env)
    succeed(results)
    return [result.value for result in results]


def finish_on_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout_seconds: float = 120,
    env: Mapping[str, str] | None = None,
) -> list[Finished]:
    """The same, for a test of how ranks end and of what they say: an exit code of 1 is an exception."""
    with started_on_ranks(function, world_size, *arguments, env=env) as ranks:
        return finish(ranks, timeout_seconds)


def run_script(
    arguments: Sequence[str], world_size: int, *, timeout_seconds: float = 120, env: Mapping[str, str] | None = None
) -> list[Finished]:
    """`python arguments` once per rank; results in rank order."""
    return finish_on_ranks(be_script, world_size, arguments, timeout_seconds=timeout_seconds, env=env)


class Rank:
    """A process, and group of processes, that calls a pickled function; its words and result go to files."""

    def __init__(self, call: bytes, env: Mapping[str, str], files: Path) -> None:
        self._files = files
        self._process = _FORKS.Process(target=_be_rank, args=(call, dict(env), files))
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

    def kill(self) -> None:
        self._process.kill()  # before it leads a group
        kill_group(self.pid)
        self._process.join()

    def finished(self) -> Finished:
        """Of a process that has ended."""
        code = self._process.exitcode
        assert code is not None, "it goes on"
        stdout, stderr = (_read(self._files.with_suffix(suffix)).decode() for suffix in (".out", ".err"))
        value = _read(self._files.with_suffix(".value"))
        return Finished(code, stdout, stderr, pickle.loads(value) if value and code == 0 else None)


@contextmanager
def started_on_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, env: Mapping[str, str] | None = None
) -> Iterator[list[Rank]]:
    """The processes of `run_on_ranks`, for a test that does something to them; none is left when the block is."""
    call = pickle.dumps((function, arguments))
    place = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks: list[Rank] = []
    with TemporaryDirectory(prefix="ranks-") as directory:
        try:
            for rank in range(world_size):
                variables = environment() | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict(env or {})
                ranks.append(Rank(call, variables, Path(directory) / str(rank)))
            yield ranks
        finally:
            for rank in ranks:
                rank.kill()


def finish(ranks: Sequence[Rank], timeout_seconds: float) -> list[Finished]:
    """Wait for the ranks, so long at most for all; then kill them and what they started."""
    deadline = time.monotonic() + timeout_seconds
    codes = [rank.wait(max(0, deadline - time.monotonic())) for rank in ranks]
    for rank in ranks:
        rank.kill()
    results = [rank.finished() for rank in ranks]
    late = f"\n[killed by the test after {timeout_seconds} s]"
    return [
        Finished(it.code, it.stdout, it.stderr + (late if code is None else ""), it.value)
        for it, code in zip(results, codes, strict=True)
    ]


def be_script(arguments: Sequence[str]) -> None:
    """What `python arguments` does, for `started_on_ranks`."""
    sys.argv = list(arguments)
    sys.path[0] = str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


def _be_rank(call: bytes, env: dict[str, str], files: Path) -> None:
    os.setsid()
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(files.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(env)
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # as in tests that are not marked `plots`
    code = 0
    try:
        function, arguments = pickle.loads(call)  # which imports the module, now that variables and words are right
        value = function(*arguments)
        _meet_the_others()
        files.with_suffix(".value").write_bytes(pickle.dumps(value))
    except SystemExit as left:
        code = left.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as launch/init.py leaves: gloo's threads may outlive the interpreter's own teardown


def _meet_the_others() -> None:
    """Whoever leaves early takes the connections of those that still work with it."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
