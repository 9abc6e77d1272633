"""What makes inputs white, against float64 sums: exactly, from a sketch where the moment is as the sketch takes it, and
with what no data should give it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraga_dist.linalg import Moments, Whitening

N, T, K, DAMPING = 48, 400, 12, 0.3
CPU = torch.device("cpu")


def inputs(seed: int = 0) -> Tensor:
    """Some directions far above the others, and one feature far above those."""
    draw = torch.Generator().manual_seed(seed)
    few_TK = torch.randn(T, K, generator=draw) * torch.arange(1, K + 1) ** -0.5
    x_TN = few_TK @ torch.randn(K, N, generator=draw) + 0.1 * torch.randn(T, N, generator=draw)
    x_TN[:, 3] *= 30
    return x_TN


def sums(width: int, *parts: Tensor) -> Moments:
    moments = Moments.zeros(N, width, torch.Generator().manual_seed(1), CPU)
    for x_TN in parts:
        moments.add_(x_TN)
    return moments


def damped(x_TN: Tensor) -> Tensor:
    C_NN = x_TN.double().T @ x_TN.double() / len(x_TN)
    return C_NN + DAMPING * C_NN.diagonal().mean() * torch.eye(N, dtype=torch.float64)


def white(whitening: Whitening, C_NN: Tensor) -> Tensor:
    """W C W^T."""
    W_NN = whitening.transposed(torch.eye(N, dtype=torch.float64))
    return W_NN @ C_NN @ W_NN.T


def test_exactly() -> None:
    x_TN = inputs()
    whitening = Whitening.of(sums(N, x_TN), DAMPING)
    torch.testing.assert_close(white(whitening, damped(x_TN)), torch.eye(N, dtype=torch.float64), rtol=0, atol=1e-5)


def test_from_a_sketch_where_the_rest_is_a_diagonal() -> None:
    """All large directions fit into the sketch: what is left is noise, whose moment is nearly diagonal."""
    x_TN = inputs()
    left = white(Whitening.of(sums(2 * K, x_TN), DAMPING), damped(x_TN)) - torch.eye(N, dtype=torch.float64)
    by_diagonal = white(Whitening.of(sums(0, x_TN), DAMPING), damped(x_TN)) - torch.eye(N, dtype=torch.float64)
    assert left.norm() < 0.02 * by_diagonal.norm()


def test_rows_and_their_transpose() -> None:
    """(V W) x is V (W x)."""
    x_TN, V_RN = inputs(1), torch.randn(5, N, generator=torch.Generator().manual_seed(2))
    for width in (0, K, N):
        whitening = Whitening.of(sums(width, inputs()), DAMPING)
        torch.testing.assert_close(
            whitening.transposed(V_RN) @ x_TN.T, V_RN @ whitening.rows(x_TN).T, rtol=1e-4, atol=1e-4
        )
        assert whitening.rows(x_TN.bfloat16()).dtype == torch.bfloat16


def test_parts_add_up() -> None:
    parts = inputs().split([100, 290, 10])
    for width in (0, K, N):
        together, apart = Whitening.of(sums(width, inputs()), DAMPING), Whitening.of(sums(width, *parts), DAMPING)
        for mine, other in ((together.scale_N, apart.scale_N), (together.F_K, apart.F_K)):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_effective_rank() -> None:
    directions_KN = torch.linalg.qr(torch.randn(N, 4, generator=torch.Generator().manual_seed(0))).Q.T
    x_TN = torch.randn(4000, 4, generator=torch.Generator().manual_seed(1)) @ directions_KN
    assert float(Whitening.of(sums(N, x_TN), DAMPING).effective_rank) == pytest.approx(4, rel=0.02)
    assert float(Whitening.of(sums(N // 2, x_TN), DAMPING).effective_rank) == pytest.approx(4, rel=0.3)
    assert Whitening.of(sums(0, x_TN), DAMPING).effective_rank.isnan()


@pytest.mark.parametrize("width", [0, K, N])
def test_inputs_that_are_zero_or_few_or_huge_stay_finite(width: int) -> None:
    one_TN, zero_TN = inputs()[:1], torch.zeros(T, N)
    for moments in (sums(width), sums(width, zero_TN), sums(width, one_TN), sums(width, 1e12 * one_TN)):
        whitening = Whitening.of(moments, DAMPING)
        for tensor in (whitening.scale_N, whitening.Q_NK, whitening.F_K):
            assert tensor.isfinite().all()
