"""Tensors whose elements lie in several tensors of a checkpoint, one after the other."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from loraga_dist.files.safetensors_io import TensorSlot, read_into, read_range

_CAST_ELEMENTS = 1 << 22
"""Read at a time where they cannot be read in place: 16 MiB in float32."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its flattened elements are those of these tensors of the files, in this order."""

    shape: tuple[int, ...]
    slots: tuple[TensorSlot, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def starts(self) -> list[int]:
        """The position of every slot's first element, and past the last slot's last one."""
        return list(accumulate((slot.numel for slot in self.slots), initial=0))

    @property
    def num_bytes(self) -> int:
        """In the files."""
        return sum(slot.num_bytes for slot in self.slots)

    def pieces(self, start: int, end: int) -> Iterator[tuple[TensorSlot, int, int]]:
        """Elements [start, end): each slot that holds some of them, with the first and past the last in that slot."""
        assert 0 <= start <= end <= self.numel == self.starts[-1], (self, start, end)
        index = bisect_right(self.starts, start) - 1
        while start < end:
            first = start - self.starts[index]
            past = min(end - self.starts[index], self.slots[index].numel)
            if past > first:
                yield self.slots[index], first, past
            start, index = self.starts[index + 1], index + 1

    def row(self, index: int) -> StoredTensor:
        """One of the first axis: of a stack of experts, an expert's matrix."""
        shape = self.shape[1:]
        start = index * math.prod(shape)
        pieces = self.pieces(start, start + math.prod(shape))
        return StoredTensor(shape, tuple(_cut(slot, first, past) for slot, first, past in pieces))

    def read_into(self, start: int, elements: Tensor) -> None:
        """Fill `elements` from element `start` on, cast to their dtype. Raises RunError on a short read.

        elements: 1-D, contiguous, on any device.
        """
        for slot, first, past in self.pieces(start, start + elements.numel()):
            part, elements = elements[: past - first], elements[past - first :]
            if part.dtype == slot.dtype and part.device.type == "cpu":
                read_into(slot, first, part)
                continue
            for block in part.split(_CAST_ELEMENTS):
                block.copy_(read_range(slot, first, first + block.numel()))
                first += block.numel()


class TransposedTensor(StoredTensor):
    """A tensor whose matrices, its last two axes, lie transposed in the files: [..., m, n] is [..., n, m] there."""

    def read_into(self, start: int, elements: Tensor) -> None:
        """As StoredTensor's; each matrix that is touched is read whole."""
        M, N = self.shape[-2:]
        while elements.numel():
            index, first = divmod(start, M * N)
            part, elements = elements[: M * N - first], elements[M * N - first :]
            stored_NM = torch.empty(N, M, dtype=part.dtype)
            super().read_into(index * M * N, stored_NM.view(-1))
            part.copy_(stored_NM.t().reshape(-1)[first : first + part.numel()])
            start += part.numel()


def _cut(slot: TensorSlot, first: int, past: int) -> TensorSlot:
    """Where these elements of the flattened tensor lie; the whole slot as it is."""
    if past - first == slot.numel:
        return slot
    width = slot.dtype.itemsize
    return replace(slot, shape=(past - first,), offset=slot.offset + first * width, num_bytes=(past - first) * width)
