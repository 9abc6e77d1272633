"""Work dealt out to ranks."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def balance(items: Iterable[Item], cost: Callable[[Item], int], loads: list[int]) -> list[list[Item]]:
    """Deal the items out to the ranks by greedy bin packing: the costliest first, each to the rank with least so far.

    loads: what every rank has already, and afterwards has. Equals go by their order, to the lowest rank.
    """
    dealt: list[list[Item]] = [[] for _ in loads]
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for item in sorted(items, key=cost, reverse=True):
        load, rank = heap[0]
        dealt[rank].append(item)
        loads[rank] = load + cost(item)
        heapq.heapreplace(heap, (loads[rank], rank))
    return dealt
