"""Independent pieces of file work, over ranks and over cores: reading, hashing and arithmetic all release the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MAX_THREADS = 8
"""Per process: ranks share a node's cores, and files come no faster from more."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_cores(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function of every item, in order; several threads, each with single-threaded torch."""
    threads = min(len(os.sched_getaffinity(0)), MAX_THREADS)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(function, items)


def shares(items: Iterable[Item], num_bytes: Callable[[Item], int], count: int) -> list[list[Item]]:
    """The items dealt out to `count` ranks: largest first, to the rank with the fewest bytes so far."""
    dealt: list[list[Item]] = [[] for _ in range(count)]
    loads = [0] * count
    for item in sorted(items, key=lambda item: -num_bytes(item)):
        rank = loads.index(min(loads))
        dealt[rank].append(item)
        loads[rank] += num_bytes(item)
    return dealt
