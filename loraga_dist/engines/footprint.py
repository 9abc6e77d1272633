"""Bytes an engine takes on one rank, by moment: what a plan counts beside the model and its activations."""

from __future__ import annotations

import torch

from loraga_dist.engines import exact
from loraga_dist.engines.base import ERROR_COLUMNS, Matrix
from loraga_dist.engines.sketch import kept_rows
from loraga_dist.linalg import truncated_svd_bytes

_UNION_COPIES = 6
"""M x K and N x K float32 matrices alive at once while a window's sketches are united with the estimate so far."""


def held_bytes(matrix: Matrix, dtype: torch.dtype, *, owned: bool) -> int:
    """State from the first refresh on. dtype: of x and dy, which `sketch` keeps its bases in, too."""
    M, N, K = matrix.M, matrix.N, matrix.width
    if matrix.engine == "exact":
        return exact.state_bytes(M, N, K)
    window = (4 + dtype.itemsize) * K * (M + N) + 8 * M * ERROR_COLUMNS + dtype.itemsize * N * ERROR_COLUMNS
    rest = 0 if dtype == torch.float32 else dtype.itemsize * K * (M + N)
    return window + (rest + 4 * M * ERROR_COLUMNS if owned else 0)


def cold_bytes(matrix: Matrix, num_tokens: int, dtype: torch.dtype) -> int:
    """State at the end of the first microbatch: of `sketch`, the rows of x and dy that it keeps."""
    M, N, K = matrix.M, matrix.N, matrix.width
    if matrix.engine == "exact":
        return exact.state_bytes(M, N, K)
    return dtype.itemsize * kept_rows(K, M, N, num_tokens, dtype.itemsize) * (M + N) + 8 * M * ERROR_COLUMNS


def observation_bytes(matrix: Matrix, num_tokens: int, dtype: torch.dtype) -> int:
    """Taken for a moment, while a tap hands over x_TN and dy_TM."""
    M, N, K = matrix.M, matrix.N, matrix.width
    if matrix.engine == "exact":
        casts = 0 if dtype == torch.float32 else 4 * num_tokens * (M + N)
        return casts + 4 * num_tokens * ERROR_COLUMNS
    products = dtype.itemsize * (K + ERROR_COLUMNS) * (max(M, N) + num_tokens)
    rows = kept_rows(K, M, N, num_tokens, dtype.itemsize)
    # fewer rows than tokens come from orthonormalizing that many columns: four float32 copies, one in dtype
    return products if rows == num_tokens else max(products, (16 + dtype.itemsize) * rows * max(M, N))


def factorization_bytes(matrix: Matrix) -> int:
    """What the owner takes for one target beside its state: a window's union, or the truncated SVD."""
    M, N, K = matrix.M, matrix.N, matrix.width
    if matrix.engine == "sketch":
        return 4 * _UNION_COPIES * K * (M + N)
    # the energy of G is summed in float64, which a CPU makes a copy for
    return max(truncated_svd_bytes(M, N, K), 8 * M * N)


def triplet_bytes(matrix: Matrix) -> int:
    """Of a result: K triplets in float32."""
    return 4 * matrix.width * (matrix.M + matrix.N + 1)
