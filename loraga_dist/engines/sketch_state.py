"""What the sketch engine holds of one target, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraga_dist.engines.base import ERROR_COLUMNS, FLOPS_PER_BYTE, Amount, GradientEngine, Matrix

_WINDOW_BYTES = 8
"""Of a window, per column and row of the matrix: Y or Z, and P or Q in 32 bits or twice 16."""
_NARROW = 1.35
"""Time of a flop in products with K columns, in that of a large product: measured in float32."""
_UNION_COPIES = 6
"""M x K and N x K float32 matrices alive at once while a window's sketches are united with the estimate so far."""


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
    """None until the target has seen a token."""
    num_microbatches: int = 0
    refreshed_at: int = 0
    refining: bool = False
    P_rest_MK: Tensor | None = None
    Q_rest_NK: Tensor | None = None
    """On the owner, if the window's bases have 16 bits: 16 more of them."""
    S_J: Tensor | None = None
    """On the owner, once there is an estimate: singular values of sum(dy x^T), whose vectors lead P and Q."""
    earlier_E_MS: Tensor | None = None
    """On the owner: E of both halves at the last refresh."""
    captures: list[float] = field(default_factory=list)
    """On the owner: share of each window's energy that its own sketch held."""


def kept_rows(matrix: Matrix, num_tokens: int, itemsize: int) -> int:
    """Rows of x and dy that stand for the first microbatch: all, while the window to come is no smaller, else 2K."""
    K = matrix.width
    if num_tokens * itemsize <= _WINDOW_BYTES * K or num_tokens <= 2 * K:
        return num_tokens
    return min(2 * K, matrix.M, matrix.N)


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
        M, N, K = matrix.M, matrix.N, matrix.width
        window = (4 + dtype.itemsize) * K * (M + N) + 8 * M * ERROR_COLUMNS + dtype.itemsize * N * ERROR_COLUMNS
        rest = 0 if dtype == torch.float32 else dtype.itemsize * K * (M + N)
        return window + (rest + 4 * M * ERROR_COLUMNS if owned else 0)

    @staticmethod
    def cold_bytes(matrix: Matrix, dtype: torch.dtype, num_tokens: int) -> int:
        rows = kept_rows(matrix, num_tokens, dtype.itemsize)
        return dtype.itemsize * rows * (matrix.M + matrix.N) + 8 * matrix.M * ERROR_COLUMNS

    @staticmethod
    def observation_bytes(matrix: Matrix, dtype: torch.dtype, num_tokens: int) -> int:
        largest = max(matrix.M, matrix.N)
        products = dtype.itemsize * (matrix.width + ERROR_COLUMNS) * (largest + num_tokens)
        rows = kept_rows(matrix, num_tokens, dtype.itemsize)
        # fewer rows than tokens come from orthonormalizing that many columns: four float32 copies, one in dtype
        return products if rows == num_tokens else max(products, (16 + dtype.itemsize) * rows * largest)

    @staticmethod
    def refresh_bytes(matrix: Matrix) -> int:
        return 4 * _UNION_COPIES * matrix.width * (matrix.M + matrix.N)

    @classmethod
    def factorization_bytes(cls, matrix: Matrix) -> int:
        return cls.refresh_bytes(matrix)

    @classmethod
    def cost(cls, matrix: Matrix, amount: Amount) -> int:
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
