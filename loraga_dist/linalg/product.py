"""The singular value decomposition of a product that is never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from loraga_dist.linalg.orthogonal import thin_qr
from loraga_dist.linalg.randomized_svd import sign_fix

_ROUNDING = 16 * torch.finfo(torch.float64).eps


@torch.no_grad()
def product_svd(B_MK: Tensor, A_KN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U_MJ, S_J, Vh_JN of B A = U diag(S) V^T: float64, S descending, J = min(K, M, N), signs fixed by `sign_fix`.

    Two QR factorizations and one SVD of at most K x K. The error is float64 rounding relative to ||B|| ||A||, also
    where B A is the small difference of large terms; singular values below that are zero.
    """
    Q_MK, R_left = thin_qr(B_MK.double())
    Q_NK, R_right = thin_qr(A_KN.double().T)
    U, S_J, Vh = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
    U_MJ, Vh_JN = sign_fix(Q_MK @ U, Vh @ Q_NK.T)
    rounding = _ROUNDING * torch.linalg.matrix_norm(R_left) * torch.linalg.matrix_norm(R_right)
    return U_MJ, torch.where(rounding < S_J, S_J, 0.0), Vh_JN
