"""How a command runs, alone or as one of several ranks: what it raises becomes one line and an exit code.

A library call inside somebody's training script takes `World.current()`: it joins, watches and leaves nothing, and its
caller gets the error.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from loraga_dist.errors import LoragaError, RunError

if TYPE_CHECKING:  # they import torch, which reads variables that are set below
    from loraga_dist.ranks.watch import Watch
    from loraga_dist.ranks.world import World

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send some time before they kill."""


class StopRequest:
    """Whether a scheduler has asked this process to stop; listens while the context lasts, in the main thread."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self.listen_no_more()

    def listen_no_more(self) -> None:
        """Signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name


def run_alone(work: Callable[[], object]) -> int:
    """Run `work` in this process only and return its exit code."""
    prepare_libraries()
    with _interruptible():
        try:
            work()
        except Exception as error:
            return report_failure(error)
    return 0


def run_as_rank(work: Callable[[World, StopRequest], object]) -> int:
    """Run `work` as one of the ranks that a launcher started and return this rank's exit code.

    1. Build: listen to the scheduler, join the launcher's process group, watch the other ranks.
    2. Try: `work(world, stop)`. What all ranks raise rank 0 says; what one rank alone meets ends all through the watch.
    3. Close: ranks leave the watch and the process group together.
    4. Leave: the caller passes the exit code to `leave_process`, or to its own caller.
    """
    prepare_libraries()
    from loraga_dist.ranks.watch import Watch
    from loraga_dist.ranks.world import World

    with StopRequest() as stop, _interruptible():
        try:
            world = World.start()
            watch = Watch(world) if world.size > 1 else None
        except Exception as error:
            return report_failure(error)
        exit_code = 0
        try:
            work(world, stop)
        except Exception as error:
            if watch is not None and not getattr(error, "on_all_ranks", False):
                _end_all(watch, error)
            exit_code = report_failure(error, say=world.is_main)
        if watch is not None:
            _leave_together(world, watch)
        return exit_code


def leave_process(exit_code: int) -> NoReturn:
    """End this process without the interpreter's own teardown.

    DeepSpeed keeps the process group, so gloo's threads are still there when a rank exits, and now and then abort it
    (SIGABRT) after all its work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def report_failure(error: Exception, *, say: bool = True) -> int:
    """Say in one line what failed, after the traceback of an error that is not ours, and return the exit code."""
    if not isinstance(error, LoragaError):
        traceback.print_exception(error)
        error = RunError(f"{type(error).__name__}: {error}")
    if say:
        for line in (str(error), *getattr(error, "__notes__", ())):
            print(f"loraga-dist: {line}", file=sys.stderr, flush=True)
    return error.exit_code


def prepare_libraries() -> None:
    """Set what torch, transformers and DeepSpeed read when they are imported, unless the user has."""
    # threads that spin while they wait slow down every rank on the same cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls torch's collectives by their old names
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("loraga-dist: interrupted", file=sys.stderr, flush=True)
        leave_process(130)


def _end_all(watch: Watch, error: Exception) -> NoReturn:
    """End every rank for an error that this one met alone: the others may wait for it in a collective."""
    if isinstance(error, LoragaError):
        watch.fail(f"failed: {error}", error.exit_code, perhaps_of_another=False)
    # what a collective says when another rank has gone is a RuntimeError
    of_another = isinstance(error, RuntimeError)
    if not of_another:
        traceback.print_exception(error)
    watch.fail(f"failed: {type(error).__name__}: {error}", 3, perhaps_of_another=of_another)


def _leave_together(world: World, watch: Watch) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # a rank that exits early would have the launcher kill the one that is still printing
    try:
        world.barrier()
    except RuntimeError as error:
        watch.fail(f"failed: {error}", 3, perhaps_of_another=True)
    watch.stop()
    # rank 0 serves the others' watches; whoever is gone by now had done its work
    with suppress(RuntimeError):
        world.barrier()
    world.stop()
