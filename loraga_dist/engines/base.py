"""What every gradient engine takes and gives."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from loraga_dist.engines.home import StateHome
from loraga_dist.engines.product import square_bytes
from loraga_dist.linalg import TruncatedSVD, regression_bytes


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
    moment_shape: tuple[int, ...] | None = None
    """Of the second moment of its input, (N, N) or its diagonal (N,); None where it is not asked for."""
    is_routed: bool = False
    """Its rows are the tokens that were sent to it: in any order, and in some microbatches or on some ranks none. Every
    other matrix has a row for each token of every microbatch."""
    row_share: float = 1.0
    """Rows it is expected to have, of all tokens."""

    @property
    def num_kept(self) -> int:
        """Triplets of a result: all K of a gradient; of a regression, what was made from converged ones."""
        return self.width if self.moment_shape is None else self.num_triplets

    @property
    def moment_bytes(self) -> int:
        return 0 if self.moment_shape is None else 4 * math.prod(self.moment_shape)

    @property
    def moment_flops_per_token(self) -> int:
        """A square is summed on and below its diagonal alone."""
        return 0 if self.moment_shape is None else math.prod(self.moment_shape)

    @property
    def regression_bytes(self) -> int:
        """Taken for a moment by the owner, for what its triplets are made into."""
        return 0 if self.moment_shape is None else regression_bytes(self.N, self.width, math.prod(self.moment_shape))

    @property
    def regression_cost(self) -> int:
        """Of that work, in the unit of `GradientEngine.cost`: a Cholesky factorization and solves."""
        return 0 if self.moment_shape is None or len(self.moment_shape) < 2 else 2 * self.N**3 // 3

    def expected_rows(self, num_tokens: int) -> int:
        return math.ceil(self.row_share * num_tokens)

    def input_bytes(self, num_tokens: int) -> int:
        """For a moment: a float32 copy, or a product before it is added."""
        return 0 if self.moment_shape is None else square_bytes(num_tokens, self.N)

    @property
    def triplet_bytes(self) -> int:
        """Of a result, in float32."""
        return 4 * self.num_kept * (self.M + self.N + 1)


@dataclass(frozen=True)
class Amount:
    """Calibration data, over all ranks: what the cost of an engine depends on beside the matrix."""

    num_tokens: int
    num_microbatches: int
    dtype: torch.dtype = torch.float32
    """Of x and dy."""

    def flops(self, flops_per_token: int) -> int:
        """Of products with all of it, in flops of a large float32 product of the same duration."""
        flops = self.num_tokens * flops_per_token
        return flops // _FASTER_16_BIT if self.dtype.itemsize == 2 else flops


USUAL_AMOUNT = Amount(num_tokens=256 * 1024, num_microbatches=256)
"""Where the data is not known yet."""

_FASTER_16_BIT = 4
"""Large products of bfloat16 against float32: 4.3 times on one thread of an AVX512-BF16 processor."""

FLOPS_PER_BYTE = 250
"""Flops of a large float32 product in the time that a collective takes for a byte: gloo, two ranks of a core each."""


@dataclass(frozen=True, kw_only=True)
class GradientSVD:
    """The leading triplets of a mean gradient, or of the regression behind it, and what is known of their quality."""

    svd: TruncatedSVD
    captured_energy: float
    """Share of ||G||_F^2 in the wanted triplets."""
    split_half_cosine: float | None
    """cos(G_even, G_odd) over halves of the data, from a Gaussian sketch; None with a single half."""
    subspace_cosine: float | None = None
    """The same of what both halves have in the span of the wanted left vectors."""
    input_rank: float | None = None
    """(tr C)^2 / ||C||_F^2 of the second moment C of the input, where it is known."""
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


Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtypes and shapes by name."""


class Tensors(Protocol):
    """Saved tensors by name, read when asked for."""

    def __getitem__(self, name: str, /) -> Tensor: ...


@dataclass(frozen=True)
class EngineState:
    """What accumulation goes on from, on any number of ranks: sums over ranks, each with the matrix's owner."""

    content: dict[str, Any]
    """Counts, as JSON; the same on every rank."""
    tensors: dict[str, Tensor]
    """Of the matrices this rank owns, on the host."""


ERROR_COLUMNS = 16
"""Width of the Gaussian error sketches; the energy they estimate is within about 0.02 of the truth."""


def split_half_cosine(E_2MS: Tensor) -> float | None:
    """Cosine between the mean gradients of even and odd microbatches, from their error sketches; None where one of them
    is zero, as that of a half without microbatches is."""
    even, odd = E_2MS.double()
    norms = (even.norm() * odd.norm()).item()
    return (even * odd).sum().item() / norms if norms else None


class GradientEngine(ABC):
    """Accumulates (x, dy) of one group of matrices over passes over the data, then factorizes what it owns.

    Its class says beforehand what one matrix takes of one rank. Bytes are an upper bound of the tensors alive at once.
    dtype: of x and dy. num_tokens: of the largest microbatch.
    """

    refines: ClassVar[bool] = False
    """Whether further passes over the same data bring something."""

    def __init__(self, matrices: Sequence[Matrix], *, home: StateHome, seed: int, dtype: torch.dtype) -> None:
        self._matrices = {matrix.name: matrix for matrix in matrices}
        self._home = home
        self._seed = seed
        self._dtype = dtype
        self._half = 0

    def begin_microbatch(self, index: int) -> None:
        self._half = index % 2

    def is_routed(self, name: str) -> bool:
        return self._matrices[name].is_routed

    @abstractmethod
    def observe(self, name: str, x_TN: Tensor, dy_TM: Tensor) -> None: ...

    @abstractmethod
    def end_microbatch(self, world: Collectives) -> None:
        """After every backward, on all ranks."""

    @abstractmethod
    def split_half_cosines(self, world: Collectives) -> list[float | None]:
        """Of the owned matrices, over the data so far; a collective."""

    def begin_refinement(self, world: Collectives) -> None:
        """Before each further pass, of an engine that refines; a collective."""
        raise NotImplementedError

    @abstractmethod
    def save_state(self, world: Collectives) -> EngineState:
        """Between microbatches, a collective. The owners' sums replace the ranks' parts; accumulation can go on."""

    @abstractmethod
    def load_state(self, content: dict[str, Any], tensors: Tensors, world: Collectives) -> None:
        """Into a fresh engine of the same matrices, whoever owns them now."""

    @classmethod
    @abstractmethod
    def check_state(cls, matrix: Matrix, content: dict[str, Any], saved: Entries) -> None:
        """Raise ValueError, KeyError or TypeError for a saved state that `load_state` could not take.

        content: of all matrices of this engine. saved: the tensors of this one, by what follows its name.
        """

    @abstractmethod
    def collect(self, world: Collectives) -> None:
        """Reduce every matrix to its owner, when all data was seen; a collective, and the last one."""

    @abstractmethod
    def results(self, num_tokens: int) -> Iterator[tuple[str, GradientSVD]]:
        """Factorize what was collected and is owned, without other ranks. The state is gone afterwards."""

    def factorize(self, world: Collectives, num_tokens: int) -> Iterator[tuple[str, GradientSVD]]:
        """Collect, then yield the results."""
        self.collect(world)
        yield from self.results(num_tokens)

    @staticmethod
    @abstractmethod
    def width(num_triplets: int, M: int, N: int, oversampling: int | None) -> int:
        """K, at most min(M, N). oversampling: the user's; None for the engine's own rule."""

    @staticmethod
    def suits(matrix: Matrix) -> bool:
        """Whether `auto` may take this engine; it takes the one of the least cost among those that suit."""
        return True

    @classmethod
    def cost(cls, matrix: Matrix, amount: Amount) -> int:
        """Of one pass over the data and all that follows, in flops of a large float32 product of the same duration.

        Of all ranks together, so that it is the same however many there are.
        """
        traffic_bytes = cls.traffic_bytes(matrix, amount.num_microbatches, 0)
        return (
            amount.flops(cls.flops_per_token(matrix)) + cls.factorization_cost(matrix) + FLOPS_PER_BYTE * traffic_bytes
        )

    @staticmethod
    @abstractmethod
    def state_bytes(matrix: Matrix) -> int:
        """At most, whatever the dtype and the owner: what `gradient.state_budget_gib` counts."""

    @classmethod
    def held_bytes(cls, matrix: Matrix, dtype: torch.dtype, *, owned: bool) -> int:
        """State after the first microbatch."""
        return cls.state_bytes(matrix)

    @classmethod
    def cold_bytes(cls, matrix: Matrix, dtype: torch.dtype, num_tokens: int) -> int:
        """State at the end of the first microbatch, before `end_microbatch`."""
        return cls.state_bytes(matrix)

    @staticmethod
    @abstractmethod
    def observation_bytes(matrix: Matrix, dtype: torch.dtype, num_tokens: int) -> int:
        """Taken for a moment by `observe`."""

    @staticmethod
    def refresh_bytes(matrices: Sequence[Matrix]) -> int:
        """Taken for a moment by the owner of all these, in `end_microbatch` and before the first of the `results`."""
        return 0

    @staticmethod
    @abstractmethod
    def factorization_bytes(matrix: Matrix) -> int:
        """Taken for a moment by the owner in `results`."""

    @staticmethod
    @abstractmethod
    def factorization_cost(matrix: Matrix) -> int:
        """Of the owner's work in `results`, in the unit of `cost`; owners are balanced by it."""

    @staticmethod
    @abstractmethod
    def flops_per_token(matrix: Matrix) -> int:
        """Of one pass."""

    @staticmethod
    @abstractmethod
    def traffic_bytes(matrix: Matrix, num_microbatches: int, refine_passes: int) -> int:
        """Sent through collectives over all passes. num_microbatches: per rank and pass."""


@contextmanager
def naming(matrix: Matrix, num_others: int = 0) -> Iterator[None]:
    """Have an error of linear algebra, or of memory, say which matrix it is about, or which batch of equal ones."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not hasattr(error, "__notes__"):  # within a batch, one may have been named
            others = f" (or of {num_others} others of this shape)" if num_others else ""
            error.add_note(f"of {matrix.name}, {matrix.M} x {matrix.N}{others}")
        raise


def require_entries(saved: Entries, expected: Entries) -> None:
    """Raise ValueError for the first of these tensors that is missing or another."""
    for name, entry in expected.items():
        if saved.get(name) != entry:
            raise ValueError(f"{name} is {saved.get(name)} and not {entry}")


def gather_on_owner_(tensor: Tensor, owner: int, world: Collectives) -> bool:
    """Sum over ranks into the owner's tensor and zero the others', so that later sums are right; True on the owner."""
    world.reduce_(tensor, owner)
    if world.rank != owner:
        tensor.zero_()
    return world.rank == owner


def drop_noise_(S_K: Tensor, num_rows: int) -> None:
    """Zero the singular values beyond the rows of a gradient: rounding's, which in 16 bits look like directions."""
    S_K[num_rows:] = 0


def seeded_generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A generator that depends on the seed and the target's name alone, not on rank or order."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
