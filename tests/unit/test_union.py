"""Boolean sums of two projections, against the dense formula, with rank-deficient sketches too; in batches."""

from __future__ import annotations

import torch
from torch import Tensor

from loraga_dist.linalg import boolean_sum, complete_bases, orthonormal_columns

M, N, K = 90, 70, 24


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def basis(size: int, seed: int, batch: int = 1) -> Tensor:
    return torch.linalg.qr(torch.randn(batch, size, K, generator=generator(seed))).Q


def of_rank(rank: int, seed: int = 0) -> Tensor:
    draw = generator(seed)
    return torch.randn(M, rank, generator=draw) @ torch.randn(rank, N, generator=draw)


def is_orthonormal(X: Tensor) -> bool:
    return bool(torch.allclose(X.mT @ X, torch.eye(X.shape[-1]).expand(X.shape[:-2] + (-1, -1)), atol=1e-5))


def test_each_of_a_batch_equals_the_dense_formula() -> None:
    ranks = [70, 10, 3, 0]
    G_BMN, P_BMK, Q_BNK = torch.stack([of_rank(rank) for rank in ranks]), basis(M, 1, 4), basis(N, 2, 4)
    G_BMN[1] *= 1e-12
    inside = P_BMK @ (P_BMK.mT @ G_BMN @ Q_BNK) @ Q_BNK.mT
    dense_BMN = P_BMK @ (P_BMK.mT @ G_BMN) + (G_BMN @ Q_BNK) @ Q_BNK.mT - inside
    U, S, V = boolean_sum(G_BMN @ Q_BNK, G_BMN.mT @ P_BMK, P_BMK, Q_BNK, 2 * K)
    assert (S.diff() <= 0).all()
    for at, rank in enumerate(ranks):
        held = min(2 * rank, 2 * K)
        assert int((S[at] > 0).sum()) == held, "what is left of G on either side has G's rank at most"
        assert is_orthonormal(U[at, :, :held]) and is_orthonormal(V[at, :, :held])
        assert not U[at, :, held:].any() and not V[at, :, held:].any()
        found = U[at] * S[at] @ V[at].T
        assert (found - dense_BMN[at]).norm() <= 1e-5 * dense_BMN[at].norm()


def test_triplets_are_those_of_an_svd() -> None:
    G_MN, P_BMK, Q_BNK = of_rank(70), basis(M, 1), basis(N, 2)
    G_MN = G_MN * torch.arange(1, N + 1) ** -1.0
    dense = (P_BMK @ (P_BMK.mT @ G_MN) + (G_MN @ Q_BNK) @ Q_BNK.mT - P_BMK @ (P_BMK.mT @ G_MN @ Q_BNK) @ Q_BNK.mT)[0]
    expected = torch.linalg.svd(dense.double())
    U, S, V = boolean_sum(G_MN @ Q_BNK, G_MN.mT @ P_BMK, P_BMK, Q_BNK, K)
    torch.testing.assert_close(S[0].double(), expected.S[:K], rtol=1e-5, atol=1e-5 * float(expected.S[0]))
    overlap = (U[0, :, :8].double().T @ expected.U[:, :8]).abs()
    torch.testing.assert_close(overlap, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-4)
    assert (V[0].gather(0, V[0].abs().argmax(dim=0)[None]) > 0).all(), "signs are fixed by the right vectors"


def test_converged_bases_leave_nothing_outside() -> None:
    G_MN = of_rank(8)
    U, _, Vh = torch.linalg.svd(G_MN, full_matrices=False)
    P_MK, Q_NK = U[:, :K].contiguous(), Vh[:K].T.contiguous()
    U, S, V = boolean_sum((G_MN @ Q_NK)[None], (G_MN.T @ P_MK)[None], P_MK[None], Q_NK[None], K)
    assert (U[0] * S[0] @ V[0].T - G_MN).norm() < 1e-5 * G_MN.norm()


def test_orthonormal_columns_reveal_the_ranks() -> None:
    draw = generator()
    X_BMK = torch.randn(3, M, 5, generator=draw) @ torch.randn(3, 5, K, generator=draw)
    X_BMK[:, :, 3] *= 1e3
    X_BMK[2] = 0
    W_BMK, held_BK = orthonormal_columns(X_BMK)
    assert held_BK.sum(dim=1).tolist() == [5, 5, 0]
    assert torch.equal(W_BMK.any(dim=1), held_BK)
    for W_MK, held_K, X_MK in zip(W_BMK, held_BK, X_BMK, strict=True):
        assert is_orthonormal(W_MK[:, held_K])
        assert (W_MK @ (W_MK.T @ X_MK) - X_MK).norm() <= 1e-4 * X_MK.norm()


def test_a_basis_is_completed_to_the_whole_space() -> None:
    """With as many columns as rows, a random one now and then has next to nothing outside the others."""
    draw = generator()
    X_BMK = torch.cat([torch.randn(400, 64, 16, generator=draw), torch.zeros(400, 64, 48)], dim=2)
    W_BMK, held_BK = orthonormal_columns(X_BMK)
    assert is_orthonormal(complete_bases([W_BMK], held_BK, [draw] * 400)[0])


def test_completed_bases_keep_what_was_there() -> None:
    W_BMK, held_BK = orthonormal_columns(torch.randn(3, M, K, generator=generator()))
    few_BMK, few_BK = W_BMK.clone(), held_BK.clone()
    few_BMK[1, :, 7:], few_BK[1, 7:] = 0, False
    few_BMK[2], few_BK[2] = 0, False
    other_BNK = basis(N, 4, 3)
    other_BNK[1, :, 7:] = 0
    other_BNK[2] = 0
    draws = [generator(seed) for seed in range(3)]
    P_BMK, Q_BNK = complete_bases([few_BMK, other_BNK], few_BK, draws)
    assert is_orthonormal(P_BMK) and is_orthonormal(Q_BNK)
    assert torch.equal(P_BMK[0], W_BMK[0]) and torch.equal(P_BMK[1, :, :7], W_BMK[1, :, :7])
    alone, _ = complete_bases([few_BMK[1:2], other_BNK[1:2]], few_BK[1:2], [generator(1)])
    torch.testing.assert_close(P_BMK[1], alone[0], rtol=0, atol=1e-5)


def test_whole_bases_are_left_as_they_are() -> None:
    U_BMK = basis(M, 0, 2)
    assert complete_bases([U_BMK], torch.ones(2, K, dtype=torch.bool), [generator()] * 2)[0] is U_BMK
