"""Starts that need no gradient: every owner makes A0 and B0 of its targets from their weights, or from neither."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import torch
from torch import nn

from loraga_dist.config import SchemeConfig
from loraga_dist.engines.base import seeded_generator
from loraga_dist.errors import RunError
from loraga_dist.gradients.one_pass import full_float32_matmul
from loraga_dist.model.plan import Plan
from loraga_dist.model.targets import Target
from loraga_dist.ranks.progress import phase
from loraga_dist.schemes import LoraFactors, Scheme
from loraga_dist.sharding.base import Sharding
from loraga_dist.start.factors import scheme_inputs


@full_float32_matmul()
def make_factors_of_weights(
    model: nn.Module, plan: Plan, config: SchemeConfig, *, sharding: Sharding, after_round: Callable[[], None]
) -> dict[str, LoraFactors]:
    """A0, B0 of the targets this rank owns, on the host, not yet rounded.

    In rounds: every rank gets one weight that it owns, and factorizes it while the others factorize theirs. No rank
    holds two gathered weights. A collective.
    after_round: called on every rank.
    Raises RunError, on every rank, for a weight that is not finite.
    """
    world = sharding.world
    rounds = list(zip_longest(*(plan.owned(rank) for rank in range(world.size))))
    made: dict[str, LoraFactors] = {}
    with phase("factorize", len(plan.targets), "target", shown=world.is_main) as progress:
        for of_ranks in rounds:
            weight = _own_weight(model, of_ranks, sharding) if plan.scheme.source == "weight" else None
            mine = of_ranks[world.rank]
            with world.together():
                if mine is not None:
                    made[mine.name] = _make(mine, plan.scheme, config, weight)
            del weight  # before the next one is gathered
            progress.advance(sum(target is not None for target in of_ranks))
            after_round()
    return made


def _own_weight(model: nn.Module, of_ranks: Sequence[Target | None], sharding: Sharding) -> torch.Tensor | None:
    """This rank's weight of a round, on its device; all take part in all gathers."""
    own = None
    for owner, target in enumerate(of_ranks):
        if target is None:
            continue
        weight = sharding.weight_on(model.get_parameter(target.parameter_name), owner)
        if owner == sharding.world.rank:
            own = weight
    return own


def _make(target: Target, scheme: Scheme, config: SchemeConfig, weight: torch.Tensor | None) -> LoraFactors:
    device, W_MN = torch.device("cpu"), None
    if weight is not None:
        if not torch.stack(weight.aminmax()).isfinite().all():
            raise RunError(f"factorize: the weight of {target.name} holds a NaN or an infinity")
        device, W_MN = weight.device, weight.t() if target.transposed else weight
    generator = seeded_generator(config.seed, f"{target.name}/weight", device)
    factors = scheme.factors(scheme_inputs(target, config, generator, W_MN=W_MN))
    return LoraFactors(A_RN=factors.A_RN.cpu(), B_MR=factors.B_MR.cpu())
