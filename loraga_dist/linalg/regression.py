"""From a gradient to the regression behind it: what it asks of the layer's outputs, instead of its weight."""

from __future__ import annotations

import torch
from torch import Tensor

from loraga_dist.linalg.randomized_svd import TruncatedSVD, sign_fix


@torch.no_grad()
def regression(svd: TruncatedSVD, moment: Tensor, damping: float) -> TruncatedSVD:
    """The generalized triplets of G C^-1, the coefficient of the regression of dy on x, from those of G ~ U S V^T.

    With C = L L^T and the singular value decomposition U' S' V'^T of G L^-T: left vectors U', values S', and for Vh the
    rows V'^T L^-1, which are orthonormal in the metric of C. Exact for the G that the triplets hold. float32.
    moment: float32, E[x x^T] (N, N), or its diagonal (N,); never changed. damping: of the mean of the diagonal, added
    to all of it to give C. For a moment of zero C is the identity.

    Raises ValueError where rounding leaves C no positive matrix.

    Source: Izenman 1975, Reduced-rank regression for the multivariate linear model.
    """
    diagonal_N = moment if moment.dim() == 1 else moment.diagonal()
    added = damping * float(diagonal_N.mean(dtype=torch.float64))
    V_NK = svd.Vh_KN.double().T
    if added == 0:
        solved_NK = V_NK
    elif moment.dim() == 1:
        solved_NK = V_NK / (moment.double() + added)[:, None]
    else:
        C_NN = moment.double()
        C_NN.diagonal().add_(added)
        L_NN, failed = torch.linalg.cholesky_ex(C_NN)
        if failed:
            raise ValueError("the second moment of its inputs is not positive in rounding; raise init.damping")
        solved_NK = torch.cholesky_solve(V_NK, L_NN)
    S_K = svd.S_K.double()
    gram_KK = S_K[:, None] * (V_NK.T @ solved_NK) * S_K
    squares_K, Q_KK = torch.linalg.eigh((gram_KK + gram_KK.T) / 2)
    squares_K, Q_KK = squares_K.flip(0).clamp(min=0), Q_KK.flip(1)
    # of what is no more than rounding, directions of no length instead of infinite ones
    inverse_K = torch.where(squares_K > squares_K[:1] * torch.finfo(torch.float64).eps, squares_K.rsqrt(), 0)
    rows_KN = (solved_NK @ (S_K[:, None] * Q_KK * inverse_K)).T
    U_MK, rows_KN = sign_fix(svd.U_MK.double() @ Q_KK, rows_KN)
    return TruncatedSVD(
        U_MK=U_MK.float().contiguous(), S_K=squares_K.sqrt().float(), Vh_KN=rows_KN.float().contiguous()
    )


def regression_bytes(N: int, width: int, moment_numel: int) -> int:
    """What `regression` takes beside its arguments: the moment, its factor and a copy, some N x K matrices; float64."""
    return 24 * moment_numel + 32 * N * width


def effective_rank(moment: Tensor) -> float | None:
    """(tr C)^2 / ||C||_F^2 of E[x x^T] (N, N); None for its diagonal alone, or for zero."""
    square_norm = torch.linalg.vector_norm(moment, dtype=torch.float64).square().item()
    if moment.dim() == 1 or not square_norm:
        return None
    return moment.diagonal().sum(dtype=torch.float64).square().item() / square_norm
