"""What a run that died has left beside its output: shown, and removed where that is wanted."""

from __future__ import annotations

from pathlib import Path

from loraga_dist.errors import RunError, UserError
from loraga_dist.files.checkpoint import require_checkpoint
from loraga_dist.files.staging import Destination, StagedDirectory, tree_bytes
from loraga_dist.ranks.world import World

_KEY = "directory"


def clean(directory: Path, *, remove: bool) -> list[tuple[Path, int]]:
    """What stands beside an output directory under the names of a run at work, each with its bytes.

    remove: remove it; an output that a run was about to replace is put back first. Raises UserError while a run writes
    that output, and for something under these names that no run has left there, before anything is removed.
    """
    destination = directory.expanduser().resolve()
    staged = StagedDirectory(Destination(destination, _KEY), World.alone())
    found = staged.leftovers()
    had_lock = staged.lock_path in found
    if not destination.parent.is_dir():
        raise UserError(_KEY, str(directory), "has no place it could be in; write an output directory")
    if not found:
        return []
    try:
        staged.take_lock()
        try:
            staged.require_ours()
            require_checkpoint(staged.checkpoint_path, _KEY)
            sizes = [(path, tree_bytes(path)) for path in found]
            if remove:
                staged.put_back()
                for path in staged.leftovers():
                    if path.is_dir():
                        staged.remove(path)
        finally:
            staged.drop_lock(keep_file=had_lock and not remove)
    except OSError as error:
        raise RunError(f"{error.filename or directory} cannot be removed ({error.strerror})") from error
    return sizes
