"""The ways a run ends badly, each with its exit code and words, and how whatever is raised becomes one of them."""

from __future__ import annotations

import os
import re
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_MAX_FOREIGN = 500
"""Characters kept of a message that is not ours; torch's may hold a stack of C++."""

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, those that turn the direction of writing or end a line, and halves of a surrogate pair."""


def printable(text: str) -> str:
    r"""The text on one line without what a terminal would obey: such characters become `\xNN` or `\uNNNN`."""
    return _UNPRINTABLE.sub(lambda found: _escaped(ord(found[0])), text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def unforeseen(error: BaseException) -> str:
    """Say in one line what an error is that nobody wrote a message for; LORAGA_DEBUG=1 prints its traceback, too."""
    words = " ".join(str(error).split())
    said = f"{type(error).__name__}: {words if len(words) <= _MAX_FOREIGN else words[:_MAX_FOREIGN] + '...'}"
    if os.environ.get("LORAGA_DEBUG") == "1":
        traceback.print_exception(error)
        return said
    return f"{said} (LORAGA_DEBUG=1 prints the traceback)"


class LoragaError(Exception):
    """Base of the errors that the command line turns into one line and an exit code."""

    exit_code: int = 3
    on_all_ranks: bool = False
    """Every rank raises it, so all can leave in an orderly way; otherwise this rank alone failed."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UserError(LoragaError):
    """The user's input is wrong: the key, the value, and what to write instead (exit code 2)."""

    exit_code = 2

    def __init__(self, key: str, value: Any, problem: str) -> None:
        try:
            shown = repr(value)
        except (ValueError, RecursionError):  # more digits than Python writes, more brackets than it nests
            shown = f"<{type(value).__name__}>"
        if len(shown) > 200:
            shown = shown[:197] + "..."
        super().__init__(f"{key}: {shown}: {' '.join(problem.split())}")
        self.key = key


class Preempted(LoragaError):
    """The run was asked to stop and has saved its state; the same command goes on from there (exit code 143)."""

    exit_code = 143


class RunError(LoragaError):
    """The run failed although the input was right (exit code 3)."""


class VerificationError(RunError):
    """What the run has written is not what it should be."""


@contextmanager
def blame(key: str, value: Any, problem: str, instead: str, *, limit_seconds: float | None = None) -> Iterator[None]:
    """Turn whatever the block raises into a UserError for `key`: libraries raise anything over a user's value.

    Our own errors pass. limit_seconds: raise TimeoutError in the block after so long, for patterns and templates that
    never end; only in the main thread, and only where Python is asked between two steps.
    """
    try:
        with _limited(limit_seconds):
            yield
    except (LoragaError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise UserError(key, value, f"{problem}: {reason(error)}; {instead}") from error


def reason(error: BaseException) -> str:
    """Say in a few words why something was raised; the type's name where the words alone mean little."""
    words = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
    if len(words) > 300:
        words = words[:297] + "..."
    if words and isinstance(error, OSError | ValueError | ImportError):
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


@contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again each second: code without a caller swallows what is raised
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
