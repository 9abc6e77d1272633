"""How far a start is from its model, and the yardstick: another rounding of the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import llama_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import loraga_dist
from loraga_dist.config import LoraSection
from loraga_dist.model.selection import select_targets
from loraga_dist.model.targets import Target, meta_copy
from loraga_dist.ranks.world import World
from loraga_dist.sharding.single import SingleProcess
from loraga_dist.start.identity import divergence, flip_last_bits

HALF_DTYPES = (torch.bfloat16, torch.float16)
IDS = torch.arange(3, 195).view(4, 48) % 250


def llama(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config()).eval().to(dtype).requires_grad_(False)


def targets() -> list[Target]:
    return select_targets(meta_copy(LlamaForCausalLM, llama_config()), LoraSection(r=2), lambda r: 2 * r).targets


def unit_in_last_place(W: Tensor) -> Tensor:
    """Of every entry, float64: the spacing of numbers of its dtype and size."""
    kind = torch.finfo(W.dtype)
    _, exponent = torch.frexp(W.double().abs().clamp(min=kind.smallest_normal))
    return torch.ldexp(torch.full_like(W, kind.eps, dtype=torch.float64), exponent - 1)


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits.flatten(0, 1).float()


def test_divergence_is_the_formula_of_kullback_and_leibler() -> None:
    p_PV, q_PV = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]), torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]])
    expected = 0.5 * torch.log(torch.tensor(2.0)) - 0.25 * torch.log(torch.tensor(2.0))
    assert divergence(p_PV.log() + 3, q_PV.log() - 5).item() == pytest.approx(expected.item(), rel=1e-5)
    assert divergence(p_PV.log(), p_PV.log()).item() == 0


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_flipped_twice_the_weights_are_the_same_bits_and_once_they_are_off_by_a_rounding(dtype: torch.dtype) -> None:
    model = llama(dtype)
    before = copy.deepcopy(model.state_dict())
    sharding = SingleProcess(World.alone())
    flip_last_bits(model, targets(), sharding)
    squares, flipped = [], set()
    for target in targets():
        W, W_flipped = before[target.parameter_name], model.get_parameter(target.parameter_name)
        units = ((W_flipped.double() - W.double()) / unit_in_last_place(W)).flatten()
        assert set(units.tolist()) == {-1.0, 0.0, 1.0}
        assert set(units.nonzero()[:, 0].remainder(W.shape[1]).tolist()) == set(range(W.shape[1])), "every column"
        squares.append(units.square().mean())
        flipped.add(target.parameter_name)
    assert sum(squares) / len(squares) == pytest.approx(1 / 12, rel=0.1), "the mean square of a rounding's error"
    flip_last_bits(model, targets(), sharding)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int16), before[name].view(torch.int16)), name
    assert len(flipped) == 21


def test_the_yardstick_is_what_rounding_from_float32_costs() -> None:
    """Against weights that the same rounding could have come from, computed in float32."""
    rounded = llama(torch.bfloat16)
    model = copy.deepcopy(rounded).float()
    original = logits_of(model)
    generator = torch.Generator().manual_seed(0)
    costs = []
    for _ in range(8):
        for target in targets():
            W = rounded.get_parameter(target.parameter_name)
            error = (torch.rand(W.shape, generator=generator) - 0.5) * unit_in_last_place(W)
            model.get_parameter(target.parameter_name).data.copy_(W.double() + error)
        costs.append(divergence(original, logits_of(model)).item())
    flip_last_bits(rounded, targets(), SingleProcess(World.alone()))
    yardstick = divergence(original, logits_of(copy.deepcopy(rounded).float())).item()
    assert yardstick == pytest.approx(sum(costs) / len(costs), rel=0.3)


def start_of(dtype: torch.dtype, **init: Any) -> Any:
    batches = [{"input_ids": IDS, "labels": IDS.clone()}, {"input_ids": IDS + 1, "labels": IDS + 1}]
    config = {
        "lora": {"r": 4, "lora_alpha": 8},
        "init": init,
        "gradient": {"engine": "exact", "oversampling": 8},
    }
    return loraga_dist.initialize(llama(dtype), batches, config)


def test_a_start_in_bfloat16_is_judged_by_loss_and_divergence() -> None:
    small = start_of(torch.bfloat16, stable_gamma=4096.0).identity_check
    large = start_of(torch.bfloat16, stable_gamma=0.05).identity_check
    model = llama(torch.bfloat16)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(input_ids=IDS[:1]).logits[0, :-1].float(), IDS[0, 1:])
    for check in (small, large):
        assert check.mean_loss_before == pytest.approx(losses.item(), rel=1e-5)
        assert check.kl is not None and check.kl > 0 and check.dtype == "bfloat16"
        assert check.kl_of_rounding == small.kl_of_rounding
    assert small.roundings is not None and small.roundings < 4
    assert large.roundings is not None and large.roundings > 16
    assert abs(small.mean_loss_after - small.mean_loss_before) < abs(large.mean_loss_after - large.mean_loss_before)
    assert f"{large.roundings:.2g} x another bfloat16 rounding" in large.summary


def test_float32_and_an_unchanged_base_need_no_yardstick() -> None:
    single = start_of(torch.float32).identity_check
    assert single.kl is not None and single.kl < 1e-8 and single.kl_of_rounding is None and single.roundings is None
    unchanged = start_of(torch.bfloat16, scheme="kaiming").identity_check
    assert unchanged.kl == 0 and unchanged.kl_of_rounding is None
    assert unchanged.mean_loss_after == unchanged.mean_loss_before
