"""What an interrupted run goes on from: JSON and tensors, in directories that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loraga_dist.errors import RunError, UserError
from loraga_dist.files.checksums import CHECKSUMS, check_checksums, read_checksums, write_checksums
from loraga_dist.files.disk import (
    MAX_NUMBERS_BYTES,
    BrokenFileError,
    naming_write_errors,
    parse_json,
    read_bounded,
    sync,
)
from loraga_dist.files.safetensors_io import TensorSlot, scan_checkpoint
from loraga_dist.files.shared_tensors import write_shared_tensors
from loraga_dist.ranks.world import World

GENERATIONS = 2
"""Kept at a time: the newest, and the one before in case the newest is damaged."""

_GENERATION, _FINISHED = r"\d{6,}", r"finished-\d{6,}"
_AFTER = "num_finished"
"""In a generation's content: the finished parts that it goes on from."""
_CONTENT = "state.json"
_STEM = "state"
_UNFINISHED = rf"unfinished(-({_GENERATION}|{_FINISHED}))?"
"""A directory being made is named after what it will be: another node may still hold a directory by a name that was
used before. Earlier versions wrote `unfinished` alone."""
_OF_STATE = rf"({_GENERATION}|{_FINISHED}|{_UNFINISHED})(/({CHECKSUMS}|{_STEM}[-.][\w.-]*))?"
_OF_WEIGHTS = r"residual_base(/[^/]+\.(safetensors|json|part))?"  # of run.finished
_GOES_ON_FROM = rf"{_GENERATION}|{_FINISHED}|residual_base/[^/]+\.safetensors\.json"


@dataclass(frozen=True)
class SavedTensors:
    """Tensors by name, each read when asked for, to the host. Raises RunError when a file became unreadable."""

    slots: dict[str, TensorSlot]

    def __getitem__(self, name: str) -> Tensor:
        return self.slots[name].read()


@dataclass(frozen=True)
class Checkpoint:
    """A finished part or a generation, read and whole."""

    path: Path
    content: dict[str, Any]
    tensors: SavedTensors


Check = Callable[[Checkpoint, int | None], None]
"""Raises an exception for content that a run could not go on from. The number of finished parts before a generation;
None for a finished part."""


@dataclass(frozen=True)
class Found:
    """What an earlier run left: its finished parts in order, the state after the last of them, and what is damaged."""

    finished: list[Checkpoint]
    newest: Checkpoint | None
    problems: list[str]
    """One line each."""


def require_checkpoint(directory: Path, key: str) -> None:
    """Raise UserError where something is there that is no checkpoint of ours. key: what it stands beside."""
    if not (directory.exists() or directory.is_symlink()):
        return
    paths = [directory, *directory.rglob("*")] if directory.is_dir() else [directory]
    for path in paths:
        is_ours = path == directory or re.fullmatch(
            f"{_OF_STATE}|{_OF_WEIGHTS}", path.relative_to(directory).as_posix()
        )
        is_directory = path == directory or path.name == path.relative_to(directory).as_posix()
        if not is_ours or path.is_symlink() or path.is_dir() != is_directory:
            problem = f"is no checkpoint of loraga_dist, for {path} is not of one; move it away"
            raise UserError(key, str(directory), problem)


class CheckpointStore:
    """One run's state, beside its output: finished parts, each written once, and generations of the state since the
    last of them. Every rank calls every method."""

    def __init__(self, directory: Path, world: World) -> None:
        self.directory = directory
        self._world = world
        self._num_finished = 0
        self._damaged: set[str] = set()

    def save(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the next generation and drop the oldest. content: rank 0's counts; tensors: this rank's own, by name.

        Raises RunError, with the earlier generations untouched, when the file system refuses.
        """
        generations = self._names_seen_by_main(_GENERATION)
        newest = int(generations[-1]) if generations else 0
        self._write(f"{newest + 1:06d}", {**content, _AFTER: self._num_finished}, tensors)
        whole = [name for name in generations if name not in self._damaged]
        self._remove(self.directory / name for name in generations if name not in whole[1 - GENERATIONS :])

    def finish(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a part that stays as it is; generations of the state before it are dropped."""
        self._write(f"finished-{self._num_finished:06d}", content, tensors)
        self._num_finished += 1
        # parts behind a damaged one may be of another run's data
        behind = (path for path in self._named(_FINISHED) if int(path.name.split("-")[1]) >= self._num_finished)
        self._remove([*self._named(_GENERATION), *behind])

    def require_ours(self) -> None:
        """Raise UserError where the directory holds what no run has written: it would be removed in the end."""
        with self._world.together():
            if self._world.is_main:
                require_checkpoint(self.directory, "output.dir")

    @property
    def holds_work(self) -> bool:
        """Whether there is anything to go on from: a state, or the note of a finished weight file. No collective."""
        paths = self.directory.rglob("*") if self.directory.is_dir() else ()
        return any(re.fullmatch(_GOES_ON_FROM, path.relative_to(self.directory).as_posix()) for path in paths)

    def read(self, check: Check = lambda saved, num_finished: None) -> Found:
        """All finished parts up to the first damaged one, and the newest whole generation of the state after them.

        check: what it raises makes a part or a generation a damaged one.
        """
        problems: list[str] = []
        finished: list[Checkpoint] = []
        for name in self._names_seen_by_main(_FINISHED):
            if name != f"finished-{len(finished):06d}":
                break
            part = self._open(name, problems, lambda saved: check(saved, None))
            if part is None:
                break
            finished.append(part)
        self._num_finished = len(finished)

        def check_state(saved: Checkpoint) -> None:
            # one from before the last part, which a kill has left, is none that a run would go on from
            if saved.content.get(_AFTER, len(finished)) == len(finished):
                check(saved, len(finished))

        for name in reversed(self._names_seen_by_main(_GENERATION)):
            state = self._open(name, problems, check_state)
            if state is None:
                self._damaged.add(name)
            # one that does not say is another version's, which is refused as other work
            elif state.content.get(_AFTER, len(finished)) == len(finished):
                return Found(finished, state, problems)
        return Found(finished, None, problems)

    def peek(self, key: str) -> Any:
        """What the saved states say of something that is the same in all, before they are read; None if none does."""
        found = None
        for path in [*self._named(_FINISHED), *self._named(_GENERATION)]:
            with suppress(BrokenFileError, AttributeError):  # `read` tells of what is damaged
                content = read_bounded(path / _CONTENT, MAX_NUMBERS_BYTES)
                if hashlib.sha256(content).hexdigest() == (read_checksums(path) or {}).get(_CONTENT):
                    found = parse_json(content, _CONTENT).get(key, found)
        return self._world.of_main(found)

    def clear(self) -> None:
        """Remove everything, on rank 0, when the run it belongs to is done or wanted no more."""
        if self._world.is_main:
            with suppress(OSError):
                for path in self._named(rf"{_GENERATION}|{_FINISHED}"):
                    _set_aside(path)
            shutil.rmtree(self.directory, ignore_errors=True)

    def _open(self, name: str, problems: list[str], check: Callable[[Checkpoint], None]) -> Checkpoint | None:
        path, opened, problem = self.directory / name, None, ""
        if found := check_checksums(path, self._world):
            problem = found[0]
        else:
            try:
                content = parse_json(read_bounded(path / _CONTENT, MAX_NUMBERS_BYTES), _CONTENT)
                opened = Checkpoint(path, content, SavedTensors(scan_checkpoint(path, _STEM)))
                check(opened)
            except RunError as error:
                problem = str(error)
            except Exception as error:  # whatever content of other types and shapes does to those who look at it
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        # one rank's reading decides for all
        problem = next((found for found in self._world.all_json(problem) if found), "")
        if problem:
            problems.append(f"{path} is damaged ({problem})")
            return None
        return opened

    def _write(self, name: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """A directory of this name, which appears when all of it is on the disk, or is gone where that fails."""
        unfinished = self.directory / f"unfinished-{name}"
        try:
            self._write_as(unfinished, self.directory / name, content, tensors)
        except BaseException:
            if self._world.is_main:
                shutil.rmtree(unfinished, ignore_errors=True)
                with suppress(OSError):  # others are in it
                    self.directory.rmdir()
            raise

    def _write_as(
        self, unfinished: Path, path: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        with self._world.together():
            if self._world.is_main:
                with naming_write_errors(unfinished, "checkpoint: "):
                    for left in self._named(_UNFINISHED):
                        shutil.rmtree(left, ignore_errors=True)
                    unfinished.mkdir(parents=True)
                    (unfinished / _CONTENT).write_text(json.dumps(content))
        write_shared_tensors(unfinished, _STEM, tensors, self._world)
        write_checksums(unfinished, self._world)
        with self._world.together():
            if self._world.is_main:
                _require_whole(unfinished)
                with naming_write_errors(self.directory, "checkpoint: "):
                    for written in (*unfinished.iterdir(), unfinished):
                        sync(written)
                    shutil.rmtree(path, ignore_errors=True)  # a damaged one
                    unfinished.rename(path)
                    sync(self.directory)

    def _remove(self, paths: Iterable[Path]) -> None:
        with self._world.together():
            if self._world.is_main:
                with naming_write_errors(self.directory, "checkpoint: "):
                    for path in paths:
                        shutil.rmtree(_set_aside(path))

    def _named(self, pattern: str) -> list[Path]:
        if not (self._world.is_main and self.directory.is_dir()):
            return []
        return sorted(path for path in self.directory.iterdir() if re.fullmatch(pattern, path.name))

    def _names_seen_by_main(self, pattern: str) -> list[str]:
        return self._world.of_main([path.name for path in self._named(pattern)])


def _set_aside(path: Path) -> Path:
    """Rename what is to be removed: what a kill leaves of it would be called damaged under its name."""
    return path.rename(path.with_name(f"unfinished-{path.name}"))


def _require_whole(unfinished: Path) -> None:
    """Raise RunError unless every rank's file is where rank 0 sees it."""
    try:
        scan_checkpoint(unfinished, _STEM)
    except BrokenFileError as error:
        found = str(error).partition(";")[0]
        problem = f"{unfinished} is not what the ranks have written ({found}); see that all nodes share it"
        raise RunError(f"checkpoint: {problem}") from error
