"""Progress on rank 0: a bar on a terminal; elsewhere plain lines, when a phase begins, now and then, and when it ends.
And the clock of a work: when it began, and the seconds that its phases take."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

from tqdm import tqdm

from loraga_dist.ranks.words import say

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts the steps of one phase."""

    def __init__(self, phase: str, total: int, unit: str, *, shown: bool, counted: bool, nested: bool) -> None:
        self._phase, self._total, self._unit = phase, total, unit
        self._done = 0
        self._note = ""
        self._lock = threading.Lock()
        self._start = self._last_line = time.monotonic()
        self._counted, self._nested = counted, nested
        self._lines = shown and not (counted and sys.stderr.isatty())
        self.bar = tqdm(
            total=total,
            desc=phase,
            unit=unit,
            unit_scale=unit == "B",
            disable=self._lines or not shown,
            delay=_SECONDS_BETWEEN_LINES if nested else 0,
            leave=not nested,
        )

    def begin(self) -> None:
        if not self._nested:
            self._say(self._amount(self._total))

    def end(self) -> None:
        if not self._nested:
            done = self._amount(self._done if self._counted else self._total)
            self._say(f"{done} in {time.monotonic() - self._start:.1f} s")

    def advance(self, steps: int = 1) -> None:
        with self._lock:
            before, self._done = self._done, min(self._done + steps, self._total)
            self.bar.update(self._done - before)
            now = time.monotonic()
            if self._done < self._total and now - self._last_line > _SECONDS_BETWEEN_LINES:
                self._last_line = now
                rate = self._done / max(now - self._start, 1e-9)
                left = f"{(self._total - self._done) / rate:.0f} s left" if self._done else "no end in sight yet"
                done = self._amount(self._done) if self._unit == "B" else self._done
                self._say(f"{done} of {self._amount(self._total)}, {self._amount(rate)}/s, {left}")

    def extend(self, steps: int) -> None:
        """More steps than were announced, or fewer."""
        self._total += steps
        self.bar.total = self._total

    def note(self, text: str) -> None:
        """Show this beside the steps from now on."""
        self._note = f"; {text}"
        self.bar.set_postfix_str(text)

    def _say(self, text: str) -> None:
        if self._lines:
            say(f"{self._phase}: {text}{self._note}")

    def _amount(self, number: float) -> str:
        return f"{tqdm.format_sizeof(number)}B" if self._unit == "B" else f"{number:.4g} {self._unit}"


@contextmanager
def phase(
    name: str, total: int, unit: str, *, shown: bool, counted: bool = True, nested: bool = False
) -> Iterator[Progress]:
    """A phase of the work, said to begin and to have ended.

    counted: its steps are; else only the whole is known. nested: it is part of another phase, and shows when it lasts.
    """
    progress = Progress(name, total, unit, shown=shown, counted=counted, nested=nested)
    with progress.bar:
        progress.begin()
        yield progress
    progress.end()


class Clock:
    """When a work began, and the seconds of its phases and of the whole, over all runs of it."""

    def __init__(self) -> None:
        self.began = datetime.now()
        """What chat templates print as the time."""
        self._before: dict[str, float] = {}
        self._started = {"total": time.monotonic()}

    def go_on_from(self, seconds: Mapping[str, float]) -> None:
        """Count what earlier runs of the work took."""
        for name, before in seconds.items():
            self._before[name] = self._before.get(name, 0.0) + before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._started[name] = time.monotonic()
        try:
            yield
        finally:
            self._before[name] = self.seconds[name]
            del self._started[name]

    @property
    def seconds(self) -> dict[str, float]:
        """By phase in the order they began, `total` last; of a phase that goes on, until now."""
        now = time.monotonic()
        running = {name: now - started for name, started in self._started.items()}
        names = [name for name in {**self._before, **running} if name != "total"]
        return {name: self._before.get(name, 0.0) + running.get(name, 0.0) for name in (*names, "total")}
