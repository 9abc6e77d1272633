"""Where a calibration stands in its passes over the data, and when it has seen enough."""

from __future__ import annotations

import math
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


def is_time_to_look(num_microbatches: int) -> bool:
    """After 4, 6, 8, 12, 16, 24, ... microbatches: few collectives, and at most half too many microbatches."""
    step = 2
    while 4 * step <= num_microbatches:
        step *= 2
    return num_microbatches >= 4 and not num_microbatches % step


def median_cosine(engines: EngineGroup, world: World) -> float:
    """The median split-half cosine over all ranks' matrices; a collective."""
    everyone = world.all_json(engines.split_half_cosines(world))
    return statistics.median(cosine or 0.0 for cosines in everyone for cosine in cosines)


def steps_to_reach(target_cosine: float, cosine: float, num_steps: int, most: int) -> int:
    """At which look halves will agree by `target_cosine`, if after `num_steps` microbatches they do by `cosine`.

    A half's gradient is the mean one and noise, whose energy falls as one over the data n: cosine = 1 / (1 + c / n).
    """
    wanted = num_steps * (1 / cosine - 1) / (1 / target_cosine - 1) if cosine > 0 else most
    steps = max(num_steps + 1, math.ceil(min(wanted, most)))
    while not is_time_to_look(steps):
        steps += 1
    return min(steps, most)
