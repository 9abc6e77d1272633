"""Stored tensors: their dtypes, shapes and bytes, and their elements in pieces, so that nobody holds a large one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraga_dist.files.safetensors_io import TensorSlot, read_range
from loraga_dist.files.stored_tensors import Slot, read_part
from loraga_dist.model.targets import StoredRows, Target

CHUNK_ELEMENTS = 2**20
"""Elements handled at once. 8 MiB of float64 stay in the cache; larger chunks were up to twice as slow."""


def num_bytes_of(entries: Iterable[tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Of the elements of all tensors of these dtypes and shapes."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in entries)


def read_chunks(slot: TensorSlot) -> Iterator[Tensor]:
    """The elements of a tensor in order, 1-D pieces; raises RunError on a short read."""
    for start, end in _pieces(slot.numel, CHUNK_ELEMENTS):
        yield read_range(slot, start, end)


@dataclass(frozen=True)
class Region:
    """Rows of a target's stored matrix that follow one another in a checkpoint tensor."""

    target: Target
    rows: StoredRows
    row0: int
    """Of the stored matrix: the first."""

    def chunks(self, *slots: Slot) -> Iterator[tuple[int, list[Tensor]]]:
        """(row of the stored matrix, the next rows of every slot) of tensors that are alike; raises RunError."""
        row_numel = self.target.stored_shape[1]
        for start, end in _pieces(self.rows.count, max(1, CHUNK_ELEMENTS // row_numel)):
            first, last = ((self.rows.first + row) * row_numel for row in (start, end))
            yield self.row0 + start, [read_part(slot, first, last).view(-1, row_numel) for slot in slots]


def regions_of(target: Target) -> Iterator[Region]:
    """All of a target's stored matrix, in its order."""
    row0 = 0
    for rows in target.stored_rows:
        yield Region(target, rows, row0)
        row0 += rows.count


def regions_by_key(targets: Iterable[Target]) -> dict[str, list[Region]]:
    """What each checkpoint tensor that holds targets consists of, in its order."""
    found: dict[str, list[Region]] = {}
    for target in targets:
        for region in regions_of(target):
            found.setdefault(region.rows.key, []).append(region)
    return {key: sorted(regions, key=lambda region: region.rows.first) for key, regions in found.items()}


def weight_chunks(target: Target, index: Mapping[str, Slot]) -> Iterator[tuple[int, Tensor]]:
    """(first row, the next rows) of a target's stored matrix; raises RunError on a short read."""
    for region in regions_of(target):
        for row0, (rows,) in region.chunks(index[region.rows.key]):
            yield row0, rows


def _pieces(length: int, step: int) -> Iterator[tuple[int, int]]:
    """[0, length) in pieces of at most `step`."""
    for start in range(0, length, step):
        yield start, min(start + step, length)
