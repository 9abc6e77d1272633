"""The best low-rank matrix that two one-sided projections of G determine, and the bases it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraga_dist.linalg.randomized_svd import TruncatedSVD, sign_fix

_DROP = 1e-5
"""Directions below this share of the matrix they come from are rounding, not directions."""
_BLOCK_ROWS = 1 << 11
"""Rows held in float64 at a time: few enough to stay in cache."""


@torch.no_grad()
def boolean_sum(Y_MK: Tensor, Z_NK: Tensor, P_MK: Tensor, Q_NK: Tensor, width: int) -> TruncatedSVD:
    """The leading `width` triplets of M = P P^T G + G Q Q^T - P P^T G Q Q^T, from Y = G Q and Z = G^T P alone.

    P, Q: orthonormal columns, float32. The error G - M is (I - P P^T) G (I - Q Q^T): nothing else is lost, and no
    pseudo-inverse is taken. Y and Z may be rank-deficient, as after fewer tokens than K; the result then has fewer
    than `width` triplets, all of them orthonormal.

    Source: the Boolean sum of two projectors (Gordon 1969); Halko, Martinsson, Tropp 2011, section 5 for the use of
    two-sided sketches.
    """
    left, right = _split(Y_MK, P_MK), _split(Z_NK, Q_NK)
    core = _block_matrix(left.C_IK, right.R_JK.T, left.R_JK)
    U, S, Vh = torch.linalg.svd(core)
    kept = min(width, int((_DROP * S[0] < S).sum())) if S[0] > 0 else 0
    U_MK, Vh_KN = sign_fix(left.combine(U[:, :kept]), right.combine(Vh[:kept].T).T)
    return TruncatedSVD(U_MK=U_MK.contiguous(), S_K=S[:kept].float(), Vh_KN=Vh_KN.contiguous())


@torch.no_grad()
def orthonormal_columns(X_MK: Tensor) -> tuple[Tensor, Tensor]:
    """(W_MJ, R_JK) with W R = X up to rounding and orthonormal W; J is the numerical rank of X."""
    split = _split(X_MK, X_MK[:, :0])
    return split.combine(split.R_JK.new_ones(len(split.R_JK)).diag()), split.R_JK


@torch.no_grad()
def complete_basis(U_MJ: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """U_MK: the orthonormal columns of U, then random ones orthogonal to them, `width` in all."""
    M, J = U_MJ.shape
    assert width <= M, (width, M)
    if width <= J:
        return U_MJ[:, :width].contiguous()
    random = torch.randn(M, width - J, generator=generator, device=generator.device).to(U_MJ.device)
    split = _split(random, U_MJ)
    found = len(split.R_JK)
    beyond = torch.eye(J + found, dtype=split.R_JK.dtype, device=U_MJ.device)[:, J:]
    # where width is nearly M, a random column may lie almost within the others
    return complete_basis(torch.cat([U_MJ, split.combine(beyond)], dim=1), width, generator)


@dataclass(frozen=True)
class _Split:
    """X_MK = P C + W R, with the columns of [P, W] orthonormal. W = stacked @ mix is never formed by itself."""

    stacked_ML: Tensor
    """P beside W as the first round of orthonormalization left it."""
    mix_LJ: Tensor
    C_IK: Tensor
    R_JK: Tensor

    def combine(self, weights: Tensor) -> Tensor:
        """[P, W] @ weights."""
        inside = len(self.C_IK)
        on_stack = self.mix_LJ @ weights[inside:]
        on_stack[:inside] += weights[:inside]
        return self.stacked_ML @ on_stack.float()


def _split(X_MK: Tensor, P_MI: Tensor) -> _Split:
    """Two rounds of projection and Cholesky-QR, the first by way of eigenvectors, which reveal the rank.

    Directions of X beyond P that are small against X are dropped. Small matrices are float64.
    """
    C_IK = P_MI.T @ X_MK
    rest_MK = torch.addmm(X_MK, P_MI, C_IK, alpha=-1)
    energy_K, E_KK = torch.linalg.eigh(_gram(rest_MK))
    keep_K = energy_K > (_DROP * torch.linalg.vector_norm(X_MK).double()) ** 2
    root_J, E_KJ = energy_K[keep_K].sqrt(), E_KK[:, keep_K]
    inside, J = len(C_IK), len(root_J)
    stacked_ML = torch.cat([P_MI, rest_MK @ (E_KJ / root_J).float()], dim=1)
    # rounding has left the weakest directions with parts of P and of each other, some percent at most
    overlap_LJ = (stacked_ML.T @ stacked_ML[:, inside:]).double()
    D_IJ = overlap_LJ[:inside]
    L_JJ = torch.linalg.cholesky(overlap_LJ[inside:] - D_IJ.T @ D_IJ)
    unmixed_LJ = torch.cat([-D_IJ, torch.eye(J, dtype=D_IJ.dtype, device=D_IJ.device)])
    R_JK = root_J[:, None] * E_KJ.T
    return _Split(
        stacked_ML=stacked_ML,
        mix_LJ=torch.linalg.solve_triangular(L_JJ.T, unmixed_LJ, upper=True, left=False),
        C_IK=C_IK.double() + D_IJ @ R_JK,
        R_JK=L_JJ.T @ R_JK,
    )


def _block_matrix(top_left: Tensor, top_right: Tensor, bottom_left: Tensor) -> Tensor:
    """[[a, b], [c, 0]]."""
    zero = top_left.new_zeros(len(bottom_left), top_right.shape[1])
    return torch.cat([torch.cat([top_left, top_right], dim=1), torch.cat([bottom_left, zero], dim=1)])


def _gram(X_MK: Tensor) -> Tensor:
    gram = torch.zeros(X_MK.shape[1], X_MK.shape[1], dtype=torch.float64, device=X_MK.device)
    for rows in X_MK.split(_BLOCK_ROWS):
        rows = rows.double()
        gram += rows.T @ rows
    return gram
