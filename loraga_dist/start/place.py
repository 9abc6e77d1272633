"""The start put into a model in place: A0, B0 into a PEFT adapter's shards and, for schemes that change the base,
s*B0*A0 out of each rank's part of W."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraga_dist.config import LoraSection, SchemeConfig
from loraga_dist.data.samples import Microbatch
from loraga_dist.engines import GradientSVD, Matrix
from loraga_dist.gradients.one_pass import forward, full_float32_matmul
from loraga_dist.linalg import numerical_rank
from loraga_dist.model.plan import Plan
from loraga_dist.model.targets import Target, peft_lora_config
from loraga_dist.schemes import SCHEMES, LoraFactors
from loraga_dist.sharding.base import Sharding
from loraga_dist.start.factors import _rounded, make_factors, product_norm, weight_singular_values

PROBE_TOKENS = 64
"""Positions of the first calibration sequence whose logits are compared before and after."""


@dataclass(frozen=True, kw_only=True)
class GradientReport:
    """What is known of one target's gradient."""

    singular_values: list[float]
    num_converged: int
    """Leading ones that were asked of the engine; `factors/` holds more."""
    numerical_rank: int
    captured_energy: float
    split_half_cosine: float | None
    window_capture: float | None
    engine: str


@dataclass(frozen=True, kw_only=True)
class TargetReport:
    """What the report says of one target; the same on every rank."""

    target: Target
    owner_rank: int
    gradient: GradientReport | None
    """None where the scheme takes none."""
    offset_ratio: float
    """||s B0 A0||_F / ||W||_F."""


def add_adapter(model: nn.Module, lora: LoraSection, sharding: Sharding) -> Any:
    """A PEFT model around `model`; under ZeRO-3 its new parameters are shards of the base's dtype from the start."""
    from peft import get_peft_model

    dtype = next(model.parameters()).dtype
    with sharding.new_parameters(dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            model,  # type: ignore[arg-type]
            peft_lora_config(lora),
            # DeepSpeed wants one dtype for all parameters; the factors lose nothing, they were rounded to it before
            autocast_adapter_dtype=not sharding.is_sharded,
        )


def place_factors(
    peft_model: Any,
    plan: Plan,
    owned: Mapping[str, GradientSVD | LoraFactors],
    config: SchemeConfig,
    *,
    sharding: Sharding,
    rounding: Callable[[Target], torch.dtype],
    keep: Callable[[Target, LoraFactors], None] | None = None,
) -> list[TargetReport]:
    """Per target: the owner makes A0, B0 and broadcasts them; every rank keeps its slices and updates its part of W.

    owned: what calibration found of the targets this rank owns, or `weights.make_factors_of_weights` made of them.
    rounding: the dtype A0 and B0 are rounded to before anything uses them, so that W_res belongs to them as stored.
    keep: called on every rank with the factors (float32, on the host).
    """
    world = sharding.world
    layers = {target.name: peft_model.base_model.model.get_submodule(target.name) for target in plan.targets}
    square_norms = sharding.square_norms([layer.get_base_layer().weight for layer in layers.values()]).tolist()
    reports = []
    owners = plan.owners
    matrices = plan.matrices
    with full_float32_matmul():
        for target, square_norm in zip(plan.targets, square_norms, strict=True):
            layer = layers[target.name]
            weight = layer.get_base_layer().weight
            factors, numbers = _share_factors(
                target,
                matrices.get(target.name),
                owners[target.name],
                owned.get(target.name),
                config,
                weight,
                sharding,
                rounding(target),
            )
            if "default" in layer.lora_magnitude_vector:
                _put_magnitudes(layer, target, factors, changes_base=plan.scheme.changes_base)
            if plan.scheme.changes_base:
                sharding.subtract_lowrank(weight, target, factors.A_RN, factors.B_MR)
            sharding.put(layer.lora_A["default"].weight, factors.A_RN)
            sharding.put(layer.lora_B["default"].weight, factors.B_MR)
            if keep is not None:
                keep(target, LoraFactors(A_RN=factors.A_RN.cpu(), B_MR=factors.B_MR.cpu()))
            reports.append(
                TargetReport(
                    target=target,
                    owner_rank=owners[target.name],
                    gradient=_gradient_report(numbers, matrices[target.name]) if matrices else None,
                    offset_ratio=target.scaling * product_norm(factors) / max(square_norm**0.5, 1e-30),
                )
            )
    world.barrier()
    return reports


@torch.no_grad()
def _put_magnitudes(layer: Any, target: Target, factors: LoraFactors, *, changes_base: bool) -> None:
    """DoRA's magnitudes, before W is changed: the norms of what W_res + s B A will be. Of a whole model."""
    W = layer.get_base_layer().weight.float()
    V_MN = W.t() if target.transposed else W
    if not changes_base:
        V_MN = torch.addmm(V_MN, factors.B_MR, factors.A_RN, alpha=target.scaling)
    norms_M = torch.linalg.vector_norm(V_MN, dim=1, dtype=torch.float64)
    layer.lora_magnitude_vector["default"].weight.copy_(norms_M)


def _share_factors(
    target: Target,
    matrix: Matrix | None,
    owner: int,
    found: GradientSVD | LoraFactors | None,
    config: SchemeConfig,
    weight: nn.Parameter,
    sharding: Sharding,
    dtype: torch.dtype,
) -> tuple[LoraFactors, list[float]]:
    """The owner's factors, and its numbers of the gradient if there is one, on every rank."""
    world, device = sharding.world, sharding.world.device
    weight_S_R = _weight_singular_values(target, owner, weight, sharding, config)
    A_RN = torch.empty(target.r, target.N, device=device)
    B_MR = torch.empty(target.M, target.r, device=device)
    num_triplets = SCHEMES[config.scheme].num_triplets(target.r)
    numbers = torch.zeros(4 + num_triplets, dtype=torch.float64, device=device)
    if world.rank == owner:
        assert found is not None, f"{target.name} was not factorized by its owner"
        if isinstance(found, LoraFactors):
            factors = _rounded(found, dtype)
        else:
            factors = make_factors(target, found.svd, config, dtype, weight_S_R)
            known = [float("nan") if x is None else x for x in (found.split_half_cosine, found.window_capture)]
            rank = numerical_rank(found.svd.S_K, target.M, target.N)
            assert matrix is not None
            captured = found.captured_energy * _energy_share(found.svd.S_K, num_triplets, matrix.num_triplets)
            numbers.copy_(
                torch.tensor([captured, *known, rank, *found.svd.S_K[:num_triplets].tolist()], dtype=torch.float64)
            )
        A_RN.copy_(factors.A_RN)
        B_MR.copy_(factors.B_MR)
    world.broadcast_(A_RN, owner)
    world.broadcast_(B_MR, owner)
    world.broadcast_(numbers, owner)
    return LoraFactors(A_RN=A_RN, B_MR=B_MR), numbers.tolist()


def _energy_share(S_K: torch.Tensor, few: int, many: int) -> float:
    """Of the first `many` singular directions' energy, what the first `few` hold: a rank budget takes no more."""
    return 1.0 if few == many else (S_K[:few].square().sum() / S_K[:many].square().sum()).item()


def _weight_singular_values(
    target: Target, owner: int, weight: nn.Parameter, sharding: Sharding, config: SchemeConfig
) -> torch.Tensor | None:
    """Leading r singular values of W on the owner, for the one scale that depends on them; gathers this one weight."""
    if config.scale != "weight_svd":
        return None
    with sharding.full_weight(weight) as W:
        return weight_singular_values(W, target, config) if sharding.world.rank == owner else None


def _gradient_report(numbers: list[float], matrix: Matrix) -> GradientReport:
    captured, cosine, capture, rank, *singular_values = numbers
    return GradientReport(
        singular_values=singular_values,
        numerical_rank=int(rank),
        captured_energy=captured,
        split_half_cosine=_known(cosine),
        window_capture=_known(capture),
        engine=matrix.engine,
        num_converged=matrix.num_triplets,
    )


def _known(value: float) -> float | None:
    """A number that travelled as NaN where there was none."""
    return None if math.isnan(value) else value


@torch.no_grad()
def probe_logits(model: nn.Module, microbatch: Microbatch, sharding: Sharding) -> torch.Tensor:
    """Logits at the first positions of this rank's first sequence, float32 on the host; a collective under ZeRO-3."""
    logits = forward(model, microbatch, sharding.world.device)
    sharding.release()
    return logits[:1, :PROBE_TOKENS].float().cpu()
