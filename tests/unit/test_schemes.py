"""Every scheme's factors against formulas written by hand, stock PEFT, and what they are meant to do to the loss."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from subspace import efficiency
from torch import Tensor, nn

from loraga_dist.linalg import TruncatedSVD, sign_fix, truncated_svd
from loraga_dist.schemes import (
    DIRECTIONS,
    SCALES,
    SCHEMES,
    LoraFactors,
    SchemeInputs,
    kaiming,
    lora_ga,
    lora_one,
    lora_scaling,
    olora,
    pissa,
)

M, N, R = 80, 48, 4
SCALING, GAMMA = 0.5, 16.0


def gradient(*, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    U_MN = torch.linalg.qr(torch.randn(M, N, generator=generator)).Q
    V_NN = torch.linalg.qr(torch.randn(N, N, generator=generator)).Q
    return (U_MN * 0.8 ** torch.arange(N)) @ V_NN.T


def triplets(G_MN: Tensor) -> TruncatedSVD:
    return truncated_svd(G_MN, rank=2 * R, oversampling=8, generator=torch.Generator().manual_seed(0))


def inputs(*, r: int = R, seed: int = 0, **given: Any) -> SchemeInputs:
    settings: dict[str, Any] = {"M": M, "N": N, "scaling": SCALING, "direction": "ArB2r", "scale": "stable"}
    settings |= {"stable_gamma": GAMMA, "generator": torch.Generator().manual_seed(seed)} | given
    return SchemeInputs(r=r, **settings)


def factors(
    svd: TruncatedSVD,
    *,
    direction: str = "ArB2r",
    scale: str = "stable",
    r: int = R,
    seed: int = 0,
    weight_S_K: Tensor | None = None,
) -> LoraFactors:
    return lora_ga(
        inputs(svd=svd, direction=direction, scale=scale, r=r, seed=seed, stable_gamma=GAMMA, weight_S_K=weight_S_K)
    )


def by_hand(G_MN: Tensor, direction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unscaled A, B and the singular values of B, as the official code slices them."""
    U, S, Vh = torch.linalg.svd(G_MN, full_matrices=False)
    U, Vh = sign_fix(U, Vh)
    if direction == "ArB2r":
        return Vh[:R], U[:, R : 2 * R], S[R : 2 * R]
    if direction == "A2rBr":
        return Vh[R : 2 * R], U[:, :R], S[:R]
    return Vh[1 : 2 * R : 2], U[:, 0 : 2 * R : 2], S[0 : 2 * R : 2]


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_directions_and_stable_scale_by_hand(direction: str) -> None:
    G_MN = gradient()
    A, B, _ = by_hand(G_MN, direction)
    got = factors(triplets(G_MN), direction=direction)
    factor = M**0.25 / math.sqrt(GAMMA)
    torch.testing.assert_close(got.A_RN, A * factor, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.B_MR, B * factor, rtol=0, atol=1e-5)
    assert got.A_RN.dtype == got.B_MR.dtype == torch.float32
    assert got.A_RN.is_contiguous() and got.B_MR.is_contiguous()


def test_other_scales_by_hand() -> None:
    G_MN = gradient()
    weight_S_K = torch.linalg.svdvals(gradient(seed=5) * 3)
    A, B, S_B = by_hand(G_MN, "ArB2r")
    mean_root = (weight_S_K[:R] / SCALING).sqrt().mean()
    expected = {
        "unit": (A, B),
        "gd": (A / SCALING, B / SCALING),
        "weight_svd": (A * mean_root, B * mean_root),
        "peft": (A, B * S_B * M**0.25 / math.sqrt(GAMMA)),
    }
    assert set(expected) == set(SCALES) - {"stable"}
    for scale, (A_RN, B_MR) in expected.items():
        got = factors(triplets(G_MN), scale=scale, weight_S_K=weight_S_K)
        torch.testing.assert_close(got.A_RN, A_RN, rtol=0, atol=2e-5)
        torch.testing.assert_close(got.B_MR, B_MR, rtol=0, atol=2e-5)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_the_peft_scale_is_stock_peft(direction: str) -> None:
    from peft import LoraConfig, LoraGAConfig, get_peft_model
    from peft.tuners.lora.loraga import preprocess_loraga

    torch.manual_seed(0)
    x_TN, target_TM = torch.randn(64, N) * 0.9 ** torch.arange(N), torch.randn(64, M) * 0.9 ** torch.arange(M)
    linear = nn.Linear(N, M, bias=False)
    model = nn.Sequential(copy.deepcopy(linear))

    def backward(network: nn.Module) -> None:
        nn.functional.mse_loss(network(x_TN), target_TM).backward()

    options: dict[str, Any] = {
        "init_lora_weights": "lora_ga",
        "lora_ga_config": LoraGAConfig(direction=direction, scale="stable", stable_gamma=int(GAMMA)),
    }
    config = LoraConfig(r=R, lora_alpha=int(R * SCALING), target_modules=["0"], **options)
    preprocess_loraga(model, config, lambda: backward(model))
    layer: Any = get_peft_model(model, config).get_submodule("base_model.model.0")  # type: ignore[arg-type]
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()

    backward(linear)
    assert linear.weight.grad is not None
    got = factors(triplets(linear.weight.grad), direction=direction, scale="peft")
    sign_A_R, sign_B_R = (A * got.A_RN).sum(dim=1).sign(), (B * got.B_MR).sum(dim=0).sign()
    torch.testing.assert_close(got.A_RN, A * sign_A_R[:, None], rtol=0, atol=1e-4)
    torch.testing.assert_close(got.B_MR, B * sign_B_R, rtol=0, atol=1e-4 * float(B.abs().max()))


def test_random_splits_all_directions_and_follows_the_generator() -> None:
    svd = triplets(gradient())
    got = factors(svd, direction="random", scale="unit", seed=1)
    used_by_A = (got.A_RN @ svd.Vh_KN[: 2 * R].T).abs().argmax(dim=1).tolist()
    used_by_B = (svd.U_MK[:, : 2 * R].T @ got.B_MR).abs().argmax(dim=0).tolist()
    assert sorted(used_by_A + used_by_B) == list(range(2 * R))
    assert torch.equal(got.A_RN, factors(svd, direction="random", scale="unit", seed=1).A_RN)
    assert any(not torch.equal(got.A_RN, factors(svd, direction="random", scale="unit", seed=s).A_RN) for s in (2, 3))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", ["stable", "peft"])
def test_every_direction_is_optimal(direction: str, scale: str) -> None:
    G_MN = gradient()
    got = factors(triplets(G_MN), direction=direction, scale=scale)
    assert efficiency(G_MN, got.B_MR, got.A_RN.T) == pytest.approx(1, abs=1e-6)


def test_the_loss_scale_moves_peft_only() -> None:
    small, large = triplets(gradient() * 1e-3), triplets(gradient())
    torch.testing.assert_close(factors(small).A_RN, factors(large).A_RN, rtol=0, atol=1e-6)
    torch.testing.assert_close(factors(small).B_MR, factors(large).B_MR, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        factors(small, scale="peft").B_MR * 1e3, factors(large, scale="peft").B_MR, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("scale", ["stable", "peft"])
def test_directions_that_are_rounding_noise_start_as_plain_lora(scale: str) -> None:
    generator = torch.Generator().manual_seed(0)
    G_MN = torch.randn(M, R + 1, generator=generator) @ torch.randn(R + 1, N, generator=generator)
    got = factors(triplets(G_MN), scale=scale)
    assert got.B_MR[:, 0].norm() > 0
    assert torch.equal(got.B_MR[:, 1:], torch.zeros(M, R - 1))
    gram_RR = got.A_RN @ got.A_RN.T
    torch.testing.assert_close(gram_RR, torch.eye(R) * gram_RR[0, 0], rtol=0, atol=1e-5)
    assert efficiency(G_MN, got.B_MR, got.A_RN.T) == pytest.approx(1, abs=1e-6)


def test_a_zero_gradient_gives_plain_lora() -> None:
    got = factors(triplets(torch.zeros(M, N)))
    assert torch.equal(got.B_MR, torch.zeros(M, R))
    assert torch.linalg.matrix_rank(got.A_RN) == R


def test_lora_one_by_hand() -> None:
    G_MN = gradient()
    U, S, Vh = torch.linalg.svd(-G_MN.double())
    root_R = (S[:R] / S[0]).sqrt() / math.sqrt(128)
    A, B = root_R[:, None] * Vh[:R], U[:, :R] * root_R
    got = lora_one(inputs(svd=triplets(G_MN), stable_gamma=128.0))
    torch.testing.assert_close(got.B_MR @ got.A_RN, (B @ A).float(), rtol=0, atol=1e-6)
    signs_R = (got.A_RN * A).sum(dim=1).sign()
    torch.testing.assert_close(got.A_RN, (signs_R[:, None] * A).float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(got.B_MR, (B * signs_R).float(), rtol=0, atol=1e-6)


def test_lora_one_starts_down_the_loss() -> None:
    torch.manual_seed(0)
    x_TN, target_TM = torch.randn(64, N), torch.randn(64, M)
    W_MN = torch.zeros(M, N, requires_grad=True)

    def loss(W: Tensor) -> Tensor:
        return (x_TN @ W.T - target_TM).square().mean()

    before = loss(W_MN)
    before.backward()
    assert W_MN.grad is not None
    got = lora_one(inputs(svd=triplets(W_MN.grad), stable_gamma=128.0))
    step = SCALING * got.B_MR @ got.A_RN
    with torch.no_grad():
        assert loss(W_MN + step) < before - 1e-4 < before < loss(W_MN - step)


@pytest.mark.parametrize("M", [80, 24], ids=["tall", "wide"])
@pytest.mark.parametrize(("scheme", "scaling"), [("pissa", 0.5), ("pissa", 3.0), ("olora", 0.5), ("olora", 3.0)])
def test_starts_from_the_weight_are_stock_pefts(scheme: str, scaling: float, M: int) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    linear = nn.Linear(N, M, bias=False)
    W_MN = linear.weight.detach().clone()
    options: dict[str, Any] = {"init_lora_weights": scheme}
    config = LoraConfig(r=R, lora_alpha=int(R * scaling), target_modules=["0"], **options)
    layer: Any = get_peft_model(nn.Sequential(linear), config).get_submodule("base_model.model.0")  # type: ignore[arg-type]
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()

    got = {"pissa": pissa, "olora": olora}[scheme](inputs(M=M, scaling=scaling, W_MN=W_MN.clone()))
    signs_R = (got.A_RN * A).sum(dim=1).sign() if scheme == "pissa" else torch.ones(R)
    for found, expected in ((got.A_RN, signs_R[:, None] * A), (got.B_MR, B * signs_R)):
        assert (found - expected).norm() < 1e-4 * expected.norm()
    product = got.B_MR @ got.A_RN
    assert (product - B @ A).norm() < 1e-5 * product.norm()
    torch.testing.assert_close(W_MN - scaling * product, layer.get_base_layer().weight, rtol=0, atol=1e-5)


def test_pissa_of_a_large_flat_spectrum_is_the_exact_one() -> None:
    W_MN = torch.randn(512, 384, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(W_MN.double(), full_matrices=False)
    got = pissa(inputs(M=512, N=384, W_MN=W_MN))
    expected = (U[:, :R] * S[:R]) @ Vh[:R]
    assert (SCALING * got.B_MR.double() @ got.A_RN.double() - expected).norm() < 1e-4 * expected.norm()


def test_kaiming_is_pefts_default() -> None:
    got = kaiming(inputs(r=16, seed=3))
    stock = nn.Linear(N, 16, bias=False)
    torch.nn.init.kaiming_uniform_(stock.weight, a=math.sqrt(5), generator=torch.Generator().manual_seed(3))
    assert torch.equal(got.A_RN, stock.weight)
    assert 0.9 < float(got.A_RN.abs().max()) * math.sqrt(N) <= 1
    assert torch.equal(got.B_MR, torch.zeros(M, 16))


def test_scaling_and_table() -> None:
    assert lora_scaling(16, 8, False) == 2.0
    assert lora_scaling(16, 64, True) == 2.0
    scheme = SCHEMES["lora_ga"]
    assert scheme.factors is lora_ga
    assert scheme.num_triplets(8) == 16
