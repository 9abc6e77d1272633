"""What every writer of files does alike: name what the disk refuses, and see that it is on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraga_dist.errors import RunError


@contextmanager
def naming_write_errors(path: Path, phase: str = "") -> Iterator[None]:
    """Turn an OSError of the block into a RunError that names the file; `path` where the system does not say which."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{phase}{error.filename or path} cannot be written ({error.strerror})") from error


def write_text(path: Path, text: str, phase: str = "") -> None:
    """Write a text file; raises RunError, as `naming_write_errors` does."""
    with naming_write_errors(path, phase):
        path.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, phase: str = "") -> None:
    """Write a JSON file that people may read, too; raises RunError, as `naming_write_errors` does."""
    write_text(path, json.dumps(content, indent=2) + "\n", phase)


def sync(path: Path) -> None:
    """Have the file's content, or the directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
