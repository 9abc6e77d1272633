"""How a command runs, alone or as one of several ranks: what it raises becomes one line and an exit code.

A library call inside somebody's training script takes `World.current()`: it joins, watches and leaves nothing, and its
caller gets the error.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

from loraga_dist.errors import LoragaError, RunError, unforeseen
from loraga_dist.ranks.launcher import has_launcher
from loraga_dist.ranks.stop import INTERRUPTED, StopRequest, say_interrupted
from loraga_dist.ranks.words import forgiving_streams, leave_process, say_why

if TYPE_CHECKING:  # they import torch, which reads variables that are set below
    from loraga_dist.ranks.watch import Watch
    from loraga_dist.ranks.world import World


def run_alone(work: Callable[[], object]) -> int:
    """Run `work` in this process only and return its exit code."""
    prepare_libraries()
    with forgiving_streams(), _interruptible():
        try:
            work()
        except Exception as error:
            return report_failure(error)
    return 0


def run_as_rank(work: Callable[[World, StopRequest], object]) -> int:
    """Run `work` as one of the ranks that a launcher started and return this rank's exit code.

    1. Build: listen to the scheduler, join the launcher's process group, watch the other ranks and the launcher.
    2. Try: `work(world, stop)`. What all ranks raise rank 0 says; what one rank alone meets ends all through the watch.
    3. Close: ranks leave the watch and the process group together.
    4. Leave: the caller passes the exit code to `leave_process`, or to its own caller.
    """
    prepare_libraries()
    with forgiving_streams(), StopRequest() as stop, _interruptible():
        try:
            if has_launcher(os.environ):
                stop.watch_launcher()
            from loraga_dist.ranks.watch import Watch
            from loraga_dist.ranks.world import World

            world = World.start()
            watch = Watch(world) if world.size > 1 else None
        except Exception as error:
            return report_failure(error)
        if watch is not None:
            # a launcher stops all ranks when one is gone, which then is what has to be said
            stop.end_all = lambda why, exit_code: watch.fail(why, exit_code, perhaps_of_another=True)
        exit_code = 0
        try:
            work(world, stop)
        except Exception as error:
            if watch is not None and not getattr(error, "on_all_ranks", False):
                _end_all(watch, error)
            exit_code = report_failure(error, say=world.is_main)
        stop.hold()  # a launcher stops all ranks when the first has left
        if watch is not None:
            _leave_together(world, watch)
        return exit_code


def report_failure(error: Exception, *, say: bool = True) -> int:
    """Say in one line what failed and return the exit code."""
    if not isinstance(error, LoragaError):
        error = RunError(unforeseen(error))
    if say:
        say_why(str(error), *getattr(error, "__notes__", ()))
    return error.exit_code


def prepare_libraries() -> None:
    """Set what torch, transformers and DeepSpeed read when they are imported, unless the user has."""
    # threads that spin while they wait slow down every rank on the same cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # compiled for every length of sequence, and kept; one microbatch of a model without experts has about 20
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # for those who write libraries: DeepSpeed's old names of collectives, a user's odd regular expression
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        say_interrupted(str(error))
        leave_process(INTERRUPTED)


def _end_all(watch: Watch, error: Exception) -> NoReturn:
    """End every rank for an error that this one met alone: the others may wait for it in a collective."""
    if isinstance(error, LoragaError):
        watch.fail(f"failed: {error}", error.exit_code, perhaps_of_another=False)
    # what a collective says when another rank has gone is a RuntimeError
    is_collective = isinstance(error, RuntimeError)
    watch.fail(f"failed: {unforeseen(error)}", RunError.exit_code, perhaps_of_another=is_collective)


def _leave_together(world: World, watch: Watch) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # a rank that exits early would have the launcher kill the one that is still printing
    try:
        world.barrier()
    except RuntimeError as error:
        watch.fail(f"failed: {error}", RunError.exit_code, perhaps_of_another=True)
    watch.stop()
    # rank 0 serves the others' watches; whoever is gone by now had done its work
    with suppress(RuntimeError):
        world.barrier()
    world.stop()
