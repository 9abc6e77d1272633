"""Progress on rank 0: a bar on a terminal, a plain line now and then elsewhere; both with rate and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts the steps of one phase."""

    def __init__(self, phase: str, total: int, unit: str, *, shown: bool) -> None:
        self._phase, self._total, self._unit = phase, total, unit
        self._done = 0
        self._start = self._last_line = time.monotonic()
        self._bar = tqdm(total=total, desc=phase, unit=unit) if shown and sys.stderr.isatty() else None
        self._lines = shown and self._bar is None

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if self._bar is not None:
            self._bar.update(steps)
        now = time.monotonic()
        if self._lines and (self._done >= self._total or now - self._last_line > _SECONDS_BETWEEN_LINES):
            self._last_line = now
            rate = self._done / max(now - self._start, 1e-9)
            left = (self._total - self._done) / rate
            print(
                f"{self._phase}: {self._done}/{self._total} {self._unit}, {rate:.3g} {self._unit}/s, "
                f"{left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def phase(name: str, total: int, unit: str, *, shown: bool) -> Iterator[Progress]:
    progress = Progress(name, total, unit, shown=shown)
    try:
        yield progress
    finally:
        progress.close()
