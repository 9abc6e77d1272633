"""Independent pieces of file work on all cores: reading, hashing and tensor arithmetic all release the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_cores(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function of every item, in order; one thread per core, each with single-threaded torch."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(function, items)
