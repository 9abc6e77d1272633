"""Leading singular triplets of one large matrix, each accurate enough to stand alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_ITERATIONS = 100
_TOLERANCE = 1e-6  # sine between a computed and a true singular vector
_RESIDUAL_FLOOR = 1e-12  # relative to the largest singular value; float64 products get no lower in practice
_CHUNK_ELEMENTS = 2**22  # entries of G held in float64 at a time (32 MiB)


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
    is met. The next search space is span(V, residual, previous V) as in LOBPCG (Knyazev 2001), which takes about the
    square root of the steps that power iterations take where the spectrum decays slowly.
    """
    if not torch.stack(torch.aminmax(G_MN)).isfinite().all():
        raise ValueError("the matrix holds a NaN or an infinity")
    M, N = G_MN.shape
    width = min(rank + oversampling, M, N)
    if _is_dense(M, N, width):
        U_MK, S_K, Vh_KN = torch.linalg.svd(G_MN.double(), full_matrices=False)
        return _finished(U_MK[:, :width], S_K[:width], Vh_KN[:width])

    start_NK = torch.randn(N, width, generator=generator, device=G_MN.device, dtype=torch.float64)
    Q_NL = torch.linalg.qr(start_NK).Q
    dtype = torch.float32
    U_MK, S_K, V_NK = _rayleigh_ritz(G_MN, Q_NL, width, dtype)
    previous_V_NK = V_NK[:, :0]
    least_residual = float("inf")
    for _ in range(_MAX_ITERATIONS):
        residual_NK = _product(G_MN.T, U_MK, dtype) - V_NK * S_K
        wanted = min(rank, numerical_rank(S_K, M, N))
        residual_K = torch.linalg.vector_norm(residual_NK, dim=0)[:wanted]
        # The residual is orthogonal to span(V), so what it does to vector i shrinks with the distance to S[-1], not
        # with the (possibly tiny) distance to the neighbouring singular values.
        allowed_K = _TOLERANCE * (S_K[:wanted] - S_K[-1]) + _RESIDUAL_FLOOR * S_K[0]
        converged = bool((residual_K <= allowed_K).all())
        if converged and dtype is torch.float64:
            break
        # fp32 products are cheaper but stop improving at fp32 rounding (or TF32, if the user allowed it) relative to
        # S[0], and that rounding mixes close neighbours within the span: the last steps are taken in float64.
        residual = float(residual_K.max()) if wanted else 0.0
        if converged or residual > 0.9 * least_residual:
            dtype = torch.float64
        least_residual = min(least_residual, residual)
        Q_NL = torch.linalg.qr(torch.cat([V_NK, residual_NK, previous_V_NK], dim=1)).Q
        previous_V_NK = V_NK
        U_MK, S_K, V_NK = _rayleigh_ritz(G_MN, Q_NL, width, dtype)
    return _finished(U_MK, S_K, V_NK.T)


def truncated_svd_bytes(M: int, N: int, width: int) -> int:
    """What `truncated_svd` of `width` columns takes beside G: about 12 K (M + N) float64 numbers and a chunk, or, where
    the exact SVD is taken, 3.5 M N float64 numbers."""
    return 28 * M * N if _is_dense(M, N, width) else 96 * width * (M + N) + 8 * min(M * N, _CHUNK_ELEMENTS)


def _is_dense(M: int, N: int, width: int) -> bool:
    return 2 * width >= min(M, N)


def sign_fix(U_MK: Tensor, Vh_KN: Tensor) -> tuple[Tensor, Tensor]:
    """Flip pairs (u_i, v_i) so that the entry of largest magnitude in each right vector is positive.

    The convention of scikit-learn's `svd_flip` with `u_based_decision=False`.
    """
    peak_K1 = Vh_KN.gather(1, Vh_KN.abs().argmax(dim=1, keepdim=True))
    sign_K1 = torch.where(peak_K1 < 0, -1, 1).to(Vh_KN.dtype)
    return U_MK * sign_K1.T, Vh_KN * sign_K1


def numerical_rank(S_K: Tensor, M: int, N: int) -> int:
    """How many of the descending singular values of an M x N fp32 matrix stand above rounding.

    The rule of `torch.linalg.matrix_rank`: S > S[0] * max(M, N) * eps(fp32).
    """
    rounding = S_K[0] * (max(M, N) * torch.finfo(torch.float32).eps)
    return int(S_K.gt(rounding).sum())


def _rayleigh_ritz(G_MN: Tensor, Q_NL: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """U_MK, S_K, V_NK: the best `width` triplets of G with right vectors in the span of the orthonormal Q."""
    basis_ML, R_LL = torch.linalg.qr(_product(G_MN, Q_NL, dtype))
    U_LL, S_L, Vh_LL = torch.linalg.svd(R_LL, full_matrices=False)
    return basis_ML @ U_LL[:, :width], S_L[:width], Q_NL @ Vh_LL[:width].T


def _product(G_MN: Tensor, X_NL: Tensor, dtype: torch.dtype) -> Tensor:
    """G @ X with products and sums in `dtype`, as float64; no float64 copy of all of G is ever made."""
    if dtype is torch.float32:
        return (G_MN @ X_NL.float()).double()
    rows = max(1, _CHUNK_ELEMENTS // G_MN.shape[1])
    return torch.cat([chunk.double() @ X_NL for chunk in G_MN.split(rows)])


def _finished(U_MK: Tensor, S_K: Tensor, Vh_KN: Tensor) -> TruncatedSVD:
    U_MK, Vh_KN = sign_fix(U_MK, Vh_KN)
    return TruncatedSVD(U_MK=U_MK.float().contiguous(), S_K=S_K.float(), Vh_KN=Vh_KN.float().contiguous())
