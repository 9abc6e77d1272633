"""Digests: of weights whatever files they are split over, and of the files themselves."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from loraga_dist.errors import RunError
from loraga_dist.files.disk import MAX_JSON_BYTES, UNFINISHED_MARK, BrokenFileError, read_bounded, write_text
from loraga_dist.files.parallel import over_cores, shares
from loraga_dist.files.safetensors_io import as_bytes, dtype_name
from loraga_dist.ranks.world import World

OnBytes = Callable[[int], None]
"""Told how many more bytes are done, now and then."""

CHECKSUMS = "SHA256SUMS"
_CHUNK_BYTES = 8 * 2**20
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<name>.+)")


class TensorDigest(NamedTuple):
    """What a tensor is: its dtype (safetensors' name), shape and the SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorDigest:
        """Of a tensor on the host."""
        return cls(dtype_name(tensor.dtype), tuple(tensor.shape), hashlib.sha256(as_bytes(tensor)).hexdigest())

    @classmethod
    def of_json(cls, parts: Sequence[Any]) -> TensorDigest:
        dtype, shape, sha256 = parts
        return cls(dtype, tuple(shape), sha256)


def no_progress(num_bytes: int) -> None:
    """The `OnBytes` of a caller who does not want to know."""


def fingerprint(digests: Mapping[str, TensorDigest]) -> str:
    """One `sha256:...` for a set of named tensors, the same however they are split over files."""
    lines = [json.dumps([key, dtype, list(shape), sha256]) for key, (dtype, shape, sha256) in sorted(digests.items())]
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def shared_fingerprint(digests: Mapping[str, TensorDigest], world: World) -> str:
    """The fingerprint of all ranks' tensors; a collective."""
    return fingerprint(
        {key: TensorDigest.of_json(parts) for found in world.all_json(digests) for key, parts in found.items()}
    )


def write_checksums(directory: Path, world: World) -> None:
    """Write SHA256SUMS over every other file of the tree, as `sha256sum -c` reads it; a collective, ranks share it.

    Raises RunError when a file cannot be read or written.
    """
    sizes = _sizes_seen_by_main(directory, world)
    assert not any("\n" in name or "\\" in name for name in sizes), "sha256sum would want these names escaped"
    digests: dict[str, str] = {}
    with world.together():
        mine = _share(sizes, world)
        try:
            digests = dict(zip(mine, over_cores(lambda name: sha256_of(directory / name), mine), strict=True))
        except OSError as error:
            raise RunError(f"{error.filename} cannot be read ({error.strerror})") from error
    everyone = {name: digest for part in world.all_json(digests) for name, digest in part.items()}
    with world.together():
        if world.is_main:
            write_text(directory / CHECKSUMS, "".join(f"{everyone[name]}  {name}\n" for name in sorted(everyone)))


def check_checksums(
    directory: Path, world: World, on_progress: OnBytes = no_progress, *, listed_whole: Collection[str] = ()
) -> list[str]:
    """What differs from SHA256SUMS, one line each, on every rank; a collective, shared by the ranks.

    Directories with listed files are closed: a loader would read a file that was added to one. The top is not.
    listed_whole: files and directories at the top that must be listed, with all below, where they are.
    """
    sizes = _sizes_seen_by_main(directory, world)
    problems: list[str] = []
    with world.together():
        listed = read_checksums(directory)
        if listed is None:
            problems = [f"{CHECKSUMS}: cannot be read, or is not in sha256sum's format"]
        else:
            problems = _check_share(directory, listed, sizes, world, on_progress, listed_whole)
    return list(dict.fromkeys(problem for part in world.all_json(problems) for problem in part))


def _check_share(
    directory: Path,
    listed: Mapping[str, str],
    sizes: Mapping[str, int],
    world: World,
    on_progress: OnBytes,
    listed_whole: Collection[str],
) -> list[str]:
    def check(name: str) -> str | None:
        try:
            same = sha256_of(directory / name, on_progress) == listed[name]
        except OSError as error:
            return f"{name}: cannot be read ({error.strerror})"
        return None if same else f"{name}: does not match {CHECKSUMS}"

    mine = _share({name: size for name, size in sizes.items() if name in listed}, world)
    problems = [problem for problem in over_cores(check, mine) if problem]
    if world.is_main:
        closed = {*listed_whole, *(name.split("/")[0] for name in listed if "/" in name)}
        problems += [f"{name}: is missing" for name in sorted(listed.keys() - sizes.keys())]
        problems += [
            f"{name}: is not listed in {CHECKSUMS}"
            for name in sorted(sizes.keys() - listed.keys())
            if name.split("/")[0] in closed
        ]
    return problems


def read_checksums(directory: Path) -> dict[str, str] | None:
    """Digest by name, None where the file is not what `sha256sum` writes."""
    try:
        *lines, rest = read_bounded(directory / CHECKSUMS, MAX_JSON_BYTES).decode("utf-8").split("\n")
    except (BrokenFileError, UnicodeDecodeError):
        return None
    matches = [match for match in map(_LINE.fullmatch, lines) if match]
    whole = lines and not rest and len(matches) == len(lines)
    return {match["name"]: match["digest"] for match in matches} if whole else None


def _sizes_seen_by_main(directory: Path, world: World) -> dict[str, int]:
    """Bytes of every file but the checksums, as rank 0 sees them: on network file systems others may lag behind."""
    sizes = {}
    if world.is_main:
        left_out = (directory / CHECKSUMS, directory / UNFINISHED_MARK)
        sizes = {
            path.relative_to(directory).as_posix(): path.stat().st_size
            for path in directory.rglob("*")
            if path.is_file() and not path.is_symlink() and path not in left_out
        }
    return world.of_main(sizes)


def _share(sizes: Mapping[str, int], world: World) -> list[str]:
    return shares(sizes, sizes.__getitem__, world.size)[world.rank]


def sha256_of(path: Path, on_progress: OnBytes = no_progress) -> str:
    """Of the file's content, in hexadecimal. on_progress: told of bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            on_progress(len(chunk))
    return digest.hexdigest()


def is_as_written(path: Path, sha256: str, mtime_ns: int | None = None) -> bool:
    """Whether a file still has this digest; it is not read if it was last written at the very time that was noted."""
    return path.is_file() and (path.stat().st_mtime_ns == mtime_ns or sha256_of(path) == sha256)
