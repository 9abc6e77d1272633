"""A frozen model becomes its own LoRA-GA start, in place: calibrate, factorize, put the factors, compare the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraga_dist.calibrate import Keeper, calibrate
from loraga_dist.calibration import Deal
from loraga_dist.config import MethodConfig
from loraga_dist.distributed import World
from loraga_dist.errors import RunError
from loraga_dist.losses import LOSSES
from loraga_dist.placement import TargetReport, add_adapter, place_factors, probe_logits
from loraga_dist.plan import Plan
from loraga_dist.schemes import LoraFactors
from loraga_dist.sharding import Sharding
from loraga_dist.stream import Calibration
from loraga_dist.targets import Target

_FLOAT32_TOLERANCE = 1e-3
"""Of the largest logit; runs that are right stay below 1e-5."""


@dataclass(frozen=True, kw_only=True)
class IdentityCheck:
    """How far residual + adapter are from the original model, on calibration tokens."""

    max_abs_logit_diff: float
    max_abs_logit: float
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model that training can go on from, and what is known about it."""

    model: Any
    """The `peft.PeftModel`: base W - s*B0*A0, adapter "default" A0, B0."""
    targets: list[TargetReport]
    calibration: Calibration
    identity_check: IdentityCheck


def start_in_place(
    model: nn.Module,
    plan: Plan,
    deal: Deal,
    config: MethodConfig,
    *,
    sharding: Sharding,
    rounding: Callable[[Target], torch.dtype],
    target_cosine: float | None = None,
    keeper: Keeper | None = None,
    keep: Callable[[Target, LoraFactors], None] | None = None,
) -> Start:
    """Calibrate on `model`, then turn it into its own LoRA-GA start. Every rank calls this; none holds the model."""
    probe = deal.microbatches(0, deal.samples_per_step, 0)[0]
    model.requires_grad_(False).eval()  # no dropout, also in the logits that are compared
    module = sharding.attach(model)
    try:
        calibration = calibrate(
            module,
            plan,
            deal,
            config.gradient,
            sharding=sharding,
            loss_sum=LOSSES[config.lora.task_type],
            seed=config.init.seed,
            target_cosine=target_cosine,
            keeper=keeper,
        )
        before = probe_logits(module, probe, sharding)
    finally:
        sharding.detach()

    peft_model = add_adapter(model, config.lora, sharding)
    targets = place_factors(
        peft_model, plan, calibration.owned, config.init, sharding=sharding, rounding=rounding, keep=keep
    )

    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    peft_model.requires_grad_(False)
    module = sharding.attach(peft_model)
    try:
        after = probe_logits(module.eval(), probe, sharding)
    finally:
        sharding.detach()
        for parameter in trainable:
            parameter.requires_grad_(True)
    peft_model.train()
    return Start(
        model=peft_model,
        targets=targets,
        calibration=calibration,
        identity_check=_compare_logits(before, after, sharding.world, next(model.parameters()).dtype),
    )


def _compare_logits(before: torch.Tensor, after: torch.Tensor, world: World, dtype: torch.dtype) -> IdentityCheck:
    largest = torch.tensor([(after - before).abs().max(), before.abs().max()], device=world.device)
    diff, scale = world.max_(largest).tolist()
    # lower precisions round W_res, by as much as the offset is large; float32 has no such excuse
    if not diff <= (math.inf if dtype != torch.float32 else _FLOAT32_TOLERANCE * scale):
        with world.together():
            raise RunError(
                f"place: the start's logits differ from the model's by {diff:.3g} (largest logit {scale:.3g})"
            )
    return IdentityCheck(max_abs_logit_diff=diff, max_abs_logit=scale, dtype=str(dtype).removeprefix("torch."))
