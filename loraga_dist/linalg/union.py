"""The best low-rank matrix that two one-sided projections of G determine, and the bases it needs."""

from __future__ import annotations

import torch
from torch import Tensor

from loraga_dist.linalg.randomized_svd import TruncatedSVD, sign_fix

_DROP = 1e-6
"""Directions below this share of the matrix they come from are rounding, not directions."""
_BLOCK_ROWS = 1 << 16


@torch.no_grad()
def boolean_sum(Y_MK: Tensor, Z_NK: Tensor, P_MK: Tensor, Q_NK: Tensor, width: int) -> TruncatedSVD:
    """The leading `width` triplets of M = P P^T G + G Q Q^T - P P^T G Q Q^T, from Y = G Q and Z = G^T P alone.

    P, Q: orthonormal columns, float32. The error G - M is (I - P P^T) G (I - Q Q^T): nothing else is lost, and no
    pseudo-inverse is taken. Y and Z may be rank-deficient, as after fewer tokens than K; the result then has fewer
    than `width` triplets, all of them orthonormal.

    Source: the Boolean sum of two projectors (Gordon 1969); Halko, Martinsson, Tropp 2011, section 5 for the use of
    two-sided sketches.
    """
    C_KK = P_MK.T @ Y_MK
    Y_rest_MK = _project_out(Y_MK, P_MK)
    Z_rest_NK = _project_out(Z_NK, Q_NK)
    W_left_MJ, R_left_JK = orthonormal_columns(Y_rest_MK, scale=Y_MK)
    W_right_NJ, R_right_JK = orthonormal_columns(Z_rest_NK, scale=Z_NK)
    core = torch.zeros(len(C_KK) + len(R_left_JK), len(C_KK) + len(R_right_JK), dtype=torch.float64, device=C_KK.device)
    core[: len(C_KK), : len(C_KK)] = C_KK
    core[: len(C_KK), len(C_KK) :] = R_right_JK.T
    core[len(C_KK) :, : len(C_KK)] = R_left_JK
    U, S, Vh = torch.linalg.svd(core)
    kept = min(width, int((_DROP * S[0] < S).sum())) if S[0] > 0 else 0
    U_MK = torch.cat([P_MK, W_left_MJ], dim=1) @ U[:, :kept].float()
    V_NK = torch.cat([Q_NK, W_right_NJ], dim=1) @ Vh[:kept].T.float()
    U_MK, Vh_KN = sign_fix(U_MK, V_NK.T)
    return TruncatedSVD(U_MK=U_MK.contiguous(), S_K=S[:kept].float(), Vh_KN=Vh_KN.contiguous())


@torch.no_grad()
def orthonormal_columns(X_MK: Tensor, *, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(W_MJ, R_JK) with W R = X up to rounding and orthonormal W; J is the numerical rank of X.

    scale: a matrix of whose norm X is a part; what is small against it is dropped. Two rounds of Cholesky-QR by way
    of the eigenvectors of a float64 Gram matrix, which rank deficiency does not disturb.
    """
    reference = torch.linalg.vector_norm(X_MK if scale is None else scale).double()
    energy_K, E_KK = torch.linalg.eigh(_gram(X_MK))
    keep_K = energy_K > (_DROP * reference) ** 2
    if not bool(keep_K.any()):
        return X_MK[:, :0], X_MK.new_zeros(0, X_MK.shape[1], dtype=torch.float64)
    root_J, E_KJ = energy_K[keep_K].sqrt(), E_KK[:, keep_K]
    W_MJ = X_MK @ (E_KJ / root_J).float()
    # the first W is orthonormal to about 1e-2 in the weakest directions; the second round mends that
    energy_J, E_JJ = torch.linalg.eigh(_gram(W_MJ))
    inverse_root_JJ = (E_JJ / energy_J.sqrt()) @ E_JJ.T
    root_JJ = (E_JJ * energy_J.sqrt()) @ E_JJ.T
    return W_MJ @ inverse_root_JJ.float(), root_JJ @ (root_J[:, None] * E_KJ.T)


@torch.no_grad()
def complete_basis(U_MJ: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """U_MK: the orthonormal columns of U, then random ones orthogonal to them, `width` in all."""
    M, J = U_MJ.shape
    assert width <= M, (width, M)
    if width <= J:
        return U_MJ[:, :width].contiguous()
    random = torch.randn(M, width - J, generator=generator, device=generator.device).to(U_MJ.device)
    W_MJ, _ = orthonormal_columns(_project_out(random, U_MJ))
    assert W_MJ.shape[1] == width - J, "random columns are independent"
    return torch.cat([U_MJ, _project_out(W_MJ, U_MJ)], dim=1)


def _project_out(X_MK: Tensor, P_MK: Tensor) -> Tensor:
    """X - P P^T X, twice: the first round leaves rounding of the size of X along P."""
    for _ in range(2):
        X_MK = X_MK - P_MK @ (P_MK.T @ X_MK)
    return X_MK


def _gram(X_MK: Tensor) -> Tensor:
    gram = torch.zeros(X_MK.shape[1], X_MK.shape[1], dtype=torch.float64, device=X_MK.device)
    for rows in X_MK.split(_BLOCK_ROWS):
        rows = rows.double()
        gram += rows.T @ rows
    return gram
