"""Who asks a process to stop: a scheduler by a signal, a terminal that is closed, a launcher by its own end.

A launcher's end is looked for in `/proc` rather than announced by the kernel (PR_SET_PDEATHSIG): `deepspeed` is two
processes, and the one further up is what a user stops.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from loraga_dist.errors import Preempted
from loraga_dist.ranks.words import say_why

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""What schedulers send some time before they kill, and a terminal that goes away."""

STOPPED = Preempted.exit_code
INTERRUPTED = 130

_LOOK_SECONDS = 1.0
_INTERRUPT_SECONDS = 2.0
"""For the main thread to see Ctrl-C; one that waits for another rank in C++ does not."""


class StopRequest:
    """Whether this process was asked to stop; listens while the context lasts, entered in the main thread.

    Until `hold` a request ends the process at once, also while the main thread waits for other ranks.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        """The signal's, or what else asked."""
        self.end_all: Callable[[str, int], object] | None = None
        """Ends this process and all other ranks with a message and an exit code, once they watch one another."""
        self._before: dict[signal.Signals, Any] = {}
        self._held = False
        self._holding = threading.Lock()
        self._interrupted = False
        self._parents: dict[int, int] = {}

    def __enter__(self) -> StopRequest:
        self._ours, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        # a handler in Python runs when the main thread is back from C++; this wakes the listener at once
        self._wakeup_before = signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            # nohup has a process ignore its terminal's end
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        self._listener = threading.Thread(target=self._listen, name="stop", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.listen_no_more()

    def hold(self) -> None:
        """From here on there is something to save or to tidy up: a request waits until the work looks at it."""
        with self._holding:
            self._held = True

    def listen_no_more(self) -> None:
        """Signals do what they did before."""
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        signal.set_wakeup_fd(self._wakeup_before)
        self._woken.send(b"\0")
        self._listener.join()
        self._ours.close()
        self._woken.close()

    def watch_launcher(self) -> None:
        """Take the end of the process that started this one for a request; of deepspeed's two, either's."""
        launcher = os.getppid()
        parents = {os.getpid(): launcher}
        above = _parent(launcher)
        if above is not None and b"deepspeed" in _command_line(launcher) and b"deepspeed" in _command_line(above):
            parents[launcher] = above
        self._parents = parents

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._ours], [], [], _LOOK_SECONDS)
            numbers = self._ours.recv(64) if ready else b""
            if 0 in numbers:
                return
            for number in numbers:
                if number == signal.SIGINT:
                    self._leave_if_main_is_away()
                elif number in STOP_SIGNALS:
                    self._ask(signal.Signals(number).name)
            if any(_parent(child) != parent for child, parent in self._parents.items()):
                self._parents = {}
                self._ask("the end of its launcher")

    def _ask(self, by: str) -> None:
        self.signal_name = self.signal_name or by
        with self._holding:
            if self._held:
                return
            why = f"stopped by {self.signal_name} before its work began; start the same command again"
            if self.end_all is not None:
                self.end_all(why, STOPPED)
            if is_first_of_its_node():
                say_why(why)
            os._exit(STOPPED)

    def _leave_if_main_is_away(self) -> None:
        time.sleep(_INTERRUPT_SECONDS)
        if not self._interrupted:
            say_interrupted()
            os._exit(INTERRUPTED)


def say_interrupted(why: str = "") -> None:
    """Say that Ctrl-C ended the process. why: in whose words, where something else is to be done next."""
    if is_first_of_its_node():
        say_why(why or "interrupted; the same command goes on from the last checkpoint, if there was one")


def is_first_of_its_node() -> bool:
    """Whether this rank speaks for its node where ranks cannot ask one another."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _parent(pid: int) -> int | None:
    """A process's parent, or None where that is not to be seen."""
    if pid == os.getpid():
        return os.getppid()
    try:
        # after the name in parentheses, which may hold anything: state, parent
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
