"""What an interrupted run goes on from: a JSON and tensors, in generations that are there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loraga_dist.errors import RunError
from loraga_dist.files.checksums import check_checksums, write_checksums
from loraga_dist.files.safetensors_io import TensorSlot, read_range, scan_checkpoint
from loraga_dist.files.shared_tensors import write_shared_tensors
from loraga_dist.ranks.world import World

GENERATIONS = 2
"""Kept at a time: the newest, and the one before in case the newest is damaged."""

_CONTENT = "state.json"
_STEM = "state"
_UNFINISHED = "unfinished"


@dataclass(frozen=True)
class SavedTensors:
    """Tensors by name, each read when asked for, to the host. Raises RunError when a file became unreadable."""

    slots: dict[str, TensorSlot]

    def __getitem__(self, name: str) -> Tensor:
        slot = self.slots[name]
        return read_range(slot, 0, slot.numel).view(slot.shape)

    def __contains__(self, name: str) -> bool:
        return name in self.slots


@dataclass(frozen=True)
class Checkpoint:
    """A generation, read and whole."""

    path: Path
    content: dict[str, Any]
    tensors: SavedTensors


class CheckpointStore:
    """Generations of one run's state, beside its output; every rank calls every method."""

    def __init__(self, directory: Path, world: World) -> None:
        self.directory = directory
        self._world = world
        self._damaged: set[str] = set()

    def save(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the next generation and drop the oldest. content: rank 0's counts; tensors: this rank's own, by name.

        Raises RunError, with the earlier generations untouched, when the file system refuses.
        """
        unfinished = self.directory / _UNFINISHED
        with self._world.together():
            if self._world.is_main:
                with _named_errors(unfinished):
                    shutil.rmtree(unfinished, ignore_errors=True)
                    unfinished.mkdir(parents=True)
                    (unfinished / _CONTENT).write_text(json.dumps(content))
        write_shared_tensors(unfinished, _STEM, tensors, self._world)
        write_checksums(unfinished, self._world)
        with self._world.together():
            if self._world.is_main:
                with _named_errors(self.directory):
                    generations = self._generations()
                    newest = int(generations[-1].name) if generations else 0
                    for path in (*unfinished.iterdir(), unfinished):
                        _sync(path)
                    unfinished.rename(self.directory / f"{newest + 1:06d}")
                    _sync(self.directory)
                    whole = [path for path in generations if path.name not in self._damaged]
                    for old in generations:
                        if old not in whole[1 - GENERATIONS :]:
                            shutil.rmtree(old)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest generation whose checksums hold, and what is wrong with those after it, one line each."""
        names = self._world.all_json([path.name for path in self._generations()] if self._world.is_main else [])[0]
        damaged: list[str] = []
        for name in reversed(names):
            path = self.directory / name
            problems = check_checksums(path, self._world)
            if not problems:
                with self._world.together():
                    content = json.loads((path / _CONTENT).read_bytes())
                    return Checkpoint(path, content, SavedTensors(scan_checkpoint(path, _STEM))), damaged
            damaged.append(f"{path} is damaged ({problems[0]})")
            self._damaged.add(name)
        return None, damaged

    def clear(self) -> None:
        """Remove all generations, on rank 0, when the run they belong to is done or wanted no more."""
        if self._world.is_main:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _generations(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if path.name.isdecimal())


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"checkpoint: {error.filename or path} cannot be written ({error.strerror})") from error


def _sync(path: Path) -> None:
    """Have the file's content, or the directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
