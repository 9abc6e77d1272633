"""What every gradient engine takes and gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from loraga_dist.linalg import TruncatedSVD


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One weight whose gradient is wanted: G_MN, and how many leading singular triplets of it."""

    name: str
    M: int
    N: int
    num_triplets: int
    owner: int
    """The rank that factorizes it."""


@dataclass(frozen=True, kw_only=True)
class GradientSVD:
    """The leading triplets of a mean gradient, with what is known about their quality."""

    svd: TruncatedSVD
    captured_energy: float
    """Share of ||G||_F^2 in the wanted triplets."""
    split_half_cosine: float | None
    """cos(G_even, G_odd) over halves of the data, from a Gaussian sketch; None with a single half."""


class Collectives(Protocol):
    """The part of the process group an engine uses."""

    @property
    def rank(self) -> int: ...

    def reduce_(self, tensor: torch.Tensor, owner: int) -> None: ...


class GradientEngine(Protocol):
    """Accumulates (x, dy) of one group of matrices over one sweep of the data, then factorizes what it owns."""

    def begin_microbatch(self, index: int) -> None: ...

    def observe(self, name: str, x_TN: torch.Tensor, dy_TM: torch.Tensor) -> None: ...

    def factorize(self, world: Collectives, num_tokens: int) -> Iterator[tuple[str, GradientSVD]]:
        """Reduce every matrix to its owner; yield the owned ones. The state is gone afterwards."""
        ...
