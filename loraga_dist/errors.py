"""The two ways a run ends badly, each with its exit code, and how their words are made safe to print."""

from __future__ import annotations

import os
import re
import traceback
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


class UserError(LoragaError):
    """The user's input is wrong: the key, the value, and what to write instead (exit code 2)."""

    exit_code = 2

    def __init__(self, key: str, value: Any, problem: str) -> None:
        shown = repr(value)
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
