"""The truncated SVD against the float64 SVD of the same matrix, vector by vector."""

from __future__ import annotations

import pytest
import torch
from subspace import principal_sines
from torch import Tensor

from loraga_dist.linalg import TruncatedSVD, numerical_rank, sign_fix, truncated_svd

OVERSAMPLING = 32
BAR = 1e-5  # relative error of B0 A0; ten times below what the factors must meet


def matrix_with_spectrum(S_K: Tensor, M: int, N: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    U_MK = torch.linalg.qr(torch.randn(M, len(S_K), generator=generator, dtype=torch.float64)).Q
    V_NK = torch.linalg.qr(torch.randn(N, len(S_K), generator=generator, dtype=torch.float64)).Q
    return ((U_MK * S_K) @ V_NK.T).float()


def gaussian(M: int, N: int) -> Tensor:
    return torch.randn(M, N, generator=torch.Generator().manual_seed(7))


def index_K(K: int) -> Tensor:
    return torch.arange(1, K + 1, dtype=torch.float64)


def close_pairs_K() -> Tensor:
    """Eight pairs whose vectors fp32 arithmetic cannot tell apart to the bar, far above all that follows."""
    return (0.9 ** index_K(8)[:, None] * torch.tensor([1.0, 0.9998], dtype=torch.float64)).flatten()


def hard_matrices() -> dict[str, Tensor]:
    return {
        "geometric": matrix_with_spectrum(2.0 ** -index_K(256), 384, 256),
        "inverse": matrix_with_spectrum(1 / index_K(256), 384, 256),
        "inverse_root": matrix_with_spectrum(index_K(256) ** -0.5, 256, 384),
        "close_pairs": matrix_with_spectrum(torch.cat([close_pairs_K(), 0.01 / index_K(240)]), 384, 256),
        "low_rank_and_noise": matrix_with_spectrum(2.0 ** -(index_K(6) / 2), 256, 384) + 0.002 * gaussian(256, 384),
    }


MATRICES = hard_matrices()


def solve(G_MN: Tensor, *, rank: int, seed: int = 0) -> TruncatedSVD:
    generator = torch.Generator().manual_seed(seed)
    return truncated_svd(G_MN, rank=rank, oversampling=OVERSAMPLING, generator=generator)


def exact(G_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U_MK, S_K, Vh_KN = torch.linalg.svd(G_MN.double(), full_matrices=False)
    return *sign_fix(U_MK, Vh_KN), S_K


def b_times_a(U_MK: Tensor, Vh_KN: Tensor, *, r: int, above_rounding: int) -> Tensor:
    """sum_i u_(r+i) v_i^T over the triplets that are not noise: both signs and single vectors matter in it."""
    last = min(2 * r, above_rounding)
    return U_MK[:, r:last].double() @ Vh_KN[: last - r].double()


def relative_error(X: Tensor, reference: Tensor) -> float:
    return float((X - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("r", [4, 8])
def test_single_vectors_agree_with_exact_svd_and_between_seeds(name: str, r: int) -> None:
    G_MN = MATRICES[name]
    U_MK, Vh_KN, S_K = exact(G_MN)
    count = numerical_rank(S_K, *G_MN.shape)
    truth = b_times_a(U_MK, Vh_KN, r=r, above_rounding=count)

    svds = [solve(G_MN, rank=2 * r, seed=seed) for seed in (1, 2)]
    assert numerical_rank(svds[0].S_K, *G_MN.shape) == min(count, svds[0].width)
    products = [b_times_a(svd.U_MK, svd.Vh_KN, r=r, above_rounding=count) for svd in svds]
    assert relative_error(products[0], truth) < BAR
    assert relative_error(products[1], truth) < BAR
    assert relative_error(products[0], products[1]) < BAR
    torch.testing.assert_close(svds[0].S_K[: 2 * r].double(), S_K[: 2 * r], rtol=1e-6, atol=1e-7 * float(S_K[0]))


@pytest.mark.parametrize("name", ["inverse", "inverse_root", "low_rank_and_noise"])
def test_without_power_iterations_the_same_bar_is_missed(name: str) -> None:
    G_MN, r = MATRICES[name], 8
    torch.manual_seed(0)
    U_MK, _, V_NK = torch.svd_lowrank(G_MN, q=2 * r + OVERSAMPLING, niter=0)
    U_MK, Vh_KN = sign_fix(U_MK, V_NK.T)
    crude = b_times_a(U_MK, Vh_KN, r=r, above_rounding=2 * r)
    U_MK, Vh_KN, _ = exact(G_MN)
    assert relative_error(crude, b_times_a(U_MK, Vh_KN, r=r, above_rounding=2 * r)) > 1000 * BAR


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (64, 40), (40, 64), (7, 5), (1, 9)])
def test_shapes_dtypes_and_orthonormality(shape: tuple[int, int]) -> None:
    M, N = shape
    G_MN = gaussian(M, N)
    before = G_MN.clone()
    svd = solve(G_MN, rank=8)
    K = min(8 + OVERSAMPLING, M, N)
    assert torch.equal(G_MN, before)
    assert svd.width == K
    assert (svd.U_MK.shape, svd.S_K.shape, svd.Vh_KN.shape) == ((M, K), (K,), (K, N))
    assert {svd.U_MK.dtype, svd.S_K.dtype, svd.Vh_KN.dtype} == {torch.float32}
    assert_orthonormal(svd)
    assert (svd.S_K.diff() <= 0).all()


def test_leading_keeps_the_first_triplets() -> None:
    svd = solve(gaussian(64, 40), rank=8)
    front = svd.leading(3)
    assert front.width == 3
    assert torch.equal(front.U_MK, svd.U_MK[:, :3])
    assert torch.equal(front.Vh_KN, svd.Vh_KN[:3])
    assert svd.leading(1000).width == svd.width


def test_full_width_is_the_exact_svd() -> None:
    G_MN = gaussian(48, 40)
    U_MK, Vh_KN, S_K = exact(G_MN)
    svd = solve(G_MN, rank=40)
    torch.testing.assert_close(svd.S_K, S_K.float())
    torch.testing.assert_close(svd.U_MK, U_MK.float())
    torch.testing.assert_close(svd.Vh_KN, Vh_KN.float())


def test_same_seed_gives_the_same_bits() -> None:
    G_MN = MATRICES["inverse"]
    first, second = solve(G_MN, rank=16, seed=3), solve(G_MN, rank=16, seed=3)
    assert torch.equal(first.U_MK, second.U_MK)
    assert torch.equal(first.S_K, second.S_K)
    assert torch.equal(first.Vh_KN, second.Vh_KN)


def test_zero_matrix() -> None:
    svd = solve(torch.zeros(200, 300), rank=8)
    assert torch.equal(svd.S_K, torch.zeros(40))
    assert numerical_rank(svd.S_K, 200, 300) == 0
    assert_orthonormal(svd)


def test_fewer_nonzero_triplets_than_wanted() -> None:
    G_MN = matrix_with_spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), 256, 200)
    svd = solve(G_MN, rank=16)
    assert numerical_rank(svd.S_K, 256, 200) == 3
    torch.testing.assert_close(svd.S_K[:3], torch.tensor([3.0, 2.0, 1.0]))
    assert svd.S_K[3:].max() < 1e-6
    assert_orthonormal(svd)
    U_MK, Vh_KN, _ = exact(G_MN)
    torch.testing.assert_close(svd.U_MK[:, :3].double(), U_MK[:, :3], rtol=0, atol=1e-6)
    torch.testing.assert_close(svd.Vh_KN[:3].double(), Vh_KN[:3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_flat_spectra_end_with_orthonormal_vectors(noise: float) -> None:
    G_MN = matrix_with_spectrum(torch.ones(200, dtype=torch.float64), 200, 256) + noise * gaussian(200, 256)
    svd = solve(G_MN, rank=16)
    assert_orthonormal(svd)
    S_K = torch.linalg.svdvals(G_MN.double())[: svd.width]
    torch.testing.assert_close(svd.S_K[:16].double(), S_K[:16], rtol=1e-3, atol=0)


def test_repeated_singular_values_still_give_the_right_space() -> None:
    S_K = torch.cat([torch.full((8,), 2.0, dtype=torch.float64), 1 / index_K(192)])
    G_MN = matrix_with_spectrum(S_K, 256, 200)
    svd = solve(G_MN, rank=8)
    U_MK, Vh_KN, _ = exact(G_MN)
    assert principal_sines(U_MK[:, :8], svd.U_MK[:, :8])[0] < BAR
    assert principal_sines(Vh_KN[:8].T, svd.Vh_KN[:8].T)[0] < BAR


@pytest.mark.parametrize("factor", [1e-20, 1e15])
def test_the_scale_of_the_gradient_does_not_matter(factor: float) -> None:
    G_MN = MATRICES["inverse"]
    plain, scaled = solve(G_MN, rank=16), solve(G_MN * factor, rank=16)
    torch.testing.assert_close(scaled.U_MK[:, :16], plain.U_MK[:, :16], rtol=0, atol=BAR)
    torch.testing.assert_close(scaled.S_K / factor, plain.S_K)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(40, 40), (200, 200)])
def test_a_non_finite_gradient_raises(bad: float, shape: tuple[int, int]) -> None:
    G_MN = gaussian(*shape)
    G_MN[3, 5] = bad
    with pytest.raises(ValueError, match="NaN or an infinity"):
        solve(G_MN, rank=8)


def test_sign_fix_flips_pairs_together() -> None:
    U_MK, Vh_KN, S_K = exact(gaussian(12, 9))
    flips_K = torch.tensor([1.0, -1, -1, 1, -1, 1, 1, -1, 1], dtype=torch.float64)
    fixed_U_MK, fixed_Vh_KN = sign_fix(U_MK * flips_K, Vh_KN * flips_K[:, None])
    assert torch.equal(fixed_U_MK, U_MK)
    assert torch.equal(fixed_Vh_KN, Vh_KN)
    peak_K = fixed_Vh_KN.gather(1, fixed_Vh_KN.abs().argmax(dim=1, keepdim=True))
    assert (peak_K > 0).all()


def test_numerical_rank_is_that_of_torch() -> None:
    G_MN = matrix_with_spectrum(2.0 ** -index_K(60), 80, 60)
    assert numerical_rank(torch.linalg.svdvals(G_MN), 80, 60) == int(torch.linalg.matrix_rank(G_MN)) > 10
    assert numerical_rank(torch.zeros(4), 80, 60) == 0


def assert_orthonormal(svd: TruncatedSVD) -> None:
    identity = torch.eye(svd.width)
    torch.testing.assert_close(svd.U_MK.T @ svd.U_MK, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(svd.Vh_KN @ svd.Vh_KN.T, identity, rtol=0, atol=1e-5)
