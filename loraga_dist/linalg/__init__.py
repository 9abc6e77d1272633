"""Pure torch linear algebra; imports nothing else of this package."""

from loraga_dist.linalg.randomized_svd import TruncatedSVD, numerical_rank, sign_fix, truncated_svd
from loraga_dist.linalg.subspace import captured_energy, efficiency, principal_sines

__all__ = [
    "TruncatedSVD",
    "captured_energy",
    "efficiency",
    "numerical_rank",
    "principal_sines",
    "sign_fix",
    "truncated_svd",
]
