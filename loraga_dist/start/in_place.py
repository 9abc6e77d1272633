"""A frozen model becomes its own start, in place: calibrate, factorize, put the factors, compare the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from loraga_dist.artifacts.report import FoundStep, IdentityCheck, TargetReport
from loraga_dist.config import LoraSection, SchemeConfig
from loraga_dist.data.losses import LOSSES
from loraga_dist.errors import UserError
from loraga_dist.gradients.block_order import NotInBlocks
from loraga_dist.gradients.calibrate import calibrate
from loraga_dist.gradients.checkpointer import Checkpointer
from loraga_dist.gradients.forward import full_float32_matmul
from loraga_dist.gradients.gradients import Gradients
from loraga_dist.gradients.kept import Keeping
from loraga_dist.gradients.premises import try_premises
from loraga_dist.model.coverage import Coverage
from loraga_dist.model.plan import Plan
from loraga_dist.model.rank_budget import spend
from loraga_dist.model.targets import Target
from loraga_dist.ranks.memory import return_freed_memory, return_pinned_memory
from loraga_dist.ranks.progress import Clock
from loraga_dist.ranks.words import say
from loraga_dist.request.request import Request
from loraga_dist.schemes import LoraFactors
from loraga_dist.sharding.base import Sharding
from loraga_dist.start.identity import Probe, coarsest_dtype, compare_logits
from loraga_dist.start.place import Placed, add_adapter, place_factors
from loraga_dist.start.rounds import make_owned_factors
from loraga_dist.start.step import search_step

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model that training can go on from, and what is known about it."""

    model: Any
    """The `peft.PeftModel`: adapter "default" A0, B0 on the base W - s*B0*A0, or on W where the scheme leaves it."""
    init: SchemeConfig
    """With the step that was searched."""
    lora: LoraSection
    """The adapter's section; where there is a rank budget, with the ranks it bought."""
    targets: list[Target]
    """With these ranks, in module order."""
    factors: dict[str, LoraFactors]
    """A0 and B0 as stored, float32 on the host; on rank 0 alone."""
    reports: dict[str, TargetReport]
    gradients: Gradients | None
    """None where the scheme takes none."""
    coverage: Coverage
    identity_check: IdentityCheck
    step: FoundStep | None = None
    """Where its length was searched."""
    cautions: list[str] = field(default_factory=list)
    """What of the model's own behaviour the gradient does not follow."""


@contextmanager
def beside_a_script(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Without what a training script may have switched on: autocast, which would round factors and products, modes
    without gradients, another default dtype or device. After an error the model trains what it did before, as it did
    before."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            nullcontext() if torch.get_default_device() == CPU else CPU,
        ):
            yield
    except BaseException:
        for module, was_training in training:
            module.training = was_training
        for parameter, required_grad in trainable:
            parameter.requires_grad_(required_grad)
        raise
    finally:
        torch.set_default_dtype(default)


@full_float32_matmul()
def start_in_place(
    model: nn.Module,
    request: Request,
    *,
    sharding: Sharding,
    checkpointer: Checkpointer | None = None,
    keeping: Keeping = Keeping(),  # noqa: B008
) -> Start:
    """Turn a frozen model into its own start. Every rank calls this; none holds the model.

    1. Take gradients over the calibration data, where the scheme wants them, and the logits to compare with: the
       model's, and those of its weights under another rounding, where the start rounds them.
    2. Settle the ranks, where there is a budget for them.
    3. Make A0 and B0, every owner those of its targets.
    4. Put them into an adapter, and what they take out of the base out of each rank's part of W.
    5. Search the length of the step, of schemes that take one.
    6. Compare the logits.
    """
    clock = Clock() if checkpointer is None else checkpointer.clock
    model.requires_grad_(False).eval()  # no dropout, also in the logits that are compared
    gradients, cautions = None, []
    if request.scheme.source == "gradient":
        request, cautions = try_premises(model, request, sharding)
    probe = Probe.of(model, request)
    if request.scheme.source == "gradient":
        try:
            gradients = calibrate(
                model, request, sharding=sharding, clock=clock, checkpointer=checkpointer, keeping=keeping
            )
        except NotInBlocks as why:
            if sharding.stays_in_files:
                problem = f"{why}; it has no room in memory, and from its files it goes by blocks alone: use more ranks"
                raise UserError("model", type(model).__name__, problem) from why
            request = request.in_model_order(str(why), sharding.world.size)
            if checkpointer is not None:
                checkpointer.groups = request.plan.groups
            if sharding.world.is_main:
                say(f"calibrate: in model order: {why}")
            gradients = calibrate(model, request, sharding=sharding, clock=clock, checkpointer=checkpointer)
        return_freed_memory()  # engine state
        return_pinned_memory(sharding.world.device)  # that and inputs of blocks, where they lay on the host
    before = probe.logits(model, sharding)
    rerounded, dtype = None, coarsest_dtype(model, request.targets)
    if request.scheme.changes_base:
        rerounded = probe.rerounded_logits(model, request.targets, sharding)

    plan, lora = _settle_ranks(request, gradients)

    triplets = {} if gradients is None else gradients.owned
    with clock.phase("factorize"):
        owned = make_owned_factors(model, request, plan, triplets, sharding=sharding, checkpointer=checkpointer)

    peft_model = add_adapter(model, lora, plan.targets, sharding)
    placed = place_factors(peft_model, plan, owned, sharding=sharding)
    step = None
    if request.step_data is not None:
        loss = LOSSES[lora.task_type]
        with clock.phase("search"):
            step = search_step(peft_model.eval(), plan, request.step_data, loss, sharding=sharding)
            request = request.with_step(step.length)
            del owned, placed  # before they are made again
            owned = make_owned_factors(model, request, plan, triplets, sharding=sharding)
            placed = place_factors(peft_model, plan, owned, sharding=sharding)
    del owned  # rank 0 has all of them now, and two copies would be one too many
    return_freed_memory()

    after = probe.logits(peft_model.eval().base_model.model, sharding)
    peft_model.train()
    identity_check = compare_logits(
        probe,
        before,
        rerounded,
        after,
        dtype=dtype,
        scheme=plan.scheme,
        world=sharding.world,
    )
    return Start(
        coverage=request.coverage,
        model=peft_model,
        init=request.config.init,
        lora=lora,
        targets=plan.targets,
        factors=placed.factors,
        reports={target.name: _report(target, plan, gradients, placed) for target in plan.targets},
        gradients=gradients,
        identity_check=identity_check,
        step=step,
        cautions=cautions,
    )


def _settle_ranks(request: Request, gradients: Gradients | None) -> tuple[Plan, LoraSection]:
    """The plan's targets and the adapter's section with the ranks that a budget buys; without one as they are."""
    if request.config.init.rank_budget is None:
        return request.plan, request.lora_in_memory
    assert gradients is not None, "checked by the configuration"
    singular_values = {name: facts.singular_values for name, facts in gradients.facts.items()}
    targets, lora = spend(request.targets, singular_values, request.lora_in_memory, request.config.init)
    return replace(request.plan, targets=targets), lora


def _report(target: Target, plan: Plan, gradients: Gradients | None, placed: Placed) -> TargetReport:
    facts = {}
    if gradients is not None:
        facts = asdict(gradients.facts[target.name].leading(plan.scheme.num_triplets(target.r)))
    return TargetReport.of(
        target, owner_rank=plan.owners[target.name], offset_ratio=placed.offset_ratios[target.name], **facts
    )
