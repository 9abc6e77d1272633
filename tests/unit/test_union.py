"""The Boolean sum of two projections, against the dense formula, with rank-deficient sketches too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraga_dist.linalg import boolean_sum, complete_basis, orthonormal_columns

M, N, K = 90, 70, 24


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bases(seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = generator(seed)
    return tuple(torch.linalg.qr(torch.randn(size, K, generator=draw)).Q for size in (M, N))  # type: ignore[return-value]


def is_orthonormal(X: Tensor) -> bool:
    return bool(torch.allclose(X.T @ X, torch.eye(X.shape[1]), atol=1e-5))


@pytest.mark.parametrize("rank", [70, 10, 3])
def test_equals_the_dense_formula(rank: int) -> None:
    draw = generator()
    G_MN = torch.randn(M, rank, generator=draw) @ torch.randn(rank, N, generator=draw)
    P_MK, Q_NK = bases()
    dense = P_MK @ (P_MK.T @ G_MN) + (G_MN @ Q_NK) @ Q_NK.T - P_MK @ (P_MK.T @ G_MN @ Q_NK) @ Q_NK.T
    svd = boolean_sum(G_MN @ Q_NK, G_MN.T @ P_MK, P_MK, Q_NK, 2 * K)
    assert is_orthonormal(svd.U_MK) and is_orthonormal(svd.Vh_KN.T)
    assert (svd.S_K.diff() <= 0).all()
    found = svd.U_MK * svd.S_K @ svd.Vh_KN
    assert (found - dense).norm() < 1e-5 * dense.norm()
    assert svd.width == min(2 * rank, 2 * K), "what is left of G on either side has G's rank at most"


def test_converged_bases_leave_nothing_outside() -> None:
    draw = generator()
    G_MN = torch.randn(M, 8, generator=draw) @ torch.randn(8, N, generator=draw)
    U, _, Vh = torch.linalg.svd(G_MN, full_matrices=False)
    P_MK, Q_NK = U[:, :K].contiguous(), Vh[:K].T.contiguous()
    svd = boolean_sum(G_MN @ Q_NK, G_MN.T @ P_MK, P_MK, Q_NK, K)
    assert (svd.U_MK * svd.S_K @ svd.Vh_KN - G_MN).norm() < 1e-5 * G_MN.norm()


def test_zero_sketches_give_no_triplets() -> None:
    P_MK, Q_NK = bases()
    assert boolean_sum(torch.zeros(M, K), torch.zeros(N, K), P_MK, Q_NK, K).width == 0


def test_orthonormal_columns_reveal_the_rank() -> None:
    draw = generator()
    X_MK = torch.randn(M, 5, generator=draw) @ torch.randn(5, K, generator=draw)
    X_MK[:, 3] *= 1e3
    W_MJ, R_JK = orthonormal_columns(X_MK)
    assert W_MJ.shape == (M, 5) and is_orthonormal(W_MJ)
    assert (W_MJ @ R_JK.float() - X_MK).norm() < 1e-4 * X_MK.norm()


def test_a_basis_is_completed_to_the_whole_space() -> None:
    """With as many columns as rows, a random one now and then has next to nothing outside the others."""
    draw = generator()
    for _ in range(400):
        U_MJ, _ = orthonormal_columns(torch.randn(64, 16, generator=draw))
        assert is_orthonormal(complete_basis(U_MJ, 64, draw))


def test_a_completed_basis_keeps_what_was_there() -> None:
    U_MJ, _ = orthonormal_columns(torch.randn(M, 7, generator=generator()))
    P_MK = complete_basis(U_MJ, K, generator())
    assert is_orthonormal(P_MK)
    assert torch.equal(P_MK[:, :7], U_MJ)
