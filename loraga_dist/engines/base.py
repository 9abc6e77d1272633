"""What every gradient engine takes and gives."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loraga_dist.linalg import TruncatedSVD


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One weight whose gradient is wanted: G_MN, and how many leading singular triplets of it."""

    name: str
    M: int
    N: int
    num_triplets: int
    width: int
    """K: columns of the factorization, `num_triplets` and more."""
    owner: int
    """The rank that factorizes it."""
    engine: str
    """A key of ENGINES."""


@dataclass(frozen=True, kw_only=True)
class GradientSVD:
    """The leading triplets of a mean gradient, with what is known about their quality."""

    svd: TruncatedSVD
    captured_energy: float
    """Share of ||G||_F^2 in the wanted triplets."""
    split_half_cosine: float | None
    """cos(G_even, G_odd) over halves of the data, from a Gaussian sketch; None with a single half."""
    window_capture: float | None = None
    """Smallest share of a window's energy that its sketch held, relative to the best window before; None without
    windows. A drop says that the data changed on the way."""


class Collectives(Protocol):
    """The part of the process group an engine uses."""

    @property
    def rank(self) -> int: ...

    def reduce_(self, tensor: Tensor, owner: int) -> None: ...

    def broadcast_(self, tensor: Tensor, owner: int) -> Tensor: ...

    def sum_(self, tensor: Tensor) -> Tensor: ...


class Tensors(Protocol):
    """Saved tensors by name, read when asked for."""

    def __getitem__(self, name: str, /) -> Tensor: ...

    def __contains__(self, name: str, /) -> bool: ...


@dataclass(frozen=True)
class EngineState:
    """What accumulation goes on from, on any number of ranks: sums over ranks, each with the matrix's owner."""

    content: dict[str, Any]
    """Counts, as JSON; the same on every rank."""
    tensors: dict[str, Tensor]
    """Of the matrices this rank owns, on the host."""


ERROR_COLUMNS = 16
"""Width of the Gaussian error sketches; the energy they estimate is within about 0.02 of the truth."""


def split_half_cosine(E_2MS: Tensor, halves_seen: int) -> float | None:
    """Cosine between the mean gradients of even and odd microbatches, from their error sketches."""
    if halves_seen < 2:
        return None
    even, odd = E_2MS.double()
    norms = (even.norm() * odd.norm()).item()
    return (even * odd).sum().item() / norms if norms else 0.0


class GradientEngine(Protocol):
    """Accumulates (x, dy) of one group of matrices over one sweep of the data, then factorizes what it owns."""

    def begin_microbatch(self, index: int) -> None: ...

    def observe(self, name: str, x_TN: Tensor, dy_TM: Tensor) -> None: ...

    def end_microbatch(self, world: Collectives) -> None:
        """After every backward, on all ranks."""
        ...

    def split_half_cosines(self, world: Collectives) -> list[float | None]:
        """Of the owned matrices, over the data so far; a collective."""
        ...

    def save_state(self, world: Collectives) -> EngineState:
        """Between microbatches, a collective. The owners' sums replace the ranks' parts; accumulation can go on."""
        ...

    def load_state(self, content: dict[str, Any], tensors: Tensors, world: Collectives) -> None:
        """Into a fresh engine of the same matrices, whoever owns them now."""
        ...

    def factorize(self, world: Collectives, num_tokens: int) -> Iterator[tuple[str, GradientSVD]]:
        """Reduce every matrix to its owner; yield the owned ones. The state is gone afterwards."""
        ...


def gather_on_owner_(tensor: Tensor, owner: int, world: Collectives) -> bool:
    """Sum over ranks into the owner's tensor and zero the others', so that later sums are right; True on the owner."""
    world.reduce_(tensor, owner)
    if world.rank != owner:
        tensor.zero_()
    return world.rank == owner


def seeded_generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A generator that depends on the seed and the target's name alone, not on rank or order."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
