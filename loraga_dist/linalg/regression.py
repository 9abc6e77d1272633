"""From a gradient to the regression behind it: what it asks of the layer's outputs, instead of its weight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loraga_dist.linalg.randomized_svd import TruncatedSVD, sign_fix

_ROWS = 1024
"""Of a moment, in float64 at a time."""

_LAST_STEP = 1e-5
"""Of a solution's norm: each step is smaller than the one before by as much as the first was than the solution."""

_MOST_REFINEMENTS = 10


@dataclass(frozen=True)
class DampedMoment:
    """C of a regression: a second moment of inputs, with `damping` times its diagonal's mean added to the diagonal.

    For a moment of zero C is the identity.
    """

    moment: Tensor
    """float32, E[x x^T] (N, N), or its diagonal (N,); never changed."""
    damping: float

    @torch.no_grad()
    def solve(self, V_NK: Tensor) -> Tensor:
        """Solve C X = V for X; both float64. Raises ValueError where rounding leaves C no positive matrix."""
        if self._added == 0:
            return V_NK
        if self.moment.dim() == 1:
            return V_NK / (self.moment.double() + self._added)[:, None]
        X_NK = self._solve_roughly(V_NK)
        for _ in range(_MOST_REFINEMENTS):  # a float64 factor would take twice as long, and get no further
            products = [rows.double() @ X_NK for rows in self.moment.split(_ROWS)]
            step_NK = self._solve_roughly(V_NK - torch.cat(products) - self._added * X_NK)
            X_NK = X_NK + step_NK
            if step_NK.norm() <= _LAST_STEP * X_NK.norm():
                return X_NK
        raise _not_positive()

    @cached_property
    def _added(self) -> float:
        diagonal_N = self.moment if self.moment.dim() == 1 else self.moment.diagonal()
        return self.damping * float(diagonal_N.mean(dtype=torch.float64))

    @cached_property
    def _factor(self) -> Tensor:
        C_NN = self.moment.clone()
        C_NN.diagonal().add_(self._added)
        L_NN, failed = torch.linalg.cholesky_ex(C_NN)
        if failed:
            raise _not_positive()
        return L_NN

    def _solve_roughly(self, V_NK: Tensor) -> Tensor:
        return torch.cholesky_solve(V_NK.float(), self._factor).double()


def _not_positive() -> ValueError:
    return ValueError("the second moment of its inputs is not positive in rounding; raise init.damping")


@torch.no_grad()
def regression(svd: TruncatedSVD, damped: DampedMoment) -> TruncatedSVD:
    """The generalized triplets of G C^-1, the coefficient of the regression of dy on x, from those of G ~ U S V^T.

    With C = L L^T and the singular value decomposition U' S' V'^T of G L^-T: left vectors U', values S', and for Vh the
    rows V'^T L^-1, which are orthonormal in the metric of C. Exact for the G that the triplets hold. float32.
    Raises ValueError where rounding leaves C no positive matrix.

    Source: Izenman 1975, Reduced-rank regression for the multivariate linear model.
    """
    V_NK = svd.Vh_KN.double().T
    solved_NK = damped.solve(V_NK)
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
    """What `regression` takes beside its arguments: a damped moment and its factor, some N x K matrices of float64."""
    return 8 * moment_numel + 48 * N * width + 8 * min(N, _ROWS) * N


def effective_rank(moment: Tensor) -> float | None:
    """(tr C)^2 / ||C||_F^2 of E[x x^T] (N, N); None for its diagonal alone, or for zero."""
    square_norm = torch.linalg.vector_norm(moment, dtype=torch.float64).square().item()
    if moment.dim() == 1 or not square_norm:
        return None
    return moment.diagonal().sum(dtype=torch.float64).square().item() / square_norm
