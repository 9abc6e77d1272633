"""Independent pieces of file work, over ranks and over cores: reading, hashing and arithmetic all release the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from loraga_dist.ranks.balance import balance

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
    """The items dealt out to `count` ranks, with about as many bytes each."""
    return balance(items, num_bytes, [0] * count)
