"""Safetensors checkpoints without mapping them: validated headers, ranged reads, streamed writes."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from loraga_dist.errors import RunError
from loraga_dist.files.disk import BrokenFileError, parse_json, read_json, write_json

Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own readers
_MAX_DIMENSIONS = 64
_CAST_ELEMENTS = 1 << 22
"""Read at a time where they cannot be read in place: 16 MiB in float32."""
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor's bytes lie."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of the first byte, from the start of the file."""
    num_bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self) -> Tensor:
        """The whole tensor, in a fresh CPU buffer; raises RunError on a short read."""
        return read_range(self, 0, self.numel).view(self.shape)

    def fill(self, start: int, elements: Tensor) -> None:
        """Fill `elements` from element `start` of the flattened tensor on, cast to their dtype; raises RunError.

        elements: 1-D, contiguous, on any device.
        """
        if elements.dtype == self.dtype and elements.device.type == "cpu":
            return read_into(self, start, elements)
        for block in elements.split(_CAST_ELEMENTS):
            block.copy_(read_range(self, start, start + block.numel()))
            start += block.numel()


def scan_checkpoint(directory: Path, stem: str = "model") -> dict[str, TensorSlot]:
    """As `read_checkpoint_index`, for any directory with `<stem>.safetensors` or `<stem>.safetensors.index.json`.

    Raises BrokenFileError.
    """
    single = directory / f"{stem}.safetensors"
    if single.is_file():
        return read_header(single)
    index_path = directory / f"{stem}.safetensors.index.json"
    if not index_path.is_file():
        raise BrokenFileError(_nothing_to_read(directory, single.name))
    try:
        weight_map = read_json(index_path)["weight_map"]
        shards = {name: PurePosixPath(file_name) for name, file_name in weight_map.items()}
    except (BrokenFileError, KeyError, TypeError, AttributeError) as error:
        raise BrokenFileError(
            f"{index_path.name} is not a JSON index with a weight_map; copy or download it again"
        ) from error

    headers: dict[PurePosixPath, dict[str, TensorSlot]] = {}
    slots: dict[str, TensorSlot] = {}
    for name, shard in shards.items():
        if shard not in headers:
            # by name alone: the links of a hub cache lead outside the directory too
            if shard.is_absolute() or ".." in shard.parts:
                raise BrokenFileError(
                    f"{index_path.name} names {str(shard)!r}, outside the directory; remove that entry"
                )
            if not _is_file(directory / shard):
                raise BrokenFileError(f"shard {str(shard)[:200]} is missing; copy or download it again")
            headers[shard] = read_header(directory / shard)
        if name not in headers[shard]:
            raise BrokenFileError(
                f"{index_path.name} places {name} in {shard}, which does not hold it; "
                "copy or download index and shards again, of one revision"
            )
        slots[name] = headers[shard][name]
    return slots


def write_index(directory: Path, stem: str, weight_map: Mapping[str, str], num_bytes: int) -> None:
    """Write the index of tensors in several files, which `scan_checkpoint` reads: name -> file; raises RunError."""
    content = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    write_json(directory / f"{stem}.safetensors.index.json", content)


def read_header(path: Path) -> dict[str, TensorSlot]:
    """The tensors of one file, checked against the format and the file's size. Raises BrokenFileError."""
    if not _is_file(path):  # a pipe's reader might wait for ever
        raise BrokenFileError(f"{path.name} is missing")
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            data_start = 8 + header_bytes
            if file_bytes < 8 or data_start > file_bytes and header_bytes <= _MAX_HEADER_BYTES:
                raise _truncated(path, max(data_start, 8), file_bytes)
            if header_bytes > _MAX_HEADER_BYTES:
                raise _broken(path, f"claims {header_bytes} bytes")
            raw = file.read(header_bytes)
    except OSError as error:
        raise BrokenFileError(f"{path.name} cannot be read ({error.strerror})") from error
    try:
        header = parse_json(raw, path.name, unique_keys=True)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise TypeError("metadata are texts")
        items = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    except (BrokenFileError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, "is not JSON of the format") from error

    slots: dict[str, TensorSlot] = {}
    position = 0
    for name, entry in items:
        slot = _slot(path, name, entry, data_start)
        if slot.offset != data_start + position:
            raise _broken(path, f"leaves a gap or an overlap before {name}")
        position += slot.num_bytes
        slots[name] = slot
    if data_start + position > file_bytes:
        raise _truncated(path, data_start + position, file_bytes)
    if data_start + position < file_bytes:
        raise _broken(path, f"accounts for {data_start + position} of {file_bytes} bytes")
    return slots


def read_range(slot: TensorSlot, start: int, end: int) -> Tensor:
    """Elements [start, end) of the flattened tensor, 1-D, in a fresh CPU buffer. Raises RunError on a short read."""
    assert 0 <= start <= end <= slot.numel, (slot, start, end)
    elements = torch.empty(end - start, dtype=slot.dtype)
    read_into(slot, start, elements)
    return elements


def read_into(slot: TensorSlot, start: int, elements: Tensor) -> None:
    """Fill `elements` from element `start` of the flattened tensor on. Raises RunError on a short read.

    elements: 1-D, contiguous, on the CPU, of the file's dtype.
    """
    assert elements.dtype == slot.dtype and elements.is_contiguous(), (slot, elements.dtype)
    assert 0 <= start <= start + elements.numel() <= slot.numel, (slot, start, elements.numel())
    buffer = as_bytes(elements)
    position = slot.offset + start * slot.dtype.itemsize
    try:
        with slot.path.open("rb", buffering=0) as file:
            file.seek(position)
            while buffer:
                num_read = file.readinto(buffer)
                if not num_read:
                    raise RunError(
                        f"{slot.path} ended at byte {position}, within {slot.name}; it changed during the run"
                    )
                buffer, position = buffer[num_read:], position + num_read
    except OSError as error:
        raise RunError(f"{slot.path} cannot be read ({error.strerror})") from error


def read_rows(slot: TensorSlot, row0: int, row1: int) -> Tensor:
    """Rows [row0, row1) of the first axis, in a fresh CPU buffer. Raises RunError on a short read."""
    row_elements = math.prod(slot.shape[1:])
    return read_range(slot, row0 * row_elements, row1 * row_elements).view(row1 - row0, *slot.shape[1:])


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row order; of a contiguous one, its own memory."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    """The format's own name of a dtype, such as BF16."""
    return _DTYPE_NAMES[dtype]


class SafetensorsWriter:
    """Writes one safetensors file front to back, holding no more than the chunk it is given.

    entries: name -> (dtype, shape), in the order in which the tensors will be appended. The file appears under its
    name only when it is complete and on disk; a `with` block left by an exception leaves nothing.
    Raises RunError when the file system refuses, or the directory is gone: made again, what another rank has removed
    after a failure would be no staged directory that a run knows.
    """

    def __init__(self, path: Path, entries: Entries) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".part")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._pending: deque[tuple[str, torch.dtype, int]] = deque()
        position = 0
        for name, (dtype, shape) in entries.items():
            numel = math.prod(shape)
            assert position % dtype.itemsize == 0, f"{name} would be misaligned; put wider dtypes first"
            end = position + numel * dtype.itemsize
            header[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [position, end]}
            position = end
            if numel:
                self._pending.append((name, dtype, numel))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self.num_bytes = len(self._header) + position

    def __enter__(self) -> SafetensorsWriter:
        with self._named_errors():
            self._file = self._partial.open("wb", buffering=0)
            try:
                self._write(memoryview(self._header))
            except OSError:
                self._discard()
                raise
        return self

    def append(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor, or its next elements when it comes in chunks."""
        if tensor.numel() == 0:
            return
        expected, dtype, left = self._pending.popleft()
        assert (name, tensor.dtype) == (expected, dtype), f"{name} ({tensor.dtype}) where {expected} ({dtype}) is due"
        assert tensor.numel() <= left, f"{name}: {tensor.numel()} elements where {left} are left"
        if tensor.numel() < left:
            self._pending.appendleft((name, dtype, left - tensor.numel()))
        with self._named_errors():
            self._write(as_bytes(tensor))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert not self._pending, f"{self._pending[0][0]} was not written"
                with self._named_errors():
                    os.fsync(self._file.fileno())
                    os.replace(self._partial, self.path)
        finally:
            self._discard()

    def _discard(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"{self.path} ({self.num_bytes} bytes) cannot be written ({error.strerror})") from error


def _slot(path: Path, name: str, entry: dict[str, Any], data_start: int) -> TensorSlot:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"describes {name} incompletely") from error
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        shown = str(dtype)[:20]
        raise BrokenFileError(f"{path.name} holds {name} as {shown}, which is not supported; use an unquantized model")
    # torch takes no size beyond these, even of a tensor without elements
    whole = all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end))
    fits = whole and len(shape) <= _MAX_DIMENSIONS and math.prod(max(1, length) for length in shape) < 2**63
    if not fits or end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise _broken(path, f"gives {name} a size that is not its shape's")
    return TensorSlot(name, path, _DTYPES[dtype], shape, data_start + begin, end - begin)


def _is_file(path: Path) -> bool:
    """As Path.is_file; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _truncated(path: Path, expected_bytes: int, file_bytes: int) -> BrokenFileError:
    return BrokenFileError(
        f"{path.name} is truncated: {expected_bytes} bytes expected, {file_bytes} there; copy or download it again"
    )


def _broken(path: Path, problem: str) -> BrokenFileError:
    return BrokenFileError(f"{path.name} is broken: its header {problem}; copy or download it again")


def _nothing_to_read(directory: Path, wanted: str) -> str:
    if not directory.is_dir():
        return f"{directory} is not a directory"
    if (directory / "adapter_config.json").is_file():
        return "holds a PEFT adapter, not a model; merge it into its base first, or write the base"
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        return f"holds pickled weights only ({pickles[0]}), which are never loaded; save_pretrained it as safetensors"
    return f"holds neither {wanted} nor {wanted}.index.json"
