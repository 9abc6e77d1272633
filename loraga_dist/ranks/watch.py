"""Ranks watch one another: when one fails, dies or freezes, all end soon, with one line that names it.

A thread of every rank beats into a store that rank 0 serves. Beats are counted, not timed: a job that a scheduler
suspends as a whole and resumes has missed none of its own. A rank whose main thread waits for something that never
comes still beats; the time limit of collectives ends that one.

Whoever reaches the store can read it, and can disturb the run by what it writes; it cannot say that a rank failed, nor
how the run ends.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from loraga_dist.errors import Preempted, RunError, UserError, unforeseen
from loraga_dist.ranks.rendezvous import addresses_of, listen
from loraga_dist.ranks.sealed import SealedStore
from loraga_dist.ranks.words import leave_process, say, say_why
from loraga_dist.ranks.world import World

BEAT_SECONDS = 1.0
SILENT_BEATS = 40
"""Missed in a row before a rank counts as frozen. One that swaps or imports from a slow disk may miss a few."""
GONE_BEATS = 4
"""Missed in a row before a rank counts as gone, when a collective has failed already."""

EXIT_CODES = tuple(kind.exit_code for kind in (UserError, RunError, Preempted))
"""How a run may end for all ranks by the word of one: never well."""

_FAILURE, _SAID = "failure", "said"
_SAYING_BEATS = 3
"""That rank 0 has to say why the run ends before the others leave, and that it serves the store after that."""

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why the run ends: the first rank that failed, what it said, and the exit code for all."""

    rank: int
    message: str
    exit_code: int

    def as_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str) -> Failure | None:
        """None where the text is no failure: what it says must never end a run."""
        try:
            failure = cls(**json.loads(text))
        except (ValueError, TypeError):
            return None
        kinds = isinstance(failure.rank, int), isinstance(failure.message, str), failure.exit_code in EXIT_CODES
        return failure if all(kinds) else None


class Watch:
    """Runs from construction, a collective, until `stop`. Ends the process when another rank has failed."""

    def __init__(self, world: World, *, silent_beats: int = SILENT_BEATS) -> None:
        self._world = world
        self._silent_beats = silent_beats
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        """Never released: of two threads that would end the process one does."""
        self._store = self._open_store()
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
        self._ending.acquire()
        self._stopped.set()
        try:
            failure = self._known()
            if perhaps_of_another:
                failure = failure or self._who_is_gone(message)
            failure = failure or self._announce(Failure(self._world.rank, message, exit_code))
        except DistError:
            self._end_without_rank_0(message)
        self._end(failure)

    def _open_store(self) -> SealedStore:
        """Connect to a store that rank 0 serves for this purpose, where the other ranks find it and nowhere else."""
        host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=self._silent_beats * BEAT_SECONDS)
        # if there are other nodes, the last rank is on one
        addresses = self._world.all_json(addresses_of(host))[-1]
        self._served, place = None, {}
        if self._world.is_main:
            found = listen(addresses, 0)
            host, port, descriptor = found if found else (host, 0, None)
            self._served = TCPStore(
                host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=descriptor
            )
            place = {"host": host, "port": self._served.port, "secret": secrets.token_hex(32)}
        self._place = self._world.of_main(place)
        # a connection of its own also on rank 0: the thread must not wait for the main thread's use of it
        store = TCPStore(self._place["host"], self._place["port"], is_master=False, timeout=timeout)
        return SealedStore(store, self._place["secret"])

    def _run(self) -> None:
        try:
            failure = self._first_failure()
        except DistError as error:
            if not self._stopped.is_set():
                self._ending.acquire()
                self._end_without_rank_0(str(error))
        except Exception as error:  # a thread that dies unseen would leave the run unwatched
            self.fail(f"failed to watch: {unforeseen(error)}", RunError.exit_code, perhaps_of_another=False)
        else:
            if failure is not None and not self._stopped.is_set():
                self._ending.acquire()
                self._end(failure)

    def _first_failure(self) -> Failure | None:
        """Wait for the first failure that a rank announces or, on rank 0, that its silence is; None: was stopped."""
        num_beats, last, missed, has_warned = 0, self._beats(), [0] * self._world.size, False
        while not self._stopped.wait(BEAT_SECONDS):
            num_beats += 1
            self._beat(num_beats)
            if (failure := self._known()) is not None:
                return failure
            if not self._world.is_main:
                continue
            now = self._beats()
            missed = [n + 1 if a in (None, b) else 0 for a, b, n in zip(now, last, missed, strict=True)]
            last = now
            silent = [rank for rank, beats in enumerate(missed) if beats >= self._silent_beats]
            if silent:
                said = f"gave no sign of life for {missed[silent[0]]} s"
                return self._announce(Failure(silent[0], said, RunError.exit_code))
            if self._store.strangers and not has_warned:
                has_warned = True
                at = f"{self._place['host']}:{self._place['port']}"
                say(f"loraga-dist: what no rank has written at {at} is ignored")
        return None

    def _beat(self, number: int) -> None:
        self._ask(lambda: self._store.set(f"beat/{self._world.rank}", str(number)))

    def _beats(self) -> list[str | None]:
        return [self._ask(lambda key=f"beat/{rank}": self._store.get(key)) for rank in range(self._world.size)]

    def _known(self) -> Failure | None:
        text = self._ask(lambda: self._store.get(_FAILURE))
        return None if text is None else Failure.of_text(text)

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
        return self._announce(Failure(gone[0], f"is gone ({seen})", RunError.exit_code)) if gone else None

    def _announce(self, failure: Failure) -> Failure:
        """The first failure anyone announced, perhaps this one."""
        return Failure.of_text(self._ask(lambda: self._store.first(_FAILURE, failure.as_text()))) or failure

    def _ask(self, question: Callable[[], T]) -> T:
        """The store's answer. Raises DistError when rank 0 gives none: a frozen one would be waited for without end."""
        limit_seconds = self._silent_beats * BEAT_SECONDS
        try:
            return self._asking.submit(question).result(limit_seconds)
        except futures.TimeoutError as error:
            raise DistError(f"no answer for {limit_seconds:.0f} s") from error

    def _end(self, failure: Failure) -> NoReturn:
        """Leave when rank 0 has said why; the first rank that leaves may make a launcher kill the others."""
        if self._world.is_main:
            say_why(f"rank {failure.rank} {failure.message}")
            with suppress(DistError):
                self._ask(lambda: self._store.set(_SAID, "yes"))
                time.sleep(_SAYING_BEATS * BEAT_SECONDS)  # the others have to read it
        elif not self._rank_0_says_it():
            say_why(f"rank {failure.rank} {failure.message}")
        leave_process(failure.exit_code)

    def _rank_0_says_it(self) -> bool:
        with suppress(DistError):
            for _ in range(10 * _SAYING_BEATS):
                if self._ask(lambda: self._store.get(_SAID)) is not None:
                    return True
                time.sleep(0.1 * BEAT_SECONDS)
        return False

    def _end_without_rank_0(self, seen: str) -> NoReturn:
        say_why(f"rank 0 is gone ({' '.join(seen.split())[:200]})")
        leave_process(RunError.exit_code)
