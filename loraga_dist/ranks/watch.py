"""Ranks watch one another: when one fails, dies or freezes, all end soon, with one line that names it.

A thread of every rank beats into a store that rank 0 serves. Beats are counted, not timed: a job that a scheduler
suspends as a whole and resumes has missed none of its own. A rank whose main thread waits for something that never
comes still beats; the time limit of collectives ends that one.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from loraga_dist.ranks.world import World

BEAT_SECONDS = 1.0
SILENT_BEATS = 40
"""Missed in a row before a rank counts as frozen. One that swaps or imports from a slow disk may miss a few."""
GONE_BEATS = 4
"""Missed in a row before a rank counts as gone, when a collective has failed already."""

_FAILURE = "failure"

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why the run ends: the first rank that failed, what it said, and the exit code for all."""

    rank: int
    message: str
    exit_code: int


class Watch:
    """Runs from construction, a collective, until `stop`. Ends the process when another rank has failed."""

    def __init__(self, world: World, *, silent_beats: int = SILENT_BEATS) -> None:
        self._world = world
        self._silent_beats = silent_beats
        self._stopped = threading.Event()
        host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=silent_beats * BEAT_SECONDS)
        served = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout) if world.is_main else None
        port = world.all_json(served.port if served else 0)[0]
        # a connection of its own also on rank 0: the thread must not wait for the main thread's use of it
        self._store = TCPStore(host, port, is_master=False, timeout=timeout)
        self._served = served
        self._asking = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="watch")
        self._beat(0)
        world.barrier()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more watching; call before ranks leave one by one, with a collective after it."""
        self._stopped.set()
        self._thread.join()

    def fail(self, message: str, exit_code: int, *, perhaps_of_another: bool) -> NoReturn:
        """End this process and, through their watches, all others. The first failure is what every rank reports.

        perhaps_of_another: the error may only be what another rank's end looks like from here: first see who is gone.
        """
        failure = Failure(self._world.rank, message, exit_code)
        try:
            self._stopped.set()
            known = self._known()
            if perhaps_of_another:
                known = known or self._who_is_gone(message)
            failure = known or self._announce(failure)
            # rank 0 serves the store: it stays until the others have had time to read why
            if self._world.is_main:
                time.sleep(3 * BEAT_SECONDS)
        except DistError:
            failure = self._rank_0_is_gone(message)
        self._end(failure, always_print=failure.rank == self._world.rank)

    def _run(self) -> None:
        num_beats, last, missed = 0, [-1] * self._world.size, [0] * self._world.size
        while not self._stopped.wait(BEAT_SECONDS):
            num_beats += 1
            try:
                self._beat(num_beats)
                failure = self._known()
                if failure is None and self._world.is_main:
                    now = self._beats()
                    missed = [0 if a != b else n + 1 for a, b, n in zip(now, last, missed, strict=True)]
                    last = now
                    silent = [rank for rank, beats in enumerate(missed) if beats >= self._silent_beats]
                    if silent:
                        said = f"gave no sign of life for {missed[silent[0]]} s"
                        failure = self._announce(Failure(silent[0], said, 3))
            except DistError as error:
                failure = self._rank_0_is_gone(str(error))
            if failure is not None and not self._stopped.is_set():
                if self._world.is_main:
                    time.sleep(3 * BEAT_SECONDS)
                self._end(failure, always_print=False)

    def _beat(self, number: int) -> None:
        self._ask(lambda: self._store.set(f"beat/{self._world.rank}", str(number)))

    def _beats(self) -> list[int]:
        return [int(self._ask(lambda key=f"beat/{rank}": self._store.get(key))) for rank in range(self._world.size)]

    def _known(self) -> Failure | None:
        if not self._ask(lambda: self._store.check([_FAILURE])):
            return None
        return Failure(**json.loads(self._ask(lambda: self._store.get(_FAILURE))))

    def _who_is_gone(self, seen: str) -> Failure | None:
        """The rank without a beat while this one waited, or what another one announced meanwhile."""
        before = self._beats()
        for beat in range(GONE_BEATS):
            # the thread has stopped: others that look for who is gone must not take this one for it
            self._beat(-1 - beat)
            time.sleep(BEAT_SECONDS)
            if (known := self._known()) is not None:
                return known
        me = self._world.rank
        gone = [rank for rank, (a, b) in enumerate(zip(before, self._beats(), strict=True)) if a == b and rank != me]
        return self._announce(Failure(gone[0], f"is gone ({seen})", 3)) if gone else None

    def _announce(self, failure: Failure) -> Failure:
        """The first failure anyone announced, perhaps this one."""
        text = json.dumps(asdict(failure))
        return Failure(**json.loads(self._ask(lambda: self._store.compare_set(_FAILURE, "", text))))

    def _ask(self, question: Callable[[], T]) -> T:
        """The store's answer. Raises DistError when rank 0 gives none: a frozen one would be waited for without end."""
        limit_seconds = self._silent_beats * BEAT_SECONDS
        try:
            return self._asking.submit(question).result(limit_seconds)
        except futures.TimeoutError as error:
            raise DistError(f"no answer for {limit_seconds:.0f} s") from error

    def _rank_0_is_gone(self, seen: str) -> Failure:
        return Failure(0, f"is gone ({' '.join(seen.split())[:200]})", 3)

    def _end(self, failure: Failure, *, always_print: bool) -> NoReturn:
        if always_print or self._world.is_main or failure.rank == 0:
            print(f"loraga-dist: rank {failure.rank} {failure.message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(failure.exit_code)
