"""Leading singular triplets of one large matrix, each accurate enough to stand alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loraga_dist.linalg.orthogonal import thin_qr

_MOST_PRODUCTS = 100  # with G^T G, until vectors of a flat spectrum are left as they are; half of them in float32
_MOST_DEGREE = 12  # of one filter
_TOLERANCE = 3e-6  # sine between a computed and a true singular vector
_RESIDUAL_FLOOR = 1e-12  # relative to the largest singular value; float64 products get no lower in practice
_FLOAT32_FLOOR = 3e-7  # the same for float32 products
_MOST_SPREAD = {torch.float32: 1e8, torch.float64: 1e12}  # of one filter's gains; beyond it, vectors drown in rounding
_LEAST_CUT = 3e-8  # relative to the largest singular value: below it, all is rounding of float32
_CHUNK_ELEMENTS = 2**19  # entries of G held in float64 at a time: 4 MiB, which stay in cache


@dataclass(frozen=True, kw_only=True)
class TruncatedSVD:
    """G_MN ~ U_MK diag(S_K) Vh_KN: fp32, S descending, orthonormal U and V, signs fixed by `sign_fix`."""

    U_MK: Tensor
    S_K: Tensor
    Vh_KN: Tensor

    @property
    def width(self) -> int:
        """K, the number of triplets held."""
        return self.S_K.shape[0]

    def leading(self, k: int) -> TruncatedSVD:
        """The first k triplets (views); all of them if there are fewer."""
        return TruncatedSVD(U_MK=self.U_MK[:, :k], S_K=self.S_K[:k], Vh_KN=self.Vh_KN[:k])


@torch.no_grad()
def truncated_svd(G_MN: Tensor, *, rank: int, oversampling: int, generator: torch.Generator) -> TruncatedSVD:
    """Leading K = min(rank + oversampling, M, N) singular triplets of G, the first `rank` of them converged.

    Shapes and dtypes: G_MN fp32, never changed; the result is fp32 on G's device, where `generator` must be too.
    Converged: every leading triplet that stands above fp32 rounding (`numerical_rank`) has an error near 1e-6 in each
    single vector, not only in the span. Where singular values all but coincide with the K-th (a flat spectrum) the
    vectors are not defined that well; the iteration then ends at its cap with an orthonormal best effort.
    Memory beside G: `truncated_svd_bytes`. From 2K >= min(M, N) on the exact SVD is taken instead.

    Raises ValueError if G holds a NaN or an infinity.

    Source: Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1, iterated until a measured residual
    is met. Between two Rayleigh-Ritz steps the vectors pass a Chebyshev polynomial of G^T G that is small below the
    K-th singular value (Zhou, Saad, Tiago, Chelikowsky 2006), of the degree that the residual asks for. Where the
    spectrum decays slowly, that takes about the square root of the products that powers take.
    """
    if not torch.stack(torch.aminmax(G_MN)).isfinite().all():
        raise ValueError("the matrix holds a NaN or an infinity")
    M, N = G_MN.shape
    width = min(rank + oversampling, M, N)
    if _is_dense(M, N, width):
        U_MK, S_K, Vh_KN = torch.linalg.svd(G_MN.double(), full_matrices=False)
        return _finished(U_MK[:, :width], S_K[:width], Vh_KN[:width])

    start_NK = torch.randn(N, width, generator=generator, device=G_MN.device)
    triplets = _rayleigh_ritz(G_MN, _back_product(G_MN, thin_qr(G_MN @ start_NK)[0]))
    products, least_residual = 0, float("inf")
    while wanted := min(rank, numerical_rank(triplets.S_K, M, N)):
        residual_K, S_K = triplets.residual_K[:wanted], triplets.S_K.double()
        # The residual is orthogonal to span(V), so what it does to vector i shrinks with the distance to S[-1], not
        # with the (possibly tiny) distance to the neighbouring singular values.
        aim_K = _TOLERANCE * (S_K[:wanted] - S_K[-1]) + _RESIDUAL_FLOOR * S_K[0]
        in_double = triplets.V_NK.dtype is torch.float64
        if in_double and (bool((residual_K <= aim_K).all()) or products >= _MOST_PRODUCTS):
            break
        if not in_double:
            # fp32 products are cheaper but stop improving at fp32 rounding (or TF32, if the user allowed it) relative
            # to S[0], and that rounding mixes close neighbours within the span: the last step is taken in float64.
            aim_K, residual = aim_K.clamp(min=_FLOAT32_FLOOR * float(S_K[0])), float(residual_K.max())
            if residual > 0.9 * least_residual or products >= _MOST_PRODUCTS // 2:
                triplets = _rayleigh_ritz(G_MN, triplets.V_NK.double())
                continue
            least_residual = residual
        cut = max(float(S_K[-1]), _LEAST_CUT * float(S_K[0]))
        degree, suffices = _degree(S_K[:wanted] / cut, residual_K / aim_K, triplets.V_NK.dtype)
        span_NK = _filtered(G_MN, triplets, cut, degree)
        triplets = _rayleigh_ritz(G_MN, span_NK.double() if suffices else span_NK)
        products += degree
    return _finished(triplets.U_MK, triplets.S_K, triplets.V_NK.T)


def truncated_svd_bytes(M: int, N: int, width: int) -> int:
    """What `truncated_svd` of `width` columns takes beside G: about 12 K (M + N) float64 numbers and a chunk, or, where
    the exact SVD is taken, 3.5 M N float64 numbers."""
    return 28 * M * N if _is_dense(M, N, width) else 96 * width * (M + N) + 8 * min(M * N, _CHUNK_ELEMENTS)


def _is_dense(M: int, N: int, width: int) -> bool:
    return 2 * width >= min(M, N)


def sign_fix(U_MK: Tensor, Vh_KN: Tensor) -> tuple[Tensor, Tensor]:
    """Flip pairs (u_i, v_i) so that the entry of largest magnitude in each right vector is positive; of batches, too.

    The convention of scikit-learn's `svd_flip` with `u_based_decision=False`.
    """
    peak_K1 = Vh_KN.gather(-1, Vh_KN.abs().argmax(dim=-1, keepdim=True))
    sign_K1 = torch.where(peak_K1 < 0, -1, 1).to(Vh_KN.dtype)
    return U_MK * sign_K1.mT, Vh_KN * sign_K1


def numerical_rank(S_K: Tensor, M: int, N: int) -> int:
    """How many of the descending singular values of an M x N fp32 matrix stand above rounding.

    The rule of `torch.linalg.matrix_rank`: S > S[0] * max(M, N) * eps(fp32).
    """
    rounding = S_K[0] * (max(M, N) * torch.finfo(torch.float32).eps)
    return int(S_K.gt(rounding).sum())


@dataclass(frozen=True)
class _Ritz:
    """The best `width` triplets of G with right vectors in some span: G V = U S."""

    U_MK: Tensor
    S_K: Tensor
    V_NK: Tensor
    back_NK: Tensor
    """G^T U, V S and a residual."""

    @property
    def residual_K(self) -> Tensor:
        # float64, or the squares of a tiny gradient are zero
        return torch.linalg.vector_norm(self.back_NK - self.V_NK * self.S_K, dim=0, dtype=torch.float64)


def _rayleigh_ritz(G_MN: Tensor, span_NK: Tensor) -> _Ritz:
    """In the dtype of the span, products with G included."""
    Q_NK = thin_qr(span_NK)[0]
    basis_MK, R_KK = thin_qr(_product(G_MN, Q_NK))
    U_KK, S_K, Vh_KK = torch.linalg.svd(R_KK)
    U_MK = basis_MK @ U_KK
    return _Ritz(U_MK, S_K, Q_NK @ Vh_KK.T, _back_product(G_MN, U_MK))


def _degree(ratio_K: Tensor, excess_K: Tensor, dtype: torch.dtype) -> tuple[int, bool]:
    """The degree whose filter reduces all residuals as they need it, or the most that is sound; and whether it does.

    ratio_K: wanted singular values over the cut. excess_K: residuals over what they shall be.
    """
    growth_K = torch.acosh((2 * ratio_K.square() - 1).clamp(min=1))
    needed = float((torch.acosh(excess_K.clamp(min=1)) / growth_K).nan_to_num(posinf=_MOST_DEGREE).max())
    spread = float(growth_K[0] - growth_K[-1])
    most = math.log(_MOST_SPREAD[dtype]) / spread if spread > 0 else _MOST_DEGREE
    degree = max(1, min(int(most), _MOST_DEGREE))
    return min(degree, max(1, math.ceil(needed))), needed <= degree


def _filtered(G_MN: Tensor, triplets: _Ritz, cut: float, degree: int) -> Tensor:
    """T_degree(2 G^T G / cut^2 - 1) V: within 1 of zero below the cut, and fast growing above it."""
    V_NK = triplets.V_NK

    def step(image_NK: Tensor, X_NK: Tensor) -> Tensor:
        return (2 / cut) * image_NK - X_NK

    older_NK, newer_NK = V_NK, step(triplets.back_NK * (triplets.S_K / cut), V_NK)
    for _ in range(degree - 1):
        older_NK, newer_NK = newer_NK, 2 * step(_squared_product(G_MN, newer_NK, cut), newer_NK) - older_NK
    return newer_NK


def _product(G_MN: Tensor, X_NK: Tensor) -> Tensor:
    """G @ X with products and sums in the dtype of X; no float64 copy of all of G is ever made."""
    if X_NK.dtype is G_MN.dtype:
        return G_MN @ X_NK
    return torch.cat([rows.double() @ X_NK for rows in _chunks(G_MN)])


def _back_product(G_MN: Tensor, X_MK: Tensor) -> Tensor:
    """G^T @ X, likewise."""
    if X_MK.dtype is G_MN.dtype:
        return (X_MK.T @ G_MN).T  # a good deal faster than G^T X on CPUs
    sum_NK = X_MK.new_zeros(G_MN.shape[1], X_MK.shape[1])
    done = 0
    for rows in _chunks(G_MN):
        sum_NK.addmm_(rows.double().T, X_MK[done : done + len(rows)])
        done += len(rows)
    return sum_NK


def _squared_product(G_MN: Tensor, X_NK: Tensor, cut: float) -> Tensor:
    """G^T (G X / cut), likewise; scaled in between, so that nothing leaves the range of float32."""
    if X_NK.dtype is G_MN.dtype:
        return _back_product(G_MN, (G_MN @ X_NK) / cut)
    sum_NK = torch.zeros_like(X_NK)
    for rows in _chunks(G_MN):
        wide = rows.double()
        sum_NK.addmm_(wide.T, wide @ X_NK, alpha=1 / cut)
    return sum_NK


def _chunks(G_MN: Tensor) -> tuple[Tensor, ...]:
    return G_MN.split(max(1, _CHUNK_ELEMENTS // G_MN.shape[1]))


def _finished(U_MK: Tensor, S_K: Tensor, Vh_KN: Tensor) -> TruncatedSVD:
    U_MK, Vh_KN = sign_fix(U_MK, Vh_KN)
    return TruncatedSVD(U_MK=U_MK.float().contiguous(), S_K=S_K.float(), Vh_KN=Vh_KN.float().contiguous())
