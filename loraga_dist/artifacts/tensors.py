"""Stored tensors: their dtypes, shapes and bytes, and their elements in pieces, so that nobody holds a large one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from loraga_dist.files.safetensors_io import Entries, TensorSlot, read_range, read_rows
from loraga_dist.model.targets import Target

CHUNK_ELEMENTS = 2**20
"""Elements handled at once. 8 MiB of float64 stay in the cache; larger chunks were up to twice as slow."""


def entries_of(slots: Mapping[str, TensorSlot]) -> Entries:
    """Dtypes and shapes of stored tensors, by the same names."""
    return {name: (slot.dtype, slot.shape) for name, slot in slots.items()}


def num_bytes_of(entries: Iterable[tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Of the elements of all tensors of these dtypes and shapes."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in entries)


def read_chunks(slot: TensorSlot) -> Iterator[Tensor]:
    """The elements of a tensor in order, 1-D pieces; raises RunError on a short read."""
    for start, end in _pieces(slot.numel, CHUNK_ELEMENTS):
        yield read_range(slot, start, end)


def read_row_chunks(target: Target, *slots: TensorSlot) -> Iterator[tuple[int, list[Tensor]]]:
    """(first row, the next rows of every slot) of tensors stored as the target's weight is; raises RunError."""
    for row0, row1 in _pieces(target.stored_shape[0], max(1, CHUNK_ELEMENTS // target.stored_shape[1])):
        yield row0, [read_rows(slot, row0, row1) for slot in slots]


def _pieces(length: int, step: int) -> Iterator[tuple[int, int]]:
    """[0, length) in pieces of at most `step`."""
    for start in range(0, length, step):
        yield start, min(start + step, length)
