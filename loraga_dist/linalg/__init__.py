"""Pure torch linear algebra; imports nothing else of this package."""

from loraga_dist.linalg.product import product_svd
from loraga_dist.linalg.randomized_svd import TruncatedSVD, numerical_rank, sign_fix, truncated_svd, truncated_svd_bytes
from loraga_dist.linalg.union import boolean_sum, complete_basis, orthonormal_columns
from loraga_dist.linalg.whitening import WHITENINGS, Moments, Whitening

__all__ = [
    "WHITENINGS",
    "Moments",
    "TruncatedSVD",
    "Whitening",
    "boolean_sum",
    "complete_basis",
    "numerical_rank",
    "orthonormal_columns",
    "product_svd",
    "sign_fix",
    "truncated_svd",
    "truncated_svd_bytes",
]
