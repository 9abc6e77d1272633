"""The hidden states between blocks that backward will want: in host memory, or in a file."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from loraga_dist.engines.home import StateHome
from loraga_dist.errors import RunError
from loraga_dist.files.safetensors_io import as_bytes


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How many microbatches go through the blocks together, and where what is between blocks waits for backward."""

    chunk_microbatches: int | None = None
    """Of one rank; None for all that there are."""
    directory: Path | None = None
    """For files; None for host memory."""


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
