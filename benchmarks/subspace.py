"""How well factors and triplets span what they should: the measures of tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from loraga_dist.linalg import numerical_rank


def efficiency(G_MN: Tensor, U_MR: Tensor, V_NR: Tensor) -> float:
    """Share of the best possible first step that LoRA takes from B0 with the columns of U and A0 with the rows of V^T.

    U (the B side) and V (the A side) need only span the right spaces; zero columns span nothing. With P_U, P_V the
    projectors onto them and X = P_U G + G P_V: (||G||^2 - ||G - X||^2) / ||G_2r||^2, where G_2r is the truncation of G
    to the two ranks together. 1 is the optimum of LoRA-GA (arXiv 2407.05000, theorem 3.1); 1 for G = 0.

    An oracle: it takes the exact singular values of a float64 copy of G.
    """
    G_MN = G_MN.double()
    best = torch.linalg.svdvals(G_MN)[: U_MR.shape[1] + V_NR.shape[1]].square().sum()
    if best == 0:
        return 1.0
    UtG_RN = _orthonormal_basis(U_MR).T @ G_MN
    V_NR = _orthonormal_basis(V_NR)
    # ||G||^2 - ||G - X||^2 = 2 <G, X> - ||X||^2; X holds the block U U^T G V V^T twice
    captured = UtG_RN.square().sum() + (G_MN @ V_NR).square().sum() - 2 * (UtG_RN @ V_NR).square().sum()
    return float(captured / best)


def principal_sines(A_MK: Tensor, B_MK: Tensor) -> Tensor:
    """Sines of the principal angles from span(B) to span(A), float64, largest first, exact also for tiny angles.

    Source: Björck and Golub 1973, "Numerical methods for computing angles between linear subspaces".
    """
    A_MK, B_MK = _orthonormal_basis(A_MK), _orthonormal_basis(B_MK)
    return torch.linalg.svdvals(B_MK - A_MK @ (A_MK.T @ B_MK)).clamp(max=1.0)


def _orthonormal_basis(X_MK: Tensor) -> Tensor:
    """Orthonormal float64 basis of the column space of X; directions lost in fp32 rounding are dropped."""
    U_MK, S_K, _ = torch.linalg.svd(X_MK.double(), full_matrices=False)
    return U_MK[:, : numerical_rank(S_K, *X_MK.shape)]
