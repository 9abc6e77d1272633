"""Where engines get the whitening of inputs from: a look at what goes into the targets, before their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraga_dist.config import SchemeConfig
from loraga_dist.data.microbatches import Microbatch, counting_tokens
from loraga_dist.engines.group import EngineGroup
from loraga_dist.gradients.route import Route
from loraga_dist.ranks.world import World

WHITENING_SAMPLES = 32
"""Of the calibration data: what second moments of inputs are taken from. They converge long before gradients do."""


def find_whites(
    engines: EngineGroup,
    route: Route,
    chunk: Sequence[Microbatch],
    first: Sequence[Microbatch],
    init: SchemeConfig,
    world: World,
) -> None:
    """Find what makes the inputs of a group white, from all ranks' microbatches; a collective.

    chunk: that the route is to show next. first: to look at.
    """
    moments = engines.whites.moments(seed=init.seed, device=world.device)
    at_hand = first[0]

    def see(name: str, x: torch.Tensor) -> None:
        moments.observe(name, x, counting_tokens(at_hand, x.shape[:-1]))

    with route.inputs(chunk, list(engines.engine_of), see) as look:
        for microbatch in first:
            at_hand = microbatch
            look(microbatch)
            moments.end_microbatch()
    engines.whites.become(moments.whitenings(init.damping, world))
