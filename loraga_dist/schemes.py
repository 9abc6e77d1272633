"""From the singular triplets of a gradient to the first A and B of a LoRA adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loraga_dist.errors import UserError
from loraga_dist.linalg import TruncatedSVD, numerical_rank


@dataclass(frozen=True, kw_only=True)
class LoraFactors:
    """The adapter's first factors, fp32, contiguous; the layer adds scaling * B_MR @ A_RN to its weight."""

    A_RN: Tensor
    B_MR: Tensor


@dataclass(frozen=True, kw_only=True)
class ScaleInputs:
    """What a scale may depend on. S_B_R: singular values of the triplets that B takes its columns from."""

    out_features: int
    r: int
    scaling: float
    stable_gamma: float
    S_B_R: Tensor
    weight_S_K: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to initialise: its function, and the triplets it needs for a rank r."""

    factors: Callable[..., LoraFactors]
    num_triplets: Callable[[int], int]


Indices = tuple[Tensor, Tensor]
Multipliers = tuple[Tensor | float, Tensor | float]


def lora_scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """PEFT's factor in front of B A: lora_alpha / r, or lora_alpha / sqrt(r) with rank-stabilised LoRA."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def lora_ga(
    svd: TruncatedSVD,
    *,
    r: int,
    scaling: float,
    direction: str,
    scale: str,
    stable_gamma: float,
    generator: torch.Generator,
    weight_S_K: Tensor | None = None,
) -> LoraFactors:
    """LoRA-GA: A and B share out the 2r leading singular directions of the gradient G ~ U S V^T.

    `direction` (a key of DIRECTIONS) says which right vectors become rows of A and which left ones columns of B,
    `scale` (a key of SCALES) by what they are multiplied. `weight_S_K`, at least r leading singular values of the
    weight itself, is needed by the scale weight_svd alone; `generator` is drawn from by the direction random alone.

    Where G has fewer than 2r singular values above rounding, the columns of B that would be noise are zero, so that
    these components start as in plain LoRA. Rows of A stay orthogonal and of one norm.

    Raises UserError if r needs more triplets than `svd` holds, and for an unknown direction or scale.
    Source: arXiv 2407.05000, section 3, and the official code github.com/Outsider565/LoRA-GA.
    """
    if 2 * r > svd.width:
        raise UserError(
            "lora.r",
            r,
            f"LoRA-GA needs 2r singular triplets and the gradient gives {svd.width}: use r <= {svd.width // 2}",
        )
    choose = _lookup(DIRECTIONS, "init.direction", direction)
    multipliers = _lookup(SCALES, "init.scale", scale)

    index_A_R, index_B_R = (index.to(svd.S_K.device) for index in choose(r, generator))
    inputs = ScaleInputs(
        out_features=svd.U_MK.shape[0],
        r=r,
        scaling=scaling,
        stable_gamma=stable_gamma,
        S_B_R=svd.S_K[index_B_R],
        weight_S_K=weight_S_K,
    )
    times_A, times_B = multipliers(inputs)
    above_rounding_R = index_B_R < numerical_rank(svd.S_K, svd.U_MK.shape[0], svd.Vh_KN.shape[1])
    return LoraFactors(
        A_RN=(svd.Vh_KN[index_A_R] * times_A).contiguous(),
        B_MR=(svd.U_MK[:, index_B_R] * (times_B * above_rounding_R)).contiguous(),
    )


def _lookup(table: dict[str, Callable], key: str, name: str) -> Callable:
    if name not in table:
        raise UserError(key, name, f"write one of {', '.join(table)}")
    return table[name]


def _a_first(r: int, generator: torch.Generator) -> Indices:
    return torch.arange(r), torch.arange(r, 2 * r)


def _b_first(r: int, generator: torch.Generator) -> Indices:
    return torch.arange(r, 2 * r), torch.arange(r)


def _alternating(r: int, generator: torch.Generator) -> Indices:
    return torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)


def _random(r: int, generator: torch.Generator) -> Indices:
    index_A_R, index_B_R = torch.randperm(2 * r, generator=generator, device=generator.device).split(r)
    return index_A_R, index_B_R


def _stable(inputs: ScaleInputs) -> Multipliers:
    # Forward output and first-step update keep their size over widths and ranks: theorem 3.2 of the paper.
    factor = inputs.out_features**0.25 / math.sqrt(inputs.stable_gamma)
    return factor, factor


def _unit(inputs: ScaleInputs) -> Multipliers:
    return 1.0, 1.0


def _gd(inputs: ScaleInputs) -> Multipliers:
    return 1 / inputs.scaling, 1 / inputs.scaling


def _weight_svd(inputs: ScaleInputs) -> Multipliers:
    assert inputs.weight_S_K is not None, "the scale weight_svd needs weight_S_K"
    factor = (inputs.weight_S_K[: inputs.r] / inputs.scaling).sqrt().mean().item()
    return factor, factor


def _peft(inputs: ScaleInputs) -> Multipliers:
    # PEFT's own "stable": only B is scaled, and by the gradient's singular values, so it depends on the loss scale.
    return 1.0, inputs.S_B_R * (inputs.out_features**0.25 / math.sqrt(inputs.stable_gamma))


DIRECTIONS: dict[str, Callable[[int, torch.Generator], Indices]] = {
    "ArB2r": _a_first,
    "A2rBr": _b_first,
    "ArBr": _alternating,
    "random": _random,
}

SCALES: dict[str, Callable[[ScaleInputs], Multipliers]] = {
    "stable": _stable,
    "unit": _unit,
    "gd": _gd,
    "weight_svd": _weight_svd,
    "peft": _peft,
}

SCHEMES: dict[str, Scheme] = {
    "lora_ga": Scheme(factors=lora_ga, num_triplets=lambda r: 2 * r),
}
