"""What a process says, last of all why it ends, on streams that may be full, closed, or gone with their terminal."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from loraga_dist.errors import RunError, printable


class ForgivingStream:
    """A stream whose failure ends nothing: what it does not take is lost, and said by `forgiving_streams`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        if self.lost is None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if self.lost is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = error
        # what is still in its buffer would fail again in the interpreter's own last flush, which then exits with 120
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """While the context lasts, standard output and standard error are `ForgivingStream`."""
    _open_closed_streams()
    out, error = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = said, _ = ForgivingStream(out), ForgivingStream(error)
    try:
        yield
    finally:
        said.flush()
        # a reader that has gone, as in `... | head`, has read enough
        if said.lost is not None and said.lost.errno != errno.EPIPE:
            print(f"loraga-dist: standard output: {said.lost.strerror}; what it was to show is lost", file=sys.stderr)
        sys.stderr.flush()
        sys.stdout, sys.stderr = out, error


def require_said() -> None:
    """Raise RunError where a command whose whole work is what it prints could not print it."""
    out: Any = sys.stdout
    out.flush()
    lost: OSError | None = out.lost
    if lost is not None and lost.errno != errno.EPIPE:
        out.lost = None  # the error says it
        raise RunError(f"standard output: {lost.strerror}")


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line at once, on standard error by default, without what a terminal would obey."""
    print(printable(line), file=sys.stderr if file is None else file, flush=True)


def say_why(*lines: str) -> None:
    """Print why this process ends, and leave it to torchrun, too, whose own long summary comes after."""
    for line in lines:
        say(f"loraga-dist: {line}")
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun shows the earliest failure last; ranks without such a file count from when it sees their end
        before_others = str(int(time.time()) - 1)
        extra = {"py_callstack": f"loraga-dist: {printable(lines[0])}", "timestamp": before_others}
        part = Path(f"{file}.{os.getpid()}")
        with suppress(OSError):  # it has been printed
            part.write_text(json.dumps({"message": {"message": lines[0], "extraInfo": extra}}))
            part.replace(file)


def leave_process(exit_code: int) -> NoReturn:
    """End this process without the interpreter's own teardown.

    DeepSpeed keeps the process group, so gloo's threads are still there when a rank exits, and now and then abort it
    (SIGABRT) after all its work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _open_closed_streams() -> None:
    """Lead descriptors that were closed at the start (`>&-`) nowhere: the next file opened would become the stream."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))
