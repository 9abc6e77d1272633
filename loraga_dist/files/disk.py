"""What all that read and write files do alike: bound what is read, name what the disk refuses, see that it is there."""

from __future__ import annotations

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraga_dist.errors import RunError

UNFINISHED_MARK = ".unfinished-by-loraga-dist"
"""An empty file in a directory that is being made or replaced: what a run that died left is known by it."""
MAX_JSON_BYTES = 256 * 2**20
"""Ten times the largest tokenizer and index files there are."""
MAX_NUMBERS_BYTES = 2 * 2**30
"""Of reports and saved states; 200,000 targets of rank 128 have as many, and the largest models a quarter of these."""
_MAX_NESTING = 100
"""Readers that come after ours recurse, and end the process at some depth."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class BrokenFileError(RunError):
    """A file is missing, cut short or not what its format wants; the text names it."""


def read_json(path: Path) -> Any:
    """The content of a JSON file of bounded size and nesting; raises BrokenFileError, which says what it is instead."""
    return parse_json(read_bounded(path, MAX_JSON_BYTES), path.name)


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file that is no larger than this; raises BrokenFileError."""
    try:
        if not path.is_file():  # reading a pipe or a device might never end
            raise BrokenFileError(f"{path.name} is no file" if path.exists() else f"{path.name} is missing")
        with path.open("rb") as file:
            # reading allocates all that it may read
            content = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
    except (OSError, ValueError) as error:
        raise BrokenFileError(f"{path.name} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(content) > max_bytes:
        raise BrokenFileError(f"{path.name} has more than {max_bytes} bytes")
    return content


def parse_json(content: bytes, name: str, *, unique_keys: bool = False) -> Any:
    """The value of a JSON text; raises BrokenFileError, beginning with `name`, for what is none or too deeply nested.

    unique_keys: refuse an object that names a key twice; readers differ in which one counts.
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError as error:
        raise BrokenFileError(f"{name} is nested more than {_MAX_NESTING} deep") from error
    except ValueError as error:
        raise BrokenFileError(f"{name} is not JSON ({error})") from error
    level = [value]
    for _ in range(_MAX_NESTING):
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, dict | list)
        ]
        if not level:
            break
    else:
        raise BrokenFileError(f"{name} is nested more than {_MAX_NESTING} deep")
    # half a character, which cannot be printed or handed to another reader
    if "\\ud" in text.lower() and _LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise BrokenFileError(f"{name} is not JSON (it holds half a character)")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"it names {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} twice")
    return content


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
    write_text(path, json_text(content), phase)


def json_text(content: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(content, indent=2) + "\n"


def sync(path: Path) -> None:
    """Have the file's content, or the directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems have no such thing for directories
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
