"""A frozen model becomes its own start, in place: calibrate, factorize, put the factors, compare the logits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from loraga_dist.config import LoraSection, MethodConfig, SchemeName
from loraga_dist.data.losses import LOSSES
from loraga_dist.data.samples import Deal, seeded_microbatch
from loraga_dist.errors import RunError
from loraga_dist.gradients.calibrate import Keeper, calibrate
from loraga_dist.gradients.passes import Calibration
from loraga_dist.model.plan import Plan
from loraga_dist.model.rank_budget import spend
from loraga_dist.model.targets import Target
from loraga_dist.ranks.world import World
from loraga_dist.schemes import LoraFactors
from loraga_dist.sharding import Sharding
from loraga_dist.start.from_weights import make_factors_of_weights
from loraga_dist.start.place import PROBE_TOKENS, TargetReport, add_adapter, place_factors, probe_logits

_FLOAT32_TOLERANCE = 1e-3
"""Of the largest logit; runs that are right stay below 1e-5."""


@dataclass(frozen=True, kw_only=True)
class IdentityCheck:
    """How far the start is from the original model: on calibration tokens, or seeded ones where there is no data."""

    max_abs_logit_diff: float
    max_abs_logit: float
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model that training can go on from, and what is known about it."""

    model: Any
    """The `peft.PeftModel`: adapter "default" A0, B0 on the base W - s*B0*A0, or on W where the scheme leaves it."""
    lora: LoraSection
    """The adapter's section; where there is a rank budget, with the ranks it bought."""
    targets: list[TargetReport]
    calibration: Calibration | None
    """None where the scheme takes no gradient."""
    identity_check: IdentityCheck
    seconds_factorize: float
    scheme: SchemeName


def start_in_place(
    model: nn.Module,
    plan: Plan,
    deal: Deal | None,
    config: MethodConfig,
    *,
    sharding: Sharding,
    rounding: Callable[[Target], torch.dtype],
    target_cosine: float | None = None,
    keeper: Keeper | None = None,
    keep: Callable[[Target, LoraFactors], None] | None = None,
) -> Start:
    """Turn `model` into its own start, after calibrating on it where the scheme takes gradients. Every rank calls this;
    none holds the model.

    deal: None only where the scheme takes no gradient.
    """
    if deal is None:
        probe = seeded_microbatch(model.config, config.lora.task_type, PROBE_TOKENS)
    else:
        probe = deal.microbatches(0, deal.samples_per_step, 0)[0]
    model.requires_grad_(False).eval()  # no dropout, also in the logits that are compared
    module = sharding.attach(model)
    calibration = None
    try:
        if plan.scheme.source == "gradient":
            assert deal is not None
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

    lora = config.lora
    if config.init.rank_budget is not None:
        assert calibration is not None, "checked by the configuration"
        singular_values = _shared_singular_values(calibration, sharding.world)
        targets, lora = spend(plan.targets, singular_values, config.lora, config.init)
        plan = replace(plan, targets=targets)
    if calibration is not None:
        owned, seconds_factorize = calibration.owned, calibration.seconds_factorize
    else:
        started = time.monotonic()
        leave_if_asked = _no_one_asks if keeper is None else keeper.leave_if_asked
        owned = make_factors_of_weights(model, plan, config.init, sharding=sharding, after_round=leave_if_asked)
        seconds_factorize = time.monotonic() - started
    peft_model = add_adapter(model, lora, sharding)
    reports = place_factors(peft_model, plan, owned, config.init, sharding=sharding, rounding=rounding, keep=keep)

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
        lora=lora,
        targets=reports,
        calibration=calibration,
        identity_check=_compare_logits(
            before, after, sharding.world, next(model.parameters()).dtype, must_agree=plan.scheme.starts_at_model
        ),
        seconds_factorize=seconds_factorize,
        scheme=config.init.scheme,
    )


def _shared_singular_values(calibration: Calibration, world: World) -> dict[str, list[float]]:
    """Of every target's gradient, the same on every rank; a collective."""
    owned = {name: found.svd.S_K.tolist() for name, found in calibration.owned.items()}
    return {name: values for part in world.all_json(owned) for name, values in part.items()}


def _no_one_asks() -> None:
    """In a training script, whose signals are its own."""


def _compare_logits(
    before: torch.Tensor, after: torch.Tensor, world: World, dtype: torch.dtype, *, must_agree: bool
) -> IdentityCheck:
    largest = torch.tensor([(after - before).abs().max(), before.abs().max()], device=world.device)
    # a maximum over ranks may lose a NaN
    diff, scale = world.max_(largest.nan_to_num_(nan=math.inf)).tolist()
    # lower precisions round W_res, by as much as the offset is large; float32 has no such excuse
    differs = must_agree and dtype == torch.float32 and diff > _FLOAT32_TOLERANCE * scale
    if differs or math.isinf(diff):
        with world.together():
            raise RunError(
                f"place: the start's logits differ from the model's by {diff:.3g} (largest logit {scale:.3g})"
            )
    return IdentityCheck(max_abs_logit_diff=diff, max_abs_logit=scale, dtype=str(dtype).removeprefix("torch."))
