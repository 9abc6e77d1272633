"""Digests: of weights whatever files they are split over, and of the files themselves."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from loraga_dist.artifacts.names import CHECKSUMS
from loraga_dist.artifacts.parallel import over_cores
from loraga_dist.errors import RunError

OnBytes = Callable[[int], None]
"""Told how many more bytes are done, now and then."""

_CHUNK_BYTES = 8 * 2**20
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<name>.+)")


class TensorDigest(NamedTuple):
    """What a tensor is: its dtype (safetensors' name), shape and the SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def no_progress(num_bytes: int) -> None:
    """The `OnBytes` of a caller who does not want to know."""


def fingerprint(digests: Mapping[str, TensorDigest]) -> str:
    """One `sha256:...` for a set of named tensors, the same however they are split over files."""
    lines = [json.dumps([key, dtype, list(shape), sha256]) for key, (dtype, shape, sha256) in sorted(digests.items())]
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_checksums(directory: Path, on_progress: OnBytes = no_progress) -> None:
    """Write SHA256SUMS over every other file of the tree, as `sha256sum -c` reads it. Raises RunError."""
    try:
        names = sorted(_files(directory))
        assert not any("\n" in name or "\\" in name for name in names), "sha256sum would want these names escaped"
        digests = over_cores(lambda name: _sha256(directory / name, on_progress), names)
        lines = [f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)]
        (directory / CHECKSUMS).write_text("".join(lines))
    except OSError as error:
        raise RunError(f"{directory / CHECKSUMS} cannot be written ({error.strerror}: {error.filename})") from error


def check_checksums(directory: Path, on_progress: OnBytes = no_progress) -> list[str]:
    """What differs from SHA256SUMS, one line each.

    Directories with listed files are closed: a loader would read a file that was added to one. The top is not.
    """
    try:
        text = (directory / CHECKSUMS).read_text()
    except (OSError, UnicodeDecodeError):
        return [f"{CHECKSUMS}: cannot be read"]
    *lines, rest = text.split("\n")
    matches = [_LINE.fullmatch(line) for line in lines]
    if rest or not all(matches):
        return [f"{CHECKSUMS}: is not in sha256sum's format"]
    listed = {match["name"]: match["digest"] for match in matches if match}

    present = _files(directory)

    def check(name: str) -> str | None:
        if name not in present:
            return f"{name}: is missing"
        try:
            return (
                None
                if _sha256(directory / name, on_progress) == listed[name]
                else f"{name}: does not match {CHECKSUMS}"
            )
        except OSError as error:
            return f"{name}: cannot be read ({error.strerror})"

    problems = [problem for problem in over_cores(check, listed) if problem]
    closed = {name.split("/")[0] for name in listed if "/" in name}
    problems += [
        f"{name}: is not listed in {CHECKSUMS}"
        for name in sorted(present - listed.keys())
        if "/" in name and name.split("/")[0] in closed
    ]
    return problems


def _files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()} - {CHECKSUMS}


def _sha256(path: Path, on_progress: OnBytes) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            on_progress(len(chunk))
    return digest.hexdigest()
