"""The start put into a model in place: A0, B0 into a PEFT adapter's shards and, for schemes that change the base,
s*B0*A0 out of each rank's part of W."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraga_dist.artifacts.adapter import stored_config
from loraga_dist.config import LoraSection
from loraga_dist.model.factors import join, product_norm
from loraga_dist.model.plan import Plan
from loraga_dist.model.targets import Target, layers_of, peft_lora_config
from loraga_dist.schemes import LoraFactors
from loraga_dist.sharding.base import Sharding


def add_adapter(model: nn.Module, lora: LoraSection, targets: Sequence[Target], sharding: Sharding) -> Any:
    """A PEFT model around `model`; under ZeRO-3 its new parameters are shards of the base's dtype from the start."""
    from peft import get_peft_model
    from peft.utils.other import ModulesToSaveWrapper

    config = stored_config(peft_lora_config(lora), targets, use_dora=lora.use_dora)
    config.inference_mode = False

    dtype = next(model.parameters()).dtype
    with sharding.new_parameters(dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model: Any = get_peft_model(
            model,  # type: ignore[arg-type]
            config,
            # DeepSpeed wants one dtype for all parameters; the factors lose nothing, they were rounded to it before
            autocast_adapter_dtype=not sharding.is_sharded,
        )
    if sharding.stays_in_files:  # PEFT has copied what nobody held
        for module in peft_model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                originals = list(module.original_module.parameters())
                copies = list(module.modules_to_save["default"].parameters())
                with sharding.hold(originals), torch.no_grad():
                    for original, copied in zip(originals, copies, strict=True):
                        copied.copy_(original)
    return peft_model


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The factors as they were put into the model."""

    factors: dict[str, LoraFactors]
    """Of all targets, float32 on the host; on rank 0 alone."""
    offset_ratios: dict[str, float]
    """||s B0 A0||_F / ||W||_F of every target, on every rank."""


def place_factors(peft_model: Any, plan: Plan, owned: Mapping[str, LoraFactors], *, sharding: Sharding) -> Placed:
    """Put A0 and B0 of every target into the adapter, and what they take out of the base out of W. A collective.

    The owner broadcasts a target's factors; every rank keeps its slices and updates its part of W.
    owned: of the targets this rank owns, as they are stored.
    """
    world, device = sharding.world, sharding.world.device
    members_of = layers_of(plan.targets)
    layers = {name: peft_model.base_model.model.get_submodule(name) for name in members_of}
    parameters = [(adapted_parameter(layer), members_of[name]) for name, layer in layers.items()]
    square_norms = iter(sharding.square_norms(parameters).tolist())
    placed = Placed(factors={}, offset_ratios={})
    for layer, (parameter, members) in zip(layers.values(), parameters, strict=True):
        made = []
        for target in members:
            owner = plan.owners[target.name]
            A_RN = torch.empty(target.r, target.N, device=device)
            B_MR = torch.empty(target.M, target.r, device=device)
            if world.rank == owner:
                A_RN.copy_(owned[target.name].A_RN)
                B_MR.copy_(owned[target.name].B_MR)
            factors = LoraFactors(A_RN=world.broadcast_(A_RN, owner), B_MR=world.broadcast_(B_MR, owner))
            if "default" in layer.lora_magnitude_vector:
                _put_magnitudes(layer, target, factors, changes_base=plan.scheme.changes_base)
            if plan.scheme.changes_base:
                sharding.subtract_lowrank(parameter, target, A_RN, B_MR)
            size = max(next(square_norms) ** 0.5, 1e-30)
            placed.offset_ratios[target.name] = target.scaling * product_norm(factors) / size
            if world.is_main:
                placed.factors[target.name] = LoraFactors(A_RN=A_RN.cpu(), B_MR=B_MR.cpu())
            made.append(factors)
        joined = join(made)
        sharding.put(layer.lora_A["default"].weight, joined.A_RN)
        sharding.put(layer.lora_B["default"].weight, joined.B_MR)
    world.barrier()
    return placed


def adapted_parameter(layer: Any) -> nn.Parameter:
    """What one of PEFT's LoRA layers adds its product to."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))


@torch.no_grad()
def _put_magnitudes(layer: Any, target: Target, factors: LoraFactors, *, changes_base: bool) -> None:
    """DoRA's magnitudes, before W is changed: the norms of what W_res + s B A will be. Of a whole model."""
    W = layer.get_base_layer().weight.float()
    V_MN = W.t() if target.transposed else W
    if not changes_base:
        V_MN = torch.addmm(V_MN, factors.B_MR, factors.A_RN, alpha=target.scaling)
    norms_M = torch.linalg.vector_norm(V_MN, dim=1, dtype=torch.float64)
    layer.lora_magnitude_vector["default"].weight.copy_(norms_M)
