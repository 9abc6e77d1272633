"""Tensors whose elements lie in several tensors of a checkpoint, one after the other."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from loraga_dist.files.quantized import QuantizedSlot
from loraga_dist.files.safetensors_io import Entries, TensorSlot

Slot = TensorSlot | QuantizedSlot


def entries_of(slots: Mapping[str, Slot]) -> Entries:
    """Dtypes and shapes of stored tensors, by the same names."""
    return {name: (slot.dtype, slot.shape) for name, slot in slots.items()}


def read_part(slot: Slot, start: int, end: int) -> Tensor:
    """Elements [start, end) of the flattened tensor, 1-D, in a fresh CPU buffer of its dtype; raises RunError."""
    elements = torch.empty(end - start, dtype=slot.dtype)
    slot.fill(start, elements)
    return elements


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its flattened elements are those of these tensors of the files, in this order."""

    shape: tuple[int, ...]
    slots: tuple[Slot, ...]

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

    def pieces(self, start: int, end: int) -> Iterator[tuple[Slot, int, int]]:
        """Elements [start, end): each slot that holds some of them, with the first and past the last in that slot."""
        assert 0 <= start <= end <= self.numel == self.starts[-1], (self, start, end)
        index = bisect_right(self.starts, start) - 1
        while start < end:
            first = start - self.starts[index]
            past = min(end - self.starts[index], self.slots[index].numel)
            if past > first:
                yield self.slots[index], first, past
            start, index = self.starts[index + 1], index + 1

    def read_into(self, start: int, elements: Tensor) -> None:
        """Fill `elements` from element `start` on, cast to their dtype. Raises RunError on a short read.

        elements: 1-D, contiguous, on any device.
        """
        for slot, first, past in self.pieces(start, start + elements.numel()):
            slot.fill(first, elements[: past - first])
            elements = elements[past - first :]


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
