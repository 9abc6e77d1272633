"""Subspace measures against their definitions, written out with full matrices."""

from __future__ import annotations

import math

import pytest
import torch
from subspace import efficiency, principal_sines


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_efficiency_is_its_definition() -> None:
    G_MN, U_MR, V_NR = gaussian(30, 20), gaussian(30, 3, seed=1), gaussian(20, 3, seed=2)
    G = G_MN.double()
    P_U = U_MR.double() @ torch.linalg.pinv(U_MR.double())
    P_V = V_NR.double() @ torch.linalg.pinv(V_NR.double())
    X = P_U @ G + G @ P_V
    best = torch.linalg.svdvals(G)[:6].square().sum()
    expected = (G.square().sum() - (G - X).square().sum()) / best
    assert efficiency(G_MN, U_MR, V_NR) == pytest.approx(float(expected), rel=1e-9)


def test_efficiency_is_one_at_the_optimum_only() -> None:
    G_MN, r = gaussian(30, 20), 4
    U_MK, _, Vh_KN = torch.linalg.svd(G_MN)
    assert efficiency(G_MN, U_MK[:, r : 2 * r], Vh_KN[:r].T) == pytest.approx(1, abs=1e-5)
    assert efficiency(G_MN, U_MK[:, :r], Vh_KN[:r].T) < 0.9  # the same directions twice
    assert efficiency(G_MN, gaussian(30, r, seed=1), gaussian(20, r, seed=2)) < 0.9


def test_efficiency_of_a_zero_side_and_of_a_zero_gradient() -> None:
    G_MN = gaussian(30, 20)
    V_NR = torch.linalg.svd(G_MN).Vh[:4].T
    energies = torch.linalg.svdvals(G_MN.double()).square()
    expected = float(energies[:4].sum() / energies[:8].sum())
    assert efficiency(G_MN, torch.zeros(30, 4), V_NR) == pytest.approx(expected, rel=1e-5)
    assert efficiency(torch.zeros(30, 20), torch.zeros(30, 4), V_NR) == 1.0


def test_principal_sines_of_known_angles() -> None:
    angles = [1.2, 0.3, 1e-9]
    A_MK = torch.eye(8, 3, dtype=torch.float64)
    B_MK = torch.zeros(8, 3, dtype=torch.float64)
    for i, angle in enumerate(angles):
        B_MK[i, i], B_MK[i + 3, i] = math.cos(angle), math.sin(angle)
    mixed_MK = B_MK @ gaussian(3, 3).double()
    expected = torch.tensor([math.sin(angle) for angle in angles], dtype=torch.float64)
    torch.testing.assert_close(principal_sines(A_MK, mixed_MK), expected, rtol=1e-5, atol=1e-15)
    torch.testing.assert_close(principal_sines(A_MK, torch.eye(8)[:, 3:6]), torch.ones(3, dtype=torch.float64))
