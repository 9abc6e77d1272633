"""The residual base's files that an interrupted run had finished, so that the next run need not write them again.

A finished file gets a second name (a hard link) in a directory of the checkpoint, and a note of its tensors' digests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraga_dist.artifacts.residual import PlannedFile
from loraga_dist.files.checksums import TensorDigest
from loraga_dist.files.disk import BrokenFileError, read_json
from loraga_dist.files.safetensors_io import dtype_name

Digests = dict[str, tuple[TensorDigest, TensorDigest]]
"""By checkpoint key: of the base's tensor, and of the residual's."""


@dataclass(frozen=True)
class FinishedFiles:
    """`prune` is one rank's to call, before any takes or keeps a file; nothing here is a collective."""

    directory: Path
    work: Mapping[str, Any]
    """What must be the same, as JSON, for a file to be used again: settings, base, data, and A0, B0 by digest."""

    def prune(self, files: Sequence[PlannedFile]) -> list[str]:
        """Remove what is kept of other work; returns the names of those of `files` that need not be written."""
        usable = [file.name for file in files if self._digests(file) is not None]
        if self.directory.is_dir():
            wanted = {path for name in usable for path in self._paths(name)}
            for path in self.directory.iterdir():
                if path not in wanted:
                    path.unlink()
        return usable

    def take(self, file: PlannedFile, destination: Path) -> Digests | None:
        """Put the file there if an earlier run of the same work had finished it; else None."""
        digests = self._digests(file)
        if digests is not None:
            try:
                os.link(self._paths(file.name)[0], destination / file.name)
            except OSError:
                return None
        return digests

    def keep(self, file: PlannedFile, destination: Path, digests: Digests) -> None:
        """Remember a file that is complete and on disk."""
        kept, note = self._paths(file.name)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            kept.unlink(missing_ok=True)
            os.link(destination / file.name, kept)
            unfinished = note.with_suffix(".part")
            unfinished.write_text(json.dumps({"work": self.work, "digests": digests}))
            unfinished.rename(note)
        except OSError:
            # a file system without hard links, or a full one: an interrupted run would write this file again
            kept.unlink(missing_ok=True)

    def _digests(self, file: PlannedFile) -> Digests | None:
        kept, note = self._paths(file.name)
        try:
            content = read_json(note)
            digests = {
                key: (TensorDigest.of_json(base), TensorDigest.of_json(residual))
                for key, (base, residual) in content["digests"].items()
            }
            same_work = content["work"] == self.work and kept.is_file()
        except (BrokenFileError, OSError, ValueError, KeyError, TypeError, AttributeError):
            # nothing is there, or no whole note of it
            return None
        held = {key: (residual.dtype, residual.shape) for key, (_, residual) in digests.items()}
        planned = {key: (dtype_name(dtype), shape) for key, (dtype, shape) in file.entries.items()}
        return digests if same_work and held == planned else None

    def _paths(self, name: str) -> tuple[Path, Path]:
        return self.directory / name, self.directory / f"{name}.json"
