"""Peak memory of this process: anonymous host memory by sampling, device memory by torch's own counter."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
_SAMPLE_SECONDS = 0.01


def return_freed_memory_at_once() -> None:
    """Tell glibc to map blocks of 1 MiB and more one by one.

    Without it freed gathered weights stay in the heap, and a rank holds up to 180 MiB per GiB of partition for nothing.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another libc: its allocator has no such setting
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    mallopt(_M_TRIM_THRESHOLD, 1 << 20)


def anonymous_bytes() -> int:
    """Anonymous resident memory now; file mappings, which the kernel can take back, are not counted."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no RssAnon line")


class PeakMemory:
    """Context manager: the peak of memory above the level at entry, in bytes, on the device that does the work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.baseline_bytes = 0
        self._highest = 0

    @property
    def peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self.baseline_bytes
        self._highest = max(self._highest, anonymous_bytes())
        return self._highest - self.baseline_bytes

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            self.baseline_bytes = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self.baseline_bytes = self._highest = anonymous_bytes()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._highest = max(self._highest, anonymous_bytes())
