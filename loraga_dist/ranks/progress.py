"""Progress on rank 0: a bar on a terminal, a plain line now and then elsewhere; both with rate and time left."""

from __future__ import annotations

import sys
import threading
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
        self._lock = threading.Lock()
        self._start = self._last_line = time.monotonic()
        self._lines = shown and not sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=phase, unit=unit, unit_scale=unit == "B", disable=self._lines or not shown)

    def advance(self, steps: int = 1) -> None:
        with self._lock:
            before, self._done = self._done, min(self._done + steps, self._total)
            self.bar.update(self._done - before)
            now = time.monotonic()
            finished = before < self._total <= self._done
            if self._lines and (finished or now - self._last_line > _SECONDS_BETWEEN_LINES):
                self._last_line = now
                rate = self._done / max(now - self._start, 1e-9)
                print(
                    f"{self._phase}: {self._amount(self._done)} of {self._amount(self._total)}{self._word}, "
                    f"{self._amount(rate)}{self._word}/s, {(self._total - self._done) / rate:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

    def extend(self, steps: int) -> None:
        """More steps than were announced, or fewer."""
        self._total += steps
        self.bar.total = self._total

    @property
    def _word(self) -> str:
        return "B" if self._unit == "B" else f" {self._unit}"

    def _amount(self, number: float) -> str:
        return tqdm.format_sizeof(number) if self._unit == "B" else f"{number:.4g}"


@contextmanager
def phase(name: str, total: int, unit: str, *, shown: bool) -> Iterator[Progress]:
    progress = Progress(name, total, unit, shown=shown)
    with progress.bar:
        yield progress
