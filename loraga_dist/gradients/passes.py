"""Where a calibration stands in its passes over the data, and when it has seen enough."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from loraga_dist.engines.group import EngineGroup
from loraga_dist.gradients.one_pass import LossTotals
from loraga_dist.ranks.world import World


@dataclass(frozen=True, kw_only=True)
class Position:
    """A group of the plan, a pass over the data for it (0, then refinements), and how far that pass is."""

    group: int = 0
    refinement: int = 0
    num_samples: int = 0
    num_microbatches: int = 0
    totals: LossTotals = field(default_factory=LossTotals)
    """Of the group's first pass."""

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> Position:
        numbers: dict[str, Any] = content | {"totals": LossTotals(**content["totals"])}
        return cls(**numbers)


def halves_agree(
    engines: EngineGroup, target_cosine: float, num_microbatches: int, world: World, *, is_last: bool
) -> bool:
    """Tell whether the median split-half cosine over all ranks' matrices reaches `target_cosine`; a collective.

    Looks after 4, 6, 8, 12, 16, 24, ... microbatches and after the last one: few collectives, and at most half too many
    microbatches.
    """
    step = 2
    while 4 * step <= num_microbatches:
        step *= 2
    if not is_last and (num_microbatches < 4 or num_microbatches % step):
        return False
    everyone = world.all_json(engines.split_half_cosines(world))
    return statistics.median(cosine or 0.0 for cosines in everyone for cosine in cosines) >= target_cosine
