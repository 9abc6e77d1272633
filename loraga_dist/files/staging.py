"""The output directory appears whole or not at all: files are written beside it and renamed into place at the end."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loraga_dist.errors import LoragaError, RunError, UserError, blame
from loraga_dist.files.disk import UNFINISHED_MARK, sync
from loraga_dist.ranks.words import say
from loraga_dist.ranks.world import World

LONGEST_NAME = 255 - len("..checkpoint")
"""In bytes, of a directory beside which there is a `.NAME.checkpoint`."""

SEEN_SECONDS = 60.0
"""For what rank 0 has made to be seen by other nodes, which may remember for so long that it was not there."""

Strangers = Callable[[Path], list[str] | None]
"""What a directory holds beside an earlier output of ours, by relative path; None where it is no output at all."""


@dataclass(frozen=True)
class Destination:
    """Where an output will stand."""

    path: Path
    """Absolute, its links resolved."""
    key: str
    """What the user names it by."""
    replaces: Strangers | None = None
    """How an earlier output is known, where one may be replaced."""


def free_place(
    path: Path,
    key: str,
    *,
    strangers: Strangers | None = None,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
) -> Destination:
    """The directory to make; raises UserError, for `key`, when something is there that must not be replaced.

    strangers: how an earlier output is known, the only thing `overwrite` replaces, and only if nothing else is in it;
    None where nothing is ever replaced. inputs: what the command reads, and so must not write over.
    """
    with blame(key, str(path), "is no path to write to", "write another directory"):
        destination = path.expanduser().resolve()
        if len(os.fsencode(destination.name)) > LONGEST_NAME:
            raise OSError(f"the files beside it have longer names, so that {LONGEST_NAME} bytes are left for its own")
        if not destination.name:
            raise OSError("it has no name")
        str(destination).encode()  # reports and configurations name it
        require_writable(destination.parent, key)
        if os.path.ismount(destination):
            raise UserError(key, str(path), "is a mount point, which cannot be renamed; write a directory below it")
        if destination.exists():
            if strangers is None:
                raise UserError(key, str(path), "exists; write another directory")
            if (found := strangers(destination)) is None:
                raise UserError(key, str(path), "exists and is no output of loraga-dist; write another directory")
            if not overwrite:
                raise UserError(key, str(path), "exists; write another directory, or add --overwrite")
            for source in inputs:
                if source.resolve().is_relative_to(destination):
                    raise UserError(key, str(path), f"holds {source}, which is read; write another directory")
            if found:
                problem = f"holds {_some(found)}, not of the output that --overwrite replaces"
                raise UserError(key, str(path), f"{problem}; move it away, or write another directory")
        return Destination(destination, key, strangers if overwrite else None)


def require_writable(directory: Path, key: str) -> None:
    """Raise for `key` unless files can be written to this directory, or it can be made.

    UserError where a file is in the way, RunError where the system refuses.
    """
    with blame(key, str(directory), "is no path to write to", "write another directory"):
        place = existing_parent(directory.expanduser())
        if not place.is_dir():
            raise UserError(key, str(directory), f"cannot be made: {place} is a file; write another directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunError(f"{directory} cannot be written (nothing can be made in {place}): write another place as {key}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def existing_parent(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _is_seen(path: Path) -> bool:
    """Whether a directory that rank 0 has made is there for this rank, too, now or soon."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not path.is_dir():
        if time.monotonic() > deadline:
            return False
        with suppress(OSError):
            os.listdir(existing_parent(path.parent))  # has a client of a network file system ask its server again
        time.sleep(0.2)
    return True


class StagedDirectory:
    """A hidden sibling of the destination, until `commit` puts it there."""

    def __init__(self, destination: Destination, world: World) -> None:
        self.destination, self._key, self._replaces = destination.path, destination.key, destination.replaces
        self.path = self._beside("partial")
        self.checkpoint_path = self._beside("checkpoint")
        """Where an interrupted run leaves what it has."""
        self.lock_path = self._beside("lock")
        self._old = self._beside("replaced")
        self._removed = self._beside("removed")
        """What the old output is called once the new one is there: nothing of it is put back."""
        self._lock: int | None = None
        self._world = world
        self._committing = False
        self._was_there = False

    def _beside(self, what: str) -> Path:
        return self.destination.with_name(f".{self.destination.name}.{what}")

    def create(self, num_bytes: int) -> None:
        """Make it, empty, on rank 0; a collective. num_bytes: what will be written, checked against the free space."""
        with self._world.together():
            if self._world.is_main:
                try:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self.take_lock()
                    self._make_empty()
                except OSError as error:
                    raise RunError(
                        f"{self.destination} cannot be written ({error.strerror}); it needs {num_bytes} bytes: "
                        f"write another place as {self._key}"
                    ) from error
        try:
            with self._world.together():
                if not _is_seen(self.path):
                    raise UserError(
                        self._key,
                        str(self.destination),
                        f"is not seen by rank {self._world.rank}; write a place on a file system that all ranks share",
                    )
                if self._world.is_main:
                    self.require_space(num_bytes)
        except LoragaError:
            if self._world.is_main:
                self.discard()
            raise

    def _make_empty(self) -> None:
        """Make the staged directory, once what a run that died has left in its place is gone."""
        try:
            self.require_ours()
            self.put_back()
            for leftover in (self._removed, self._old, self.path):
                if leftover.exists():
                    num_bytes = tree_bytes(leftover)
                    self.remove(leftover)
                    say(f"loraga-dist: removed {leftover} ({num_bytes} bytes), which a run that died had left")
            self._was_there = self.destination.exists()
            if self._was_there and self._replaces is None:  # another run has finished since this one began
                raise UserError(self._key, str(self.destination), "exists by now; write another directory")
            self.path.mkdir()
            (self.path / UNFINISHED_MARK).touch()
        except BaseException:
            self.drop_lock()
            raise

    def require_space(self, num_bytes: int) -> None:
        """Raise RunError where the disk has not as much, free or taken by what an earlier run of this output left."""
        free_bytes = shutil.disk_usage(existing_parent(self.path)).free + tree_bytes(*self.leftovers())
        if free_bytes < num_bytes:
            spared = ", or output.residual_base: none" if self._key == "output.dir" else ""
            raise RunError(
                f"{self.destination} needs {num_bytes} bytes and the disk has {free_bytes} free: "
                f"write another place as {self._key}{spared}"
            )

    def require_ours(self) -> None:
        """Raise UserError where a name beside the destination is taken by something that no run has left there."""
        for path in (self._removed, self._old, self.path):
            if path.is_symlink() or path.exists():
                is_real = path.is_dir() and not path.is_symlink()
                if not (is_real and ((path / UNFINISHED_MARK).is_file() or not any(path.iterdir()))):
                    raise self._not_ours(path)  # or an output that could not be put in place

    def put_back(self) -> bool:
        """Rename the old output back if a run was killed between its two renames; tells whether one was."""
        found = (self._old / UNFINISHED_MARK).is_file() and not self.destination.exists()
        if found:
            self._old.rename(self.destination)
            (self.destination / UNFINISHED_MARK).unlink(missing_ok=True)
        return found

    def commit(self) -> None:
        """Rename into place, on rank 0 when everything is written. An old directory goes after the new is there.

        The lock is held on, for who goes on with what is in place now: `drop_lock` lets go of it. Raises RunError where
        that fails; the staged directory is then no longer marked as one that the next run removes.
        """
        self._committing = True
        try:
            self._put_in_place()
        except RunError:
            with suppress(OSError):
                (self.path / UNFINISHED_MARK).unlink(missing_ok=True)
            raise
        if self._old.exists():
            with suppress(OSError):  # the next run removes what stays
                self.remove(self._old)

    def _put_in_place(self) -> None:
        try:
            # names and small files, which their writers leave to the system
            for path in (*self.path.rglob("*"), self.path):
                sync(path)
            if self.destination.exists():
                if not self._was_there or self._replaces is None:
                    raise self._kept("has appeared meanwhile and is kept")
                if (found := self._replaces(self.destination)) != []:  # put there since the work began
                    held = f"holds {_some(found)}" if found else "is the earlier output no longer"
                    raise self._kept(f"{held} and is kept")
                (self.destination / UNFINISHED_MARK).touch()
                self.destination.rename(self._old)
            try:
                self.path.rename(self.destination)
            except BaseException:
                self.put_back()
                raise
            (self.destination / UNFINISHED_MARK).unlink(missing_ok=True)
            sync(self.destination.parent)
        except OSError as error:
            raise self._kept(f"cannot be put in place ({error.strerror})") from error

    def remove(self, path: Path) -> None:
        """Remove one of the directories beside the destination; a kill half-way leaves nothing to put back."""
        remove_marked(path.rename(self._removed) if path == self._old else path)

    def _kept(self, why: str) -> RunError:
        return RunError(f"{self.destination} {why}; the output is in {self.path}: move it before the next run")

    def discard(self) -> None:
        """Remove what was staged, after a failure; a finished output that could not be renamed stays."""
        if not self._committing and self.path.exists():
            with suppress(OSError):
                remove_marked(self.path)
        self.drop_lock()

    def take_lock(self) -> None:
        """Held as long as this process lives, so that two runs do not write one output."""
        try:
            # what a link leads to, and what stands in the file, is not ours to touch; a pipe would keep us waiting
            self._lock = os.open(
                self.lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
            )
        except OSError as error:
            if self.lock_path.is_symlink() or self.lock_path.is_dir():
                raise self._not_ours(self.lock_path) from error
            raise
        try:
            found = os.fstat(self._lock)
            if not stat.S_ISREG(found.st_mode) or found.st_size:
                raise self._not_ours(self.lock_path)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.lock_path.exists() or not os.path.samestat(os.lstat(self.lock_path), found):
                raise BlockingIOError  # its last holder has removed it in between, and another may hold a new one
        except BlockingIOError:
            self.drop_lock(keep_file=True)
            raise UserError(
                self._key, str(self.destination), "is being written by another run; wait for it or write another"
            ) from None
        except UserError:
            self.drop_lock(keep_file=True)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            say(
                f"loraga-dist: the file system of {self.destination.parent} has no locks ({error.strerror}): no other "
                "run may write the same output"
            )

    def drop_lock(self, *, keep_file: bool = False) -> None:
        """Let other runs write. keep_file: its file is another's, or was there before."""
        if self._lock is not None:
            if not keep_file:
                self.lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _not_ours(self, path: Path) -> UserError:
        problem = f"needs the name {path}, and what stands there is no unfinished work of loraga_dist; move it away"
        return UserError(self._key, str(self.destination), problem)

    def leftovers(self) -> list[Path]:
        """What stands beside the destination under the names of a run at work; of a run that died, while locked."""
        names = (self._removed, self._old, self.path, self.checkpoint_path, self.lock_path)
        return [path for path in names if path.is_symlink() or path.exists()]


def remove_marked(path: Path) -> None:
    """Remove a directory of ours; its mark goes last, so that what a kill leaves of it is known as ours."""
    for child in path.iterdir():
        if child.name == UNFINISHED_MARK:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
    shutil.rmtree(path)


def files_in(directory: Path) -> list[str]:
    """Relative paths of the files below, sorted; of links, too, which are not followed."""
    found = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(directory).as_posix() for path in found)


def tree_bytes(*paths: Path) -> int:
    """Of these files, and those below: each once, however many names it has. Links are not followed."""
    sizes: dict[tuple[int, int], int] = {}
    for path in paths:
        for name in [path, *path.rglob("*")] if path.is_dir() else [path]:
            with suppress(FileNotFoundError):  # a run at work has renamed it
                found = os.lstat(name)
                if stat.S_ISREG(found.st_mode):
                    sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


@contextmanager
def whole_directory(destination: Destination, num_bytes: int) -> Iterator[Path]:
    """An empty directory for one process to fill: in place when the block ends, gone when it raises.

    num_bytes: what will be written, checked against the free space.
    """
    staged = StagedDirectory(destination, World.alone())
    staged.create(num_bytes)
    try:
        yield staged.path
        staged.commit()
    except BaseException:
        staged.discard()
        raise
    staged.drop_lock()
