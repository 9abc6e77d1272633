"""The hidden states between blocks that backward will want: in host memory, or in a file; and which of the two."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from loraga_dist.config import GradientConfig
from loraga_dist.engines.home import StateHome
from loraga_dist.errors import RunError, UserError
from loraga_dist.files.safetensors_io import as_bytes


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How many microbatches go through the blocks together, and where what is between blocks waits for backward."""

    chunk_microbatches: int | None = None
    """Of one rank; None for all that there are."""
    directory: Path | None = None
    """For files; None for host memory."""
    recomputes: bool = True
    """Model order, where gradient.checkpointing is auto: blocks are computed again instead of kept."""


SHARE = 0.5
"""Of what is free, the most that is taken: the rest is for what nobody counted."""


@dataclass(frozen=True, kw_only=True)
class FreeSpace:
    """What is free for one rank's kept inputs, in bytes; None without a limit."""

    memory_bytes: float | None = None
    files_bytes: float | None = None
    """In the directory."""
    device_bytes: float | None = None
    """Of a device beside the host."""
    directory: Path
    """The user's, or where files go by default."""
    beside_one: bool = False
    """Memory is counted beside a first microbatch that is kept there; 0 where that has no room itself."""


def choose_keeping(
    *,
    kept_bytes: int,
    resident_bytes: int,
    between_bytes: int,
    num_microbatches: int,
    free: FreeSpace,
    gradient: GradientConfig,
) -> Keeping:
    """Choose how many microbatches go through the blocks together, and where they are kept: all, if possible in memory.

    kept_bytes: of one microbatch, in memory or in files. resident_bytes: of one, in memory either way. between_bytes:
    of the gradients between blocks of one that waits, on a device beside the host. num_microbatches: of one rank.

    Raises UserError where not one microbatch has room, or fewer than gradient.chunk_microbatches or in another place
    than gradient.activations_dir.
    """

    def fitting(free_bytes: float | None, bytes_each: int) -> int:
        if free_bytes is None or not bytes_each:
            return num_microbatches
        return max(0, int(SHARE * free_bytes // bytes_each))

    most = num_microbatches
    if free.device_bytes is not None:
        most = min(most, 1 + int(free.device_bytes // between_bytes))
    chunk = gradient.chunk_microbatches
    wanted = most if chunk == "auto" else min(chunk, most)
    first, has_room = int(free.beside_one), free.memory_bytes is None or free.memory_bytes > 0
    in_files = min(fitting(free.files_bytes, kept_bytes), first + fitting(free.memory_bytes, resident_bytes))
    in_memory = 0
    if not gradient.activations_dir and (has_room or not in_files):  # without any, the plan says what is lacking
        in_memory = first + fitting(free.memory_bytes, kept_bytes + resident_bytes)
    best = max(in_memory, in_files)
    if best < wanted and (chunk != "auto" or not best):
        gib = (kept_bytes + resident_bytes) / 2**30
        where = "" if gradient.activations_dir else f" in memory ({_gib(free.memory_bytes)}) and"
        problem = (
            f"a microbatch's inputs of blocks take {gib:.2f} GiB, of which there may be half of what is free{where} "
            f"in {free.directory} ({_gib(free.files_bytes)})"
        )
        if best:
            raise UserError("gradient.chunk_microbatches", chunk, f"{problem}; write auto, or {best} at most")
        raise UserError(
            "gradient.activations_dir",
            gradient.activations_dir,
            f"{problem}; name a directory with more room, or lower calibration.max_length",
        )
    return Keeping(
        chunk_microbatches=None if best >= num_microbatches == wanted else min(best, wanted),
        directory=None if in_memory >= min(wanted, best) else free.directory,
    )


def _gib(num_bytes: float | None) -> str:
    return "no limit" if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"


class KeptInputs:
    """The input of every block in every microbatch, by the block's index and the microbatch's.

    A file has no name: the system removes it when the process ends, however it ends.
    """

    def __init__(self, directory: Path | None, device: torch.device) -> None:
        self._home = StateHome(device, on_host=device.type != "cpu")
        self._tensors: dict[tuple[int, int], Tensor] = {}
        self._places: dict[tuple[int, int], tuple[int, torch.dtype, torch.Size]] = {}
        self._end = 0
        self._directory = directory
        self._file: Any = None

    def __enter__(self) -> KeptInputs:
        if self._directory is not None:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)
            except OSError as error:
                raise self._failed("written", error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensors.clear()
        if self._file is not None:
            self._file.close()

    def put(self, block: int, microbatch: int, hidden: Tensor) -> None:
        if self._file is None:
            self._tensors[block, microbatch] = self._home.keep(hidden)
            return
        data, position = as_bytes(hidden.cpu()), self._end
        self._places[block, microbatch] = position, hidden.dtype, hidden.shape
        self._end += len(data)
        try:
            while data:
                num_written = os.pwrite(self._file.fileno(), data, position)
                data, position = data[num_written:], position + num_written
        except OSError as error:
            raise self._failed("written", error) from error

    def get(self, block: int, microbatch: int) -> Tensor:
        """On the device; not to be changed in place."""
        if self._file is None:
            return self._home.fetch(self._tensors[block, microbatch])
        position, dtype, shape = self._places[block, microbatch]
        hidden = torch.empty(shape, dtype=dtype)
        buffer = as_bytes(hidden)
        try:
            while buffer:
                num_read = os.preadv(self._file.fileno(), [buffer], position)
                assert num_read, "the file ends where it was written"
                buffer, position = buffer[num_read:], position + num_read
        except OSError as error:
            raise self._failed("read", error) from error
        return hidden.to(self._home.device)

    def drop(self, block: int) -> None:
        """Forget what no later step wants."""
        for key in [key for key in self._tensors if key[0] == block]:
            del self._tensors[key]

    def clear(self) -> None:
        """Make room for the next chunk."""
        self._tensors.clear()
        self._places.clear()
        self._end = 0

    def _failed(self, what: str, error: OSError) -> RunError:
        return RunError(
            f"calibrate: inputs of blocks cannot be {what} in {self._directory} ({error.strerror}); "
            "name another place by gradient.activations_dir, or lower gradient.chunk_microbatches"
        )
