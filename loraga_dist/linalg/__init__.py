"""Pure torch linear algebra; imports nothing else of this package."""

from loraga_dist.linalg.orthogonal import thin_qr
from loraga_dist.linalg.product import product_svd
from loraga_dist.linalg.randomized_svd import TruncatedSVD, numerical_rank, sign_fix, truncated_svd, truncated_svd_bytes
from loraga_dist.linalg.regression import DampedMoment, effective_rank, regression, regression_bytes
from loraga_dist.linalg.union import boolean_sum, complete_bases, orthonormal_columns

__all__ = [
    "DampedMoment",
    "TruncatedSVD",
    "boolean_sum",
    "complete_bases",
    "effective_rank",
    "numerical_rank",
    "orthonormal_columns",
    "product_svd",
    "regression",
    "regression_bytes",
    "sign_fix",
    "thin_qr",
    "truncated_svd",
    "truncated_svd_bytes",
]
