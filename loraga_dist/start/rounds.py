"""Every owner makes A0 and B0 of its targets, all owners at the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch
from torch import nn

from loraga_dist.gradients.checkpointer import Checkpointer
from loraga_dist.linalg import TruncatedSVD
from loraga_dist.model.factors import make_factors, needs_weight
from loraga_dist.model.plan import Plan
from loraga_dist.model.targets import Target
from loraga_dist.ranks.progress import phase
from loraga_dist.request.request import Request
from loraga_dist.schemes import LoraFactors
from loraga_dist.sharding.base import Sharding


def make_owned_factors(
    model: nn.Module,
    request: Request,
    plan: Plan,
    triplets: Mapping[str, TruncatedSVD],
    *,
    sharding: Sharding,
    checkpointer: Checkpointer | None = None,
) -> dict[str, LoraFactors]:
    """Make A0, B0 of the targets this rank owns, on the host. A collective.

    In rounds: where the scheme wants weights, every rank gets one that it owns, and factorizes it while the others
    factorize theirs. No rank holds two gathered weights.
    plan: the request's, with the ranks that a budget bought. triplets: of the gradients that this rank owns.
    checkpointer: asked after every round whether to leave.
    Raises RunError, on every rank, for a weight that is not finite.
    """
    world, config, dtypes = sharding.world, request.config.init, request.factor_dtypes
    rounds = list(zip_longest(*(plan.owned(rank) for rank in range(world.size))))
    made: dict[str, LoraFactors] = {}
    # what the gradients' triplets are made into is there at once
    shown = world.is_main and (not plan.groups or needs_weight(config))
    with phase("factorize", len(plan.targets), "targets", shown=shown) as progress:
        for of_ranks in rounds:
            weight = _own_weight(model, of_ranks, sharding) if needs_weight(config) else None
            mine = of_ranks[world.rank]
            with world.together():
                if mine is not None:
                    svd = triplets[mine.name] if plan.groups else None
                    made[mine.name] = make_factors(mine, config, dtypes[mine.name], svd=svd, weight=weight)
            del weight  # before the next one is gathered
            progress.advance(sum(target is not None for target in of_ranks))
            if checkpointer is not None:
                checkpointer.leave_if_asked()
    return made


def _own_weight(model: nn.Module, of_ranks: Sequence[Target | None], sharding: Sharding) -> torch.Tensor | None:
    """This rank's weight of a round, on its device; all take part in all gathers."""
    own = None
    for owner, target in enumerate(of_ranks):
        if target is None:
            continue
        weight = sharding.weight_on(model.get_parameter(target.parameter_name), target, owner)
        if owner == sharding.world.rank:
            own = weight
    return own
