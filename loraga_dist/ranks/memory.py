"""Memory of this process: its peak, resident host memory by sampling or device memory by torch's own counter; and
what is free."""

from __future__ import annotations

import ctypes
import resource
import threading
from pathlib import Path, PurePosixPath

import torch

_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
_SAMPLE_SECONDS = 0.01


def return_freed_memory_at_once() -> None:
    """Tell glibc to map blocks of 1 MiB and more one by one.

    Without it freed gathered weights stay in the heap, and a rank holds up to 180 MiB per GiB of partition for nothing.
    """
    _of_glibc("mallopt", _M_MMAP_THRESHOLD, 1 << 20)
    _of_glibc("mallopt", _M_TRIM_THRESHOLD, 1 << 20)


def return_freed_memory() -> None:
    """Have glibc give back what is free between blocks that are not: activations and engine state of small targets.

    Mapping these one by one, too, would make a microbatch of a small model a fifth slower.
    """
    _of_glibc("malloc_trim", 0)


def return_pinned_memory(device: torch.device) -> None:
    """Have torch give back the pinned host memory that it keeps for later copies from and to this device."""
    if device.type == "cuda" and hasattr(torch.accelerator, "empty_host_cache"):  # not in all versions we run with
        torch.accelerator.empty_host_cache()


def _of_glibc(name: str, *numbers: int) -> None:
    try:
        function = getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):  # another libc: its allocator has no such function
        return
    function(*numbers)


def resident_bytes() -> int:
    """Resident memory now: anonymous, and pages of mapped files, such as a checkpoint's weights in a single process.

    The kernel can take the latter back, but then every sweep reads them from disk again.
    """
    return sum(_kib_in(Path("/proc/self/status"), "RssAnon:", "RssFile:")) * 1024


def free_bytes(device: torch.device, ranks_on_node: int) -> int:
    """Memory this rank can still take: of its GPU, or its share of the host's, swap included."""
    if device.type == "cuda":
        # what torch keeps for later is taken only in the driver's eyes
        kept_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept_bytes
    return free_host_bytes() // ranks_on_node


def free_host_bytes() -> int:
    """What the kernel could give to new processes of this machine or container, swap included."""
    free = sum(_kib_in(Path("/proc/meminfo"), "MemAvailable:", "SwapFree:")) * 1024
    groups = (line.removeprefix("0::") for line in Path("/proc/self/cgroup").read_text().splitlines())
    own = next((group for group in groups if group.startswith("/")), "/")
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit != resource.RLIM_INFINITY:
        free = min(free, max(0, limit - sum(_kib_in(Path("/proc/self/status"), "VmData:")) * 1024))
    return min([free, *cgroup_free_bytes(Path("/sys/fs/cgroup"), own)])


def cgroup_free_bytes(mount: Path, group: str) -> list[int]:
    """What this group and each of those above it leave of their limits; version 2 of cgroups, those with a limit only.

    mount: where the hierarchy is. group: below it, as in /proc/self/cgroup. Clean cached files do not count as in use:
    the kernel drops them before it refuses memory.
    """
    free = []
    for path in (own := PurePosixPath(group), *own.parents):
        directory = mount / path.relative_to("/")
        limit = directory / "memory.max"
        if not limit.is_file() or (text := limit.read_text().strip()) == "max":
            continue
        cached = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())["inactive_file"]
        in_use = int((directory / "memory.current").read_text()) - int(cached)
        free.append(max(0, int(text) - in_use))
    return free


def _kib_in(path: Path, *keys: str) -> list[int]:
    fields = (line.split() for line in path.read_text().splitlines())
    return [int(words[1]) for words in fields if words and words[0] in keys]


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
        self._highest = max(self._highest, resident_bytes())
        return self._highest - self.baseline_bytes

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            self.baseline_bytes = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self.baseline_bytes = self._highest = resident_bytes()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._highest = max(self._highest, resident_bytes())
