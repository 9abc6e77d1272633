"""What the sketch engine holds of one target, and what that costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loraga_dist.engines.base import ERROR_COLUMNS, FLOPS_PER_BYTE, Amount, GradientEngine, Matrix
from loraga_dist.engines.home import StateHome
from loraga_dist.engines.product import dtype_of_products

_WINDOW_BYTES = 8
"""Of a window, per column and row of the matrix: Y or Z, and P or Q in 32 bits or twice 16."""
_NARROW = 1.35
"""Time of a flop in products with K columns, in that of a large product: measured in float32."""
_UNION_COPIES = 6
"""M x K and N x K float32 matrices alive at once while a window's sketches are united with the estimate so far."""
_UNION_CORES = 40
"""K x K float64 matrices, the same."""
_BATCH_BYTES = 1 << 29
"""Taken for a moment by a batch of equal matrices, or by a single one that needs more."""


@dataclass
class Window:
    """Bases as the data's dtype has them, and the float32 sketches Y = G Q, Z = G^T P of the data since they were made.

    The error sketch's test matrix Phi_NS stands beside Q, so that one product makes both.
    """

    P_MK: Tensor
    QPhi_NC: Tensor
    Y_MK: Tensor
    Z_NK: Tensor


@dataclass
class State:
    """One target's sketch on this rank. Tensors are where `StateHome` keeps them."""

    matrix: Matrix
    E_2MS: Tensor
    """Error sketches G Phi of even and odd microbatches: since the last refresh, on the owner all that it has."""
    cold: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(x_TN, dy_TM) of the microbatch at hand, while there are no bases."""
    window: Window | None = None
    """None until the target has seen a gradient."""
    num_microbatches: int = 0
    """Of all ranks, since there are bases; those that sent no rank a row with a gradient do not count."""
    refreshed_at: int = 0
    num_rows: int = 0
    """With a gradient, of all ranks in the first pass, of a routed matrix: its gradient has no higher rank."""
    refining: bool = False
    P_rest_MK: Tensor | None = None
    Q_rest_NK: Tensor | None = None
    """On the owner, if the window's bases have 16 bits: 16 more of them."""
    S_K: Tensor | None = None
    """On the owner: singular values of the estimate of sum(dy x^T), whose vectors are P and Q; zero without one."""
    earlier_E_MS: Tensor | None = None
    """On the owner: E of both halves at the last refresh."""
    captures: list[float] = field(default_factory=list)
    """On the owner: share of each window's energy that its own sketch held."""

    @property
    def is_unfinished(self) -> bool:
        return self.num_microbatches > self.refreshed_at

    def bases(self, home: StateHome) -> tuple[Tensor, Tensor]:
        """On the owner: P and Q in float32, of 32 bits or, within some 2^-18 of a column's norm, of twice 16."""
        P_MK, Q_NK = (basis.float() for basis in self._in_window(home))
        if self.P_rest_MK is not None and self.Q_rest_NK is not None:
            P_MK += home.fetch(self.P_rest_MK)
            Q_NK += home.fetch(self.Q_rest_NK)
        return P_MK, Q_NK

    def keep_rest(self, home: StateHome, P_MK: Tensor, Q_NK: Tensor) -> None:
        """On the owner: what the window's 16 bits leave of float32 bases, in 16 bits again."""
        in_P_MK, in_Q_NK = self._in_window(home)
        if in_P_MK.dtype != P_MK.dtype:
            self.P_rest_MK = home.keep((P_MK - in_P_MK).to(in_P_MK.dtype))
            self.Q_rest_NK = home.keep((Q_NK - in_Q_NK).to(in_Q_NK.dtype))

    def _in_window(self, home: StateHome) -> tuple[Tensor, Tensor]:
        assert self.window is not None
        return home.fetch(self.window.P_MK), home.fetch(self.window.QPhi_NC)[:, : self.matrix.width]


def kept_rows(matrix: Matrix, num_tokens: int, itemsize: int) -> int:
    """Rows of x and dy that stand for the first microbatch: all, while the window to come is no smaller, else 2K."""
    K = matrix.width
    if num_tokens * itemsize <= _WINDOW_BYTES * K or num_tokens <= 2 * K:
        return num_tokens
    return min(2 * K, matrix.M, matrix.N)


def union_bytes(matrix: Matrix) -> int:
    """Taken by a single union."""
    K = matrix.width
    return 4 * _UNION_COPIES * K * (matrix.M + matrix.N) + 8 * _UNION_CORES * K**2


def batch_size(matrix: Matrix) -> int:
    """How many matrices of this shape are united at a time."""
    return max(1, _BATCH_BYTES // union_bytes(matrix))


def equal_batches(states: Iterable[State]) -> list[list[State]]:
    """Those of one shape and owner together, as many as are united at a time; in an order that all ranks have."""
    of_kind: dict[tuple[int, ...], list[State]] = {}
    for state in states:
        matrix = state.matrix
        of_kind.setdefault((matrix.M, matrix.N, matrix.width, matrix.owner), []).append(state)
    batches = []
    for equal in of_kind.values():
        size = batch_size(equal[0].matrix)
        batches += [equal[first : first + size] for first in range(0, len(equal), size)]
    return batches


class SketchCosts(GradientEngine):
    """The part of the sketch engine that says beforehand what it takes."""

    @staticmethod
    def width(num_triplets: int, M: int, N: int, oversampling: int | None) -> int:
        """By default the wanted triplets and as many again, 96 at least and 128 at most.

        Measured by benchmarks/accuracy.py. Rounded up to a multiple of 16, which matrix units like.
        """
        if oversampling is None:
            oversampling = min(max(num_triplets, 96), 128)
        return min(-(-(num_triplets + oversampling) // 16) * 16, M, N)

    @staticmethod
    def suits(matrix: Matrix) -> bool:
        # two sketches of that width would be as large as the gradient
        return 2 * matrix.width < min(matrix.M, matrix.N)

    @staticmethod
    def state_bytes(matrix: Matrix) -> int:
        """Accumulators, bases in 16 bits and, on the owner, 16 more; error sketches."""
        M, N = matrix.M, matrix.N
        return _WINDOW_BYTES * matrix.width * (M + N) + 4 * 3 * M * ERROR_COLUMNS + 2 * N * ERROR_COLUMNS

    @staticmethod
    def held_bytes(matrix: Matrix, dtype: torch.dtype, *, owned: bool) -> int:
        M, N, K, dtype = matrix.M, matrix.N, matrix.width, dtype_of_products(dtype)
        window = (4 + dtype.itemsize) * K * (M + N) + 8 * M * ERROR_COLUMNS + dtype.itemsize * N * ERROR_COLUMNS
        rest = 0 if dtype == torch.float32 else dtype.itemsize * K * (M + N)
        return window + (rest + 4 * M * ERROR_COLUMNS if owned else 0)

    @staticmethod
    def cold_bytes(matrix: Matrix, dtype: torch.dtype, num_tokens: int) -> int:
        dtype = dtype_of_products(dtype)
        rows = kept_rows(matrix, num_tokens, dtype.itemsize)
        return dtype.itemsize * rows * (matrix.M + matrix.N) + 8 * matrix.M * ERROR_COLUMNS

    @staticmethod
    def observation_bytes(matrix: Matrix, dtype: torch.dtype, num_tokens: int) -> int:
        largest, given, dtype = max(matrix.M, matrix.N), dtype, dtype_of_products(dtype)
        copies = 0 if dtype == given else dtype.itemsize * num_tokens * (matrix.M + matrix.N)
        products = dtype.itemsize * (matrix.width + ERROR_COLUMNS) * (largest + num_tokens)
        rows = kept_rows(matrix, num_tokens, dtype.itemsize)
        # fewer rows than tokens come from orthonormalizing that many columns: four float32 copies, one in dtype
        taken = products if rows == num_tokens else max(products, (16 + dtype.itemsize) * rows * largest)
        return copies + taken

    @staticmethod
    def refresh_bytes(matrices: Sequence[Matrix]) -> int:
        counts = Counter((matrix.M, matrix.N, matrix.width) for matrix in matrices)
        of_shape = {(matrix.M, matrix.N, matrix.width): matrix for matrix in matrices}
        return max(
            (min(counts[shape], batch_size(matrix)) * union_bytes(matrix) for shape, matrix in of_shape.items()),
            default=0,
        )

    @staticmethod
    def factorization_bytes(matrix: Matrix) -> int:
        return union_bytes(matrix)

    @classmethod
    def cost(cls, matrix: Matrix, amount: Amount) -> int:
        amount = replace(amount, dtype=dtype_of_products(amount.dtype))
        observing = amount.flops(cls.flops_per_token(matrix))
        unions = _refreshes(amount.num_microbatches) * cls.factorization_cost(matrix)
        traffic_bytes = cls.traffic_bytes(matrix, amount.num_microbatches, 0)
        return round(_NARROW * observing) + unions + FLOPS_PER_BYTE * traffic_bytes

    @staticmethod
    def factorization_cost(matrix: Matrix) -> int:
        """Of one union; measured with K = 112 and 160, M and N of 512 to 4096, float32, within a factor of 1.3."""
        return 40 * matrix.width**2 * (matrix.M + matrix.N) + 600 * matrix.width**3

    @staticmethod
    def flops_per_token(matrix: Matrix) -> int:
        return 4 * matrix.width * (matrix.M + matrix.N)

    @staticmethod
    def traffic_bytes(matrix: Matrix, num_microbatches: int, refine_passes: int) -> int:
        """Y and Z to the owner and the bases back, in each refresh."""
        refreshes = _refreshes(num_microbatches) + refine_passes
        return 2 * refreshes * 4 * matrix.width * (matrix.M + matrix.N)


def _refreshes(num_microbatches: int) -> int:
    """Of one pass, with the first bases and the last union."""
    return 2 + math.ceil(math.log2(max(2, num_microbatches)))
